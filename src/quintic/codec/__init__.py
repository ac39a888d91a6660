"""DDCM, diffusion as a code (post 10711): a picture codec, an image tokenizer, a restorer.

Files and their headers need neither torch nor a model; what does is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quintic.codec.container import Header, Parts, read_parts
from quintic.codec.curve import Curve
from quintic.codec.schedule import Plan, paper_plan

if TYPE_CHECKING:
    from quintic.codec.image import Codec as Codec
    from quintic.codec.image import Tokens as Tokens
    from quintic.codec.models import calibrate as calibrate
    from quintic.codec.own import load_model as load_model
    from quintic.codec.own import save_foreign as save_foreign
    from quintic.codec.own import save_model as save_model
    from quintic.codec.rate import Coded as Coded
    from quintic.codec.rate import psnr as psnr

_HOMES = {
    "Codec": "image",
    "Coded": "rate",
    "Tokens": "image",
    "calibrate": "models",
    "load_model": "own",
    "psnr": "rate",
    "save_foreign": "own",
    "save_model": "own",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "Curve",
    "Header",
    "Parts",
    "Plan",
    "paper_plan",
    "read_parts",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quintic.codec' has no attribute {name!r}")
    return getattr(import_module(f"quintic.codec.{_HOMES[name]}"), name)
