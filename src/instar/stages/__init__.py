"""One short file a stage: its config, and the source and objective that make it."""
