"""Text in, windows of tokens out; numpy only."""

from quintic.data.config import DataConfig
from quintic.data.order import Order
from quintic.data.tokenizer import Tokenizer
from quintic.data.tokens import Split, TokenData, document_ids, num_windows, prepare, windows

__all__ = [
    "DataConfig",
    "Order",
    "Split",
    "TokenData",
    "Tokenizer",
    "document_ids",
    "num_windows",
    "prepare",
    "windows",
]
