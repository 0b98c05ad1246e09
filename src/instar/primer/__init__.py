"""The embedded default: everything a fresh machine needs to raise a model offline."""
