"""The language model: DeepSeek-V3 architecture, generation and the training task."""

from quintic.lm.config import LMConfig
from quintic.lm.decode import generate
from quintic.lm.deepseek import load_deepseek, save_deepseek
from quintic.lm.model import LanguageModel

__all__ = ["LMConfig", "LanguageModel", "generate", "load_deepseek", "save_deepseek"]
