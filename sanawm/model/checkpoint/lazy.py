"""Imports of optional libraries at the moment they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from sanawm.errors import UserError


def require(module: str) -> Any:
    """The named module; UserError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(f"this needs {package}, which is not installed; run: pip install 'sanawm[export]'") from error
