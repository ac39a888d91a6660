"""How a file names its model, and which of the models that come with this package that is, without loading any."""

from __future__ import annotations

import hashlib

from quintic.codec.schedule import PRESETS

__all__ = ["SHIPPED", "fingerprint", "shipped_of"]

SHIPPED = {
    "emoji32": (
        "118315a92fa2045fa0e0e0ad1bb3f8404590deb880da58835ec865a4d0b50475",
        "991bbbbc76b02628bf104fea0941133b98b5620bc47680d02ffb2ac8734b2671",
        "b873ab7693ef93a492d65a1946c61f96bee49b322f002ace0431d009a348e32c",
    ),
    "fashion28": (
        "12f77147edcab6c67dfd148e28453e41163d851be4f4e3324b8bcca39c708348",
        "92e8bf760b36504c1f418b743bd71c830e02d9553fbe273fd01a66e7c03783e9",
        "a5ee54e1cb9508030b88518c2e866785ecc208ba9fbb89947ddb50d651f61ea7",
    ),
}
"""By name: hexadecimal SHA-256 of the denoiser, of its information curve and of its residuals."""


def fingerprint(preset: int, denoiser: str, curve: str, residuals: str | None) -> bytes:
    """What a file holds: 4 bytes of the model alone, or with a preset 2 of model, curve and what else it needs.

    Args:
        preset: Key of :data:`quintic.codec.schedule.PRESETS`; 0 with a plan.
        denoiser: Hexadecimal SHA-256, as the next two.
        curve: Of the information curve.
        residuals: Of the residuals, if the model has any.
    """
    if not preset:
        return hashlib.sha256(denoiser.encode()).digest()[:4]
    named = f"{denoiser} {curve}"
    if PRESETS[preset].calls < PRESETS[preset].levels:
        named += f" {residuals}"
    return hashlib.sha256(named.encode()).digest()[:2]


def shipped_of(preset: int, wanted: bytes) -> str | None:
    """The name of the shipped model that a file wants; None if it is none of them."""
    return next((name for name, digests in SHIPPED.items() if fingerprint(preset, *digests) == wanted), None)
