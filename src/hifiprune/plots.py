"""Plots of a comparison, each as PNG and SVG."""

from pathlib import Path
from typing import Any


def draw_comparison(results: dict[str, Any], folder: Path) -> None:
    """Draw all plots of a comparison into `folder`."""
