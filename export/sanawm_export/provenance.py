"""Where a bundle's numbers come from, as its manifest says it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanawm_calibration.recipe import Recipe
    from sanawm_calibration.store import Calibration


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def calibration_summary(recipe: Recipe, calibration: Calibration, file: Path) -> dict[str, Any]:
    """What the manifest says about the recipe and the calibration file that its scales are from."""
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "file_sha256": file_digest(file),
        "clips": len(calibration.clips),
        "settings": calibration.settings,
        "versions": calibration.versions,
    }
