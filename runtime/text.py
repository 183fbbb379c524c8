"""Prompts as the model's input: words, or text embeddings made ahead of time.

The text encoder of a public model has billions of parameters and needs torch; the runtime needs its output
only. A file of embeddings is safetensors: `embeds.0`, `embeds.1`, ... of (tokens, text_width), without
padding, in the order of the prompts in the metadata. The metadata may also hold the prompts as the encoder
saw them (`cleaned`) and how many tokens each has before it is cut (`tokens`).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.prompts import clean_prompt, plain_form, shortened
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import new_tensors, read_arrays, read_header

SCHEMA = "forcingkv.embeds/1"
HINT = "Make the file with: forcingkv encode --prompts prompts.txt --out embeds.safetensors"

SHOWN = 5
"""Prompts of a file that a message lists."""
SEVERAL = -1
"""In place of a prompt's place in a file that gives several, of which none is meant more than another."""
COMPARED = 300
"""Characters of a prompt that are compared when the nearest ones are looked for."""

T = TypeVar("T")
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextInput:
    """Text embeddings, with the words that they stand for: saved states and videos then say these."""

    text: str
    array: Array
    """(1, text_length, text_width)."""


Prompt: TypeAlias = str | Array | TextInput
"""Words, or text embeddings (1, text_length, text_width) for models whose text encoder does not live here."""


