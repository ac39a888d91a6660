"""Quintic: matrix optimizers, mixtures of experts, flows, diffusion codes and matrix skeletons.

Importing this package does not import torch. The rooms are subpackages: ``quintic.optim``,
``quintic.moe``, ``quintic.lm`` and so on; import what you use from them.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("quintic")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
