"""Packages that only some data need, loaded when first asked for."""

from __future__ import annotations

import importlib
from typing import Any

from fxopt.errors import DataError


def load(module: str, what: str) -> Any:
    """An optional module.

    Args:
        module: its dotted name. what: what needs it, for the message.

    Raises:
        DataError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(f"{what} needs the package {package}, which is not installed.", where=module, do="pip install 'fxopt[data]'") from error
