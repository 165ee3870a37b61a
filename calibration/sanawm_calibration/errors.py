"""Mistakes in calibration data, recipes and statistics that a user can mend."""

from __future__ import annotations

from sanawm.errors import UserError


class CalibrationError(UserError):
    """A calibration set or file that cannot be used, or statistics that are not fit to quantize with."""


class RecipeError(UserError):
    """A precision recipe that cannot be read or does not fit the model."""
