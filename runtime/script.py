"""What a video is told to show: its prompt, and the prompts that it changes to on its way.

A saved state holds it, so that whoever goes on with the video knows what it is, and what is still to come.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import Array, Prompt, TextInput, prompt_input


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, by what the model gets of it."""

    digest: str
    """SHA-256 of the model's input: float32 (1, text_length, text_width), little-endian."""
    text: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Its words; None: embeddings that were given without them."""

    @classmethod
    def of(cls, spec: ModelSpec, prompt: Prompt) -> tuple[Self, Array]:
        """The record of a prompt, and the model's input for it. Raises InputError as `prompt_input` does."""
        array = prompt_input(spec, prompt)
        said = prompt.text if isinstance(prompt, TextInput) else prompt
        digest = hashlib.sha256(np.asarray(array, "<f4").tobytes()).hexdigest()
        return cls(digest, said if isinstance(said, str) else None), array

    def __str__(self) -> str:
        return repr(self.text) if self.text is not None else f"an embedding (SHA-256 {self.digest[:12]}...)"


@dataclass(frozen=True)
class Switch:
    """A change of the prompt."""

    chunk: int
    """The first chunk that follows the new prompt."""
    prompt: PromptRecord
    recache: bool
    """Whether the caches are made anew for it."""

    def __str__(self) -> str:
        return f"{self.prompt} from chunk {self.chunk} on" + ("" if self.recache else " without rebuilding")


class Script:
    """The prompts of one video.

    Attributes:
        prompt: the first; None: of a state that was saved before states knew it.
        made: the switches that were made, in order.
        due: those to come, with the model's input, by their chunk.
    """

    def __init__(self, prompt: PromptRecord | None, made: Sequence[Switch] = ()) -> None:
        self.prompt, self.made = prompt, list(made)
        self.due: dict[int, tuple[Switch, Array]] = {}

    @property
    def switches(self) -> tuple[Switch, ...]:
        """Those that were made, and those to come."""
        return (*self.made, *(switch for _, (switch, _) in sorted(self.due.items())))

    def plan(self, switch: Switch, text: Array, begun: int) -> None:
        """Let a switch be made in time. Raises InputError for a chunk that is among the `begun` first, or
        with which another switch begins."""
        if operator.index(switch.chunk) < begun:
            what = f"is {switch.chunk}, and {begun} chunks were begun already"
            raise InputError(what, where="at", expected=f"{begun} or more")
        if switch.chunk in self.due:
            what = f"is {switch.chunk}, with which the video switches to {self.due[switch.chunk][0].prompt}"
            raise InputError(what, where="at", expected="one prompt for each chunk")
        self.due[switch.chunk] = switch, text
