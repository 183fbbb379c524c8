"""What a video is told to show: its prompt, and the prompts that it changes to on its way.

A saved state holds it, so that whoever goes on with the video knows what it is, and what is still to come.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, get_args

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, check_bounds
from forcingkv.runtime.spec import ENCODED as ENCODED
from forcingkv.runtime.spec import ModelSpec, Recache
from forcingkv.runtime.text import Array, Prompt, TextInput, prompt_input

MOST_FADED = 10_000
"""Chunks of both prompts: hours."""
_HOW: dict[Recache, str] = {
    "replay": "",
    "none": " without rebuilding",
    "keep-sink": " (recache keep-sink)",
    "empty-sink": " (recache empty-sink)",
    "cut": " (another scene)",
}


def recache_of(spec: ModelSpec, asked: Recache | bool | None) -> Recache:
    """How a switch makes the cache anew: a word, or as the model was trained (None, True), or not (False).

    Raises InputError for any other word.
    """
    if asked is None or asked is True:
        return spec.recache
    if asked is False:
        return "none"
    if asked not in get_args(Recache):
        raise InputError(f"is {asked!r}", where="recache", expected=" or ".join(map(repr, get_args(Recache))))
    return asked


def check_fade(chunks: int) -> int | None:
    """Chunks that follow two prompts at a switch; None: none do. Raises InputError for another number."""
    if not 0 <= operator.index(chunks) <= MOST_FADED:
        raise InputError(f"is {chunks}", where="fade", expected=f"a number of chunks, 0 to {MOST_FADED:,}")
    return operator.index(chunks) or None


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
    recache: Recache
    """How the caches are made anew for it."""
    fade: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Chunks that are made under both prompts, before those under the new one alone; None: none."""

    def __post_init__(self) -> None:
        check_bounds(self, {"fade": (1, MOST_FADED)}, "fade")
        if self.fade and self.recache == "cut":
            raise InputError(
                f"is {self.fade}, and a cut begins another scene at once",
                where="fade",
                expected="0, or another recache",
            )

    def __str__(self) -> str:
        how = f", over {self.fade} chunks of both" if self.fade else ""
        return f"{self.prompt} from chunk {self.chunk} on{how}{_HOW[self.recache]}"

    @property
    def last_blended(self) -> int:
        """The last chunk that follows the old prompt too; the one before `chunk`, if none does."""
        return self.chunk + (self.fade or 0) - 1

    def blend(self, chunk: int, old: Array, new: Array) -> Array:
        """The model's input for a chunk from `self.chunk` on: of n chunks that fade, chunk i from 0 on has
        (n - i) / (n + 1) of the old prompt's and the rest of the new one's."""
        if chunk > self.last_blended:
            return new
        assert self.fade is not None
        share = np.float32((chunk - self.chunk + 1) / (self.fade + 1))
        return (1 - share) * old + share * new


class Script:
    """The prompts of one video.

    Attributes:
        prompt: the first; None: of a state that was saved before states knew it.
        made: the switches that were made, in order.
        due: those to come, with the model's input, by their chunk.
        text: the model's input that the last begun chunk follows, made of two prompts' where one fades; None:
            of a state that was saved before states knew it.
        fading: the model's inputs of both prompts while chunks of both are to come.
    """

    def __init__(self, prompt: PromptRecord | None, made: Sequence[Switch] = ()) -> None:
        self.prompt, self.made = prompt, list(made)
        self.due: dict[int, tuple[Switch, Array]] = {}
        self.text: Array | None = None
        self.fading: tuple[Array, Array] | None = None

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