def prompt_input(spec: ModelSpec, prompt: Prompt) -> Array:
    """The model's input (1, text_length, text_width) for a prompt.

    Raises InputError for words that the model does not know or cannot take, and for embeddings of another
    shape or with values that are not finite.
    """
    if isinstance(prompt, str):
        return encode_words(spec, prompt)
    if isinstance(prompt, TextInput):
        prompt = prompt.array
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
    cleaned: tuple[str, ...] = ()
    """The prompts as the encoder saw them; empty where the file does not say."""
    tokens: tuple[int, ...] = ()
    """Tokens of each prompt before it was cut to what the model takes; empty where the file does not say."""

    def __post_init__(self) -> None:
        prompts, arrays = self.prompts, self.arrays
        if not prompts or len(prompts) != len(arrays):
            what = f"has {len(arrays)} embeddings for {len(prompts)} prompts"
            raise InputError(what, where=self.where, expected="one for each")
        for name, other in (("cleaned prompts", self.cleaned), ("counts of tokens", self.tokens)):
            if other and len(other) != len(prompts):
                what = f"has {len(other)} {name} for {len(prompts)} prompts"
                raise InputError(what, where=self.where, expected="one for each, or none")
        for place, (prompt, array) in enumerate(zip(prompts, arrays, strict=True)):
            if array.ndim != 2:
                fault = f"{array.ndim} dimensions"
            elif array.shape[1] != arrays[0].shape[1]:
                fault = f"the width {array.shape[1]}"
            elif not np.isfinite(array).all():
                fault = "values that are not finite"
            elif self.tokens and self.tokens[place] < len(array):
                fault = f"{len(array)} tokens, and its prompt {self.tokens[place]}"
            else:
                continue
            what = f"the embedding of {shortened(prompt)} has {fault}"
            expected = "finite values (tokens, text_width), all of one width"
            raise InputError(what, where=self.where, expected=expected)

    def place(self, prompt: str | None) -> int:
        """The place of a prompt (None: the only one) in the file.

        A prompt is found as it stood in the prompt file, or by what the encoder sees of it: entities, white
        space, composed letters and quotes need not be the same. Raises InputError, naming those that are
        nearest, for one that is not there, and for None where there are several.
        """
        if prompt is None:
            if len(self.prompts) > 1:
                what = f"has {len(self.prompts)} prompts, and none was asked for"
                raise InputError(what, where=self.where, expected=f"one of {self._known()}")
            return 0
        # From the strictest to the one that needs ftfy: all of them say what the encoder would have seen.
        forms: list[Callable[[str], str]] = [_stripped, plain_form]
        if importlib.util.find_spec("ftfy"):
            forms.append(clean_prompt)
        for form in forms:
            place = self._places(form).get(form(prompt))
            if place == SEVERAL:
                what = f"has several embeddings of {shortened(prompt)}, which differ"
                raise InputError(what, where=self.where, expected="one for each prompt", hint=HINT)
            if place is not None:
                return place
        raise self._not_there(prompt)

    def _places(self, form: Callable[[str], str]) -> dict[str, int]:
        """Where each prompt stands by a form of it, or SEVERAL; what is cleaned already stays as it is."""
        if form not in self._tables:
            forms = (*map(form, self.prompts), *self.cleaned)
            table: dict[str, int] = {}
            for number, text in enumerate(forms):
                place = number % len(self.prompts)
                first = table.setdefault(text, place)
                if first != SEVERAL and not np.array_equal(self.arrays[first], self.arrays[place]):
                    table[text] = SEVERAL
            self._tables[form] = table
        return self._tables[form]

    @cached_property
    def _tables(self) -> dict[Callable[[str], str], dict[str, int]]:
        return {}

    def _known(self, first: Sequence[str] = ()) -> str:
        """A few of the prompts, for a message."""
        several = list(dict.fromkeys((*first, *self.prompts)))
        more = f" and {len(several) - SHOWN} more" if len(several) > SHOWN else ""
        return ", ".join(map(shortened, several[:SHOWN])) + more

    def _not_there(self, prompt: str) -> InputError:
        """The error for a prompt that is not in the file."""
        heads = {plain_form(text)[:COMPARED]: text for text in reversed(self.prompts)}
        near = [heads[found] for found in difflib.get_close_matches(plain_form(prompt)[:COMPARED], heads, 3)]
        what = f"has no embedding of {shortened(prompt)}"
        nearest = f"Nearest: {', '.join(shortened(text, 100) for text in near)}. " if near else ""
        return InputError(what, where=self.where, expected=f"one of {self._known(near)}", hint=nearest + HINT)

    def cut(self, prompt: str | None) -> int:
        """Tokens at the end of a prompt (None: the only one) that its embedding leaves out; 0 where the file
        does not say. Raises InputError as `place` does."""
        place = self.place(prompt)
        return self.tokens[place] - len(self.arrays[place]) if self.tokens else 0

    def get(self, prompt: str | None, spec: ModelSpec) -> Array:
        """The embedding of a prompt (None: the only one) as the model takes it, zero-padded.

        Returns (1, text_length, text_width). Raises InputError for a prompt that is not in the file, for
        None where there are several, and for an embedding of another width or with too many tokens.
        """
        place = self.place(prompt)
        wanted = self.prompts[place]
        array = self.arrays[place]
        tokens, width = array.shape
        if width != spec.text_width:
            what, expected = f"has embeddings of width {width}", f"{spec.text_width}, as {spec.name} takes"
            hint = "Encode the prompts with the text encoder of this model."
            raise InputError(what, where=self.where, expected=expected, hint=hint)
        if tokens > spec.text_length:
            expected = f"at most {spec.text_length}, as {spec.name} takes"
            raise InputError(
                f"has {tokens} tokens for {shortened(wanted)}", where=self.where, expected=expected
            )
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
    prompts, cleaned = (_listed(metadata, name, str) for name in ("prompts", "cleaned"))
    if not prompts:
        raise InputError("its metadata has no list of prompts", where=where, hint=HINT)
    tokens = _listed(metadata, "tokens", int)
    if cleaned is None or tokens is None:
        raise InputError(
            "its metadata has a faulty list of cleaned prompts or tokens", where=where, hint=HINT
        )
    names = [f"embeds.{place}" for place in range(len(prompts))]
    if set(tensors) != set(names):
        what = f"has {len(tensors)} tensors for {len(prompts)} prompts"
        raise InputError(what, where=where, expected=f"embeds.0 to {names[-1]}")
    for name in names:
        if tensors[name].dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"{name} is {tensors[name].dtype}", where=where, expected="F32, F16 or BF16")
    stored = read_arrays(path)
    arrays = tuple(stored[name].astype(np.float32, copy=False) for name in names)
    return Embeds(tuple(prompts), arrays, where, tuple(cleaned), tuple(tokens))


def _stripped(prompt: str) -> str:
    return prompt.strip()


def _listed(metadata: Mapping[str, str], name: str, kind: type[T]) -> list[T] | None:
    """A list in a file's metadata; empty where there is none, None where it is of something else."""
    try:
        found = parse_json(metadata.get(name, "[]"), name)
    except InputError:
        return None
    return found if isinstance(found, list) and all(type(item) is kind for item in found) else None


def embeds_metadata(
    prompts: Sequence[str], cleaned: Sequence[str], tokens: Sequence[int], model_text: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a file of embeddings: what `Embeds` says of its prompts, and what made them."""
    lists = {"prompts": list(prompts), "cleaned": list(cleaned), "tokens": list(tokens)}
    said = {name: json.dumps(items) for name, items in lists.items() if items}
    return {"schema": SCHEMA, **said, **{name: str(item) for name, item in model_text.items()}}


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
    metadata = embeds_metadata(prompts, (), (), model_text)
    planned = {f"embeds.{place}": ("F32", array.shape) for place, array in enumerate(embeds.arrays)}
    with new_tensors(path, planned, metadata) as writer:
        for name, array in zip(planned, embeds.arrays, strict=True):
            writer.write(name, array)
