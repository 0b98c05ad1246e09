"""Talking with a model: ``terminal`` holds a conversation, ``generate`` completes one prompt.

``verb`` serves models to programs, and ``app`` puts the endpoints together. A request comes in by
``limits``; ``chat_turns``, ``chat_api`` and ``asking`` make of it what ``worker``, who owns the
engines, is asked. What a reply is made of: ``tools``, ``reasoning``, ``grammar`` with ``shortest``.
``safety`` and ``harm`` are the filter, ``page`` is what people see, ``batch`` answers whole files.
"""
