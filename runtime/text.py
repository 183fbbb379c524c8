"""Prompts as the model's input: words, or text embeddings made ahead of time.

The text encoder of a public model has billions of parameters and needs torch; the runtime needs its output
only. A file of embeddings is safetensors: `embeds.0`, `embeds.1`, ... of (tokens, text_width), without
padding, in the order of the prompts in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import new_tensors, read_arrays, read_header

SCHEMA = "forcingkv.embeds/1"
HINT = "Make the file with: forcingkv encode --prompts prompts.txt --out embeds.safetensors"

Array = npt.NDArray[np.float32]
Prompt: TypeAlias = str | Array
"""Words, or text embeddings (1, text_length, text_width) for models whose text encoder does not live here."""


def prompt_input(spec: ModelSpec, prompt: Prompt) -> Array:
    """The model's input (1, text_length, text_width) for a prompt.

    Raises InputError for words that the model does not know or cannot take, and for embeddings of another
    shape or with values that are not finite.
    """
    if isinstance(prompt, str):
        return encode_words(spec, prompt)
    shape = (1, spec.text_length, spec.text_width)
    if not isinstance(prompt, np.ndarray):
        expected = f"words, or an array {shape}"
        raise InputError(f"is a {type(prompt).__name__}", where="prompt", expected=expected)
    if prompt.shape != shape:
        raise InputError(f"has the shape {prompt.shape}", where="prompt", expected=str(shape))
    if not np.isfinite(prompt).all():
        raise InputError("has values that are not finite", where="prompt")
    return np.ascontiguousarray(prompt, np.float32)


def encode_words(spec: ModelSpec, prompt: str) -> Array:
    """One-hot word and one-hot place of each word: (1, text_length, text_width), zero-padded.

    The model's own text embedding turns this into its learned word and place vectors.
    Raises InputError for an empty prompt, an unknown word or too many words, and for a model whose
    encoder is too large for the runtime.
    """
    if spec.text.kind != "words":
        what = f"{spec.name} takes text embeddings, not words"
        expected = f"an array (1, {spec.text_length}, {spec.text_width}), or a file of them"
        raise InputError(what, where="prompt", expected=expected, hint=f"{HINT}, and give it with --embeds")
    vocabulary = spec.text.vocabulary
    words = prompt.lower().split()
    if not words:
        raise InputError("the prompt is empty", where="prompt", expected="some words")
    if len(words) > spec.text_length:
        expected = f"at most {spec.text_length}"
        raise InputError(f"{prompt!r} has {len(words)} words", where="prompt", expected=expected)
    unknown = sorted(set(words) - set(vocabulary))
    if unknown:
        what = f"the model {spec.name} does not know the word {', '.join(map(repr, unknown))}"
        raise InputError(what, where="prompt", expected=f"words among: {' '.join(vocabulary)}")
    text = np.zeros((1, spec.text_length, spec.text_width), np.float32)
    for place, word in enumerate(words):
        text[0, place, vocabulary.index(word)] = 1
        text[0, place, len(vocabulary) + place] = 1
    return text


@dataclass(frozen=True)
class Embeds:
    """Prompts and their embeddings. Raises InputError where those are not one each, finite, of one width."""

    prompts: tuple[str, ...]
    arrays: tuple[Array, ...]
    """One a prompt: (tokens, text_width)."""
    where: str = "embeds"
    """The file, for messages."""

    def __post_init__(self) -> None:
        prompts, arrays = self.prompts, self.arrays
        if not prompts or len(prompts) != len(arrays):
            what = f"has {len(arrays)} embeddings for {len(prompts)} prompts"
            raise InputError(what, where=self.where, expected="one for each")
        for prompt, array in zip(prompts, arrays, strict=True):
            if array.ndim != 2:
                fault = f"{array.ndim} dimensions"
            elif array.shape[1] != arrays[0].shape[1]:
                fault = f"the width {array.shape[1]}"
            elif not np.isfinite(array).all():
                fault = "values that are not finite"
            else:
                continue
            what = f"the embedding of {_short(prompt)} has {fault}"
            expected = "finite values (tokens, text_width), all of one width"
            raise InputError(what, where=self.where, expected=expected)

    def get(self, prompt: str | None, spec: ModelSpec) -> Array:
        """The embedding of a prompt (None: the only one) as the model takes it, zero-padded.

        Returns (1, text_length, text_width). Raises InputError for a prompt that is not in the file, for
        None where there are several, and for an embedding of another width or with too many tokens.
        """
        count = len(self.prompts)
        known = ", ".join(map(_short, self.prompts[:5])) + (f" and {count - 5} more" if count > 5 else "")
        if prompt is None and count > 1:
            what = f"has {count} prompts, and none was asked for"
            raise InputError(what, where=self.where, expected=f"one of {known}")
        wanted = self.prompts[0] if prompt is None else prompt
        place = next((i for i, text in enumerate(self.prompts) if text.strip() == wanted.strip()), None)
        if place is None:
            what = f"has no embedding of {_short(wanted)}"
            raise InputError(what, where=self.where, expected=f"one of {known}", hint=HINT)
        array = self.arrays[place]
        tokens, width = array.shape
        if width != spec.text_width:
            what, expected = f"has embeddings of width {width}", f"{spec.text_width}, as {spec.name} takes"
            hint = "Encode the prompts with the text encoder of this model."
            raise InputError(what, where=self.where, expected=expected, hint=hint)
        if tokens > spec.text_length:
            expected = f"at most {spec.text_length}, as {spec.name} takes"
            raise InputError(f"has {tokens} tokens for {_short(wanted)}", where=self.where, expected=expected)
        text = np.zeros((1, spec.text_length, spec.text_width), np.float32)
        text[0, :tokens] = array
        return text


def read_embeds(path: Path | str) -> Embeds:
    """Read and check a file of text embeddings; half precision comes as float32.

    Raises InputError for a file that cannot be read, is not of this schema, has not one finite (tokens,
    text_width) array for each prompt, or arrays of different widths.
    """
    where = str(path)
    tensors, metadata = read_header(path)
    if metadata.get("schema") != SCHEMA:
        what = f"has the schema {metadata.get('schema')!r}"
        raise InputError(what, where=where, expected=repr(SCHEMA), hint=HINT)
    try:
        prompts = json.loads(metadata.get("prompts", ""))
    except (ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError("its metadata has no list of prompts", where=where, hint=HINT)
    names = [f"embeds.{place}" for place in range(len(prompts))]
    if set(tensors) != set(names):
        what = f"has {len(tensors)} tensors for {len(prompts)} prompts"
        raise InputError(what, where=where, expected=f"embeds.0 to {names[-1]}")
    for name in names:
        if tensors[name].dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"{name} is {tensors[name].dtype}", where=where, expected="F32, F16 or BF16")
    arrays = read_arrays(path)
    return Embeds(tuple(prompts), tuple(arrays[name].astype(np.float32, copy=False) for name in names), where)


def write_embeds(
    path: Path, prompts: Sequence[str], arrays: Sequence[npt.NDArray[Any]], model_text: Mapping[str, Any]
) -> None:
    """Write a file of text embeddings, under a temporary name until it is whole.

    Args:
        path: the file.
        prompts: at least one.
        arrays: for each prompt (tokens, text_width), without padding; stored as float32.
        model_text: what made them, for the metadata: `encoder`, `text_length`, ...

    Raises InputError for arrays that are not finite, not one a prompt, or of different widths, and where
    the file cannot be written.
    """
    stored = tuple(np.asarray(array, np.float32) for array in arrays)
    embeds = Embeds(tuple(prompts), stored, str(path))
    made = {name: str(item) for name, item in model_text.items()}
    metadata = {"schema": SCHEMA, "prompts": json.dumps(list(prompts)), **made}
    planned = {f"embeds.{place}": ("F32", array.shape) for place, array in enumerate(embeds.arrays)}
    with new_tensors(path, planned, metadata) as writer:
        for name, array in zip(planned, embeds.arrays, strict=True):
            writer.write(name, array)


def _short(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= 40 else text[:37] + "...")
