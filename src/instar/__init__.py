"""instar raises a language model through its whole life, from raw text to a chat partner."""

__version__ = "0.1.0"
