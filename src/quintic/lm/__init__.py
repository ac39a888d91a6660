"""The language model: DeepSeek-V3 architecture, generation and the training task."""

from quintic.lm.config import LMConfig
from quintic.lm.decode import generate, generate_batch
from quintic.lm.deepseek import load_deepseek, save_deepseek
from quintic.lm.model import LanguageModel

__all__ = ["LMConfig", "LanguageModel", "generate", "generate_batch", "load_deepseek", "save_deepseek"]
