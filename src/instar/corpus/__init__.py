"""Raw text in: read, repaired, filtered, deduplicated, decontaminated, mixed, cut into tokens."""
