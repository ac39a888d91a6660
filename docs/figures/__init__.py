"""Figures of docs/posts, one module each: ``figure()`` computes and draws it, as SVG for light and dark pages."""

NAMES = (
    "muon",
    "moonlight",
    "spectral_decay",
    "clipping",
    "moe_geometry",
    "aux_loss",
    "loss_free",
    "tarflow",
    "ddcm",
    "cur",
)
"""One for each page of docs/posts, in its order."""
