"""Talking with a model: ``terminal`` holds a conversation, ``generate`` completes one prompt.

``verb`` serves models to programs; ``app`` puts the endpoints together, ``worker`` owns the
engines.
"""
