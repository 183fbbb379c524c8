"""The text encoder of a service: prompts of clients as models take them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from threading import Lock

import numpy as np
import numpy.typing as npt

from forcingkv.commands.console import need
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import Embeds, Prompt, TextInput

KEPT = 256
"""Prompts whose embeddings are kept: up to 8 MB each for UMT5-XXL."""


class ServedEncoder:
    """A text encoder that several threads may ask. What was asked for of late is not encoded again.

    Args:
        place: as `load_prompt_encoder` has it.

    Raises InputError as that does, and MissingExtraError without torch and transformers.
    """

    def __init__(self, place: str) -> None:
        need("text", "torch", "transformers", "ftfy")
        from forcingkv.models.text_encoder import PromptCutWarning, load_prompt_encoder

        self._encoder, self._cut = load_prompt_encoder(place), PromptCutWarning
        self._kept: OrderedDict[tuple[str, int], npt.NDArray[np.float32]] = OrderedDict()
        self._turn = Lock()

    def check(self, spec: ModelSpec) -> None:
        """Raise InputError unless the model takes what the encoder gives, as far as its width says."""
        if self._encoder.width != spec.text_width:
            raise InputError(
                f"gives embeddings of width {self._encoder.width}",
                where=self._encoder.name,
                expected=f"{spec.text_width}, as {spec.name} takes",
            )

    def __call__(self, spec: ModelSpec, words: str) -> Prompt:
        """A prompt as the model takes it. Raises InputError for one that cannot be encoded."""
        key = words, spec.text_length
        with self._turn:
            if key not in self._kept:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", self._cut)  # as Wan does, the end is left out
                    self._kept[key] = self._encoder.encode(words, spec.text_length)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            array = self._kept[key]
        return TextInput(words, Embeds((words,), (array,)).get(words, spec))
