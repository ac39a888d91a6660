"""Text in, windows of tokens out; pictures in, arrays of bytes out; numpy only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quintic.data.config import DataConfig
from quintic.data.order import Order
from quintic.data.tokenizer import Tokenizer
from quintic.data.tokens import Split, TokenData, document_ids, num_windows, prepare, windows

if TYPE_CHECKING:
    from quintic.data.images import ImageConfig as ImageConfig
    from quintic.data.images import ImageData as ImageData
    from quintic.data.images import ImageSplit as ImageSplit
    from quintic.data.images import prepare_images as prepare_images

_IMAGES = ("ImageConfig", "ImageData", "ImageSplit", "prepare_images")

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "DataConfig",
    "Order",
    "Split",
    "TokenData",
    "Tokenizer",
    "document_ids",
    "num_windows",
    "prepare",
    "windows",
    *_IMAGES,
]


def __getattr__(name: str) -> Any:
    if name not in _IMAGES:
        raise AttributeError(f"module 'quintic.data' has no attribute {name!r}")
    return getattr(import_module("quintic.data.images"), name)
