"""Prompts as model input, for models whose text encoder is small enough to live in the runtime."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import ModelSpec

Prompt: TypeAlias = str | npt.NDArray[np.float32]
"""Words, or text embeddings (1, text_length, text_width) for models whose text encoder does not live here."""


def prompt_input(spec: ModelSpec, prompt: Prompt) -> npt.NDArray[np.float32]:
    """The model's input (1, text_length, text_width) for a prompt.

    Raises InputError for words that the model does not know or cannot take, and for embeddings of another
    shape or with values that are not finite.
    """
    if isinstance(prompt, str):
        return encode_words(spec, prompt)
    shape = (1, spec.text_length, spec.text_width)
    if not isinstance(prompt, np.ndarray):
        raise InputError(
            f"is a {type(prompt).__name__}", where="prompt", expected=f"words, or an array {shape}"
        )
    if prompt.shape != shape:
        raise InputError(f"has the shape {prompt.shape}", where="prompt", expected=str(shape))
    if not np.isfinite(prompt).all():
        raise InputError("has values that are not finite", where="prompt")
    return np.ascontiguousarray(prompt, np.float32)


def encode_words(spec: ModelSpec, prompt: str) -> npt.NDArray[np.float32]:
    """One-hot word and one-hot place of each word: (1, text_length, text_width), zero-padded.

    The model's own text embedding turns this into its learned word and place vectors.
    Raises InputError for an empty prompt, an unknown word or too many words, and for a model whose
    encoder is too large for the runtime.
    """
    if spec.text.kind != "words":
        raise InputError(
            f"{spec.name} takes text embeddings, not words",
            where="prompt",
            expected=f"an array (1, {spec.text_length}, {spec.text_width}), or a file of them",
            hint="Make them with: forcingkv encode --prompts prompts.txt --out embeds.safetensors,"
            " and give them with --embeds",
        )
    vocabulary = spec.text.vocabulary
    words = prompt.lower().split()
    if not words:
        raise InputError("the prompt is empty", where="prompt", expected="some words")
    if len(words) > spec.text_length:
        raise InputError(
            f"{prompt!r} has {len(words)} words",
            where="prompt",
            expected=f"at most {spec.text_length}",
        )
    unknown = sorted(set(words) - set(vocabulary))
    if unknown:
        raise InputError(
            f"the model {spec.name} does not know the word {', '.join(map(repr, unknown))}",
            where="prompt",
            expected=f"words among: {' '.join(vocabulary)}",
        )
    text = np.zeros((1, spec.text_length, spec.text_width), np.float32)
    for place, word in enumerate(words):
        text[0, place, vocabulary.index(word)] = 1
        text[0, place, len(vocabulary) + place] = 1
    return text
