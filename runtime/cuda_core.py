"""cuda-core, where it is installed: imported when it is first needed."""

from __future__ import annotations

import importlib
from typing import Any

from forcingkv.headmaps.errors import MissingExtraError


def cuda_core() -> Any:
    """The module `cuda.core`. Raises MissingExtraError where it is not installed."""
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise MissingExtraError("cuda-core", "tensorrt-rtx") from error
