"""The language model: DeepSeek-V3 architecture, generation and the training task."""

from quintic.lm.config import LMConfig
from quintic.lm.decode import generate, generate_batch
from quintic.lm.deepseek import load_deepseek, save_deepseek
from quintic.lm.model import LanguageModel
from quintic.lm.task import generate_text

__all__ = [
    "LMConfig",
    "LanguageModel",
    "generate",
    "generate_batch",
    "generate_text",
    "load_deepseek",
    "save_deepseek",
]
