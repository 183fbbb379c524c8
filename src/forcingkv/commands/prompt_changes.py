"""Prompts that change on the way, as the command line has them: "SECONDS:PROMPT"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forcingkv.commands.models import text_input
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import ModelSpec


@dataclass(frozen=True)
class PromptChange:
    """Another prompt, from a chunk on."""

    chunk: int
    text: npt.NDArray[np.float32]
    """(1, text_length, text_width)."""


def prompt_changes(
    given: Sequence[str], spec: ModelSpec, embeds: Path | None, chunks_for: Callable[[float], int]
) -> list[PromptChange]:
    """The changes, in order. The prompt changes with the first chunk that begins at that second or later.

    Raises InputError for one that is not of that form, or whose prompt cannot be used.
    """
    changes = []
    for change in given:
        start, colon, prompt = change.partition(":")
        try:
            seconds = float(start)
        except ValueError:
            seconds = 0.0
        if not colon or not seconds > 0:
            raise InputError(
                f"{change!r} does not say from when on", where="--switch", expected='"SECONDS:PROMPT"'
            )
        changes.append(PromptChange(chunks_for(seconds), text_input(spec, prompt.strip(), embeds)))
    return sorted(changes, key=lambda change: change.chunk)
