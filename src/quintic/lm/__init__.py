"""The language model: DeepSeek-V3 architecture, generation and the training task."""

from quintic.lm.config import LMConfig
from quintic.lm.decode import generate
from quintic.lm.model import LanguageModel

__all__ = ["LMConfig", "LanguageModel", "generate"]
