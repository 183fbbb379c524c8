"""Files of statistics of queries, also as TriAttention releases them, and statistics that are measured."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.statistics import PARTS, QueryStatistics, told_of

TORCH_FILES = (".pt", ".pth")


def read_statistics(path: Path) -> QueryStatistics:
    """The statistics of a file: safetensors, or what torch saved, of which nothing is run.

    Raises InputError where it cannot be read, or holds something else.
    """
    if path.suffix not in TORCH_FILES:
        return QueryStatistics.read(path)
    where = str(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=where) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        expected = f"what torch saved of the tensors {', '.join(PARTS)}"
        raise InputError("is no file of tensors", where=where, expected=expected) from error
    table: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    arrays = {
        str(name): part.detach().numpy()
        for name, part in table.items()
        if isinstance(part, torch.Tensor) and part.dtype in (torch.float32, torch.float64)
    }
    said = table.get("metadata")
    model, source = told_of(said if isinstance(said, Mapping) else {})
    return QueryStatistics.of(arrays, model, source, where)
