"""From files to batches: schema, readers, packing and resumable sources."""
