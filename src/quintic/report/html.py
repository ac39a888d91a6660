"""The HTML document around a page. It loads nothing, and tells the browser to refuse what it did not bring along."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from quintic.report.style import STYLE

__all__ = ["document"]


def document(title: str, main: str, script: str = "") -> str:
    """A whole self-contained page.

    Args:
        title: Plain text.
        main: HTML of what is in it. Images must be inline.
        script: JavaScript at its end; no other runs in the page.

    Example:
        >>> page = document("a < b", "<p>text</p>")
        >>> "<title>a &lt; b - Quintic</title>" in page, "script-src" in page
        (True, False)
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - Quintic</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{main}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""
