"""A decoder-only transformer whose names are Hugging Face's."""

from instar.model.cache import KVCache
from instar.model.config import ModelConfig
from instar.model.stack import Stack
from instar.model.transformer import CausalLM, Decoder, ScoreModel

__all__ = ["CausalLM", "Decoder", "KVCache", "ModelConfig", "ScoreModel", "Stack"]
