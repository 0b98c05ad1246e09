"""Talking with a model: ``terminal`` holds a conversation, ``generate`` completes one prompt."""
