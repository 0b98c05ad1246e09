"""The tokenizer: bytes that often stand together become one token.

``bpe`` learns and applies the merges, ``hf`` writes and reads the directory that the ecosystem
understands, ``pieces`` has SentencePiece make one, ``learning`` chooses the trainer, ``chat``
renders conversations, ``verbs`` is the command line.
"""
