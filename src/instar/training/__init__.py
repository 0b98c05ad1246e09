"""One loop for every stage, and what it stands on."""
