"""Prompts through the UMT5 encoder of Wan, by transformers: embeddings made ahead of time.

What can be known without the encoder is asked first: its files (`open_encoder`), and how many tokens each
prompt has (`PromptTokenizer`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.headmaps.files import there
from forcingkv.headmaps.reading import read_json
from forcingkv.models.encoder_places import EncoderPlace, find_encoder
from forcingkv.models.umt5 import Umt5Files, digest, open_umt5
from forcingkv.runtime.prompts import PromptLine, clean_prompt, control_characters, is_empty, shortened

TOKENIZER_CONFIG = "tokenizer_config.json"
NAMED_FILES = ("vocab_file", "tokenizer_file", "merges_file")
"""Entries of a tokenizer's configuration that stand for files of its words."""
TOKEN_FILES = "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json"
"""Files that describe tokens of a tokenizer."""
TOKEN_ENTRIES = {"__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"}
"""What a token is described by. Of others the tokenizers library prints the name, whatever is in it."""

BROKEN_TRANSFORMERS = "5.0."
"""Releases of transformers that load UMT5 without its embeddings, silently: what they encode is noise. The
encoder is filled and checked here, but they are refused all the same."""


class PromptCutWarning(UserWarning):
    """A prompt has more tokens than the model takes, and the last ones are not used."""


class Tokens(NamedTuple):
    """A prompt as the encoder reads it."""

    cleaned: str
    """The prompt after cleaning."""
    ids: list[int]
    """Its tokens, at most as many as the model takes, the mark of the end among them."""
    whole: int
    """How many tokens it has before it is cut."""

    @property
    def unused(self) -> int:
        """Tokens at the end that are not used."""
        return self.whole - len(self.ids)


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt of a file that can be encoded."""

    line: PromptLine
    tokens: Tokens

    def notes(self) -> list[str]:
        """What happens to the prompt that is not plain from the file: sentences for the user."""
        said, found, tokens = [], control_characters(self.line.text), self.tokens
        if found:
            sees = shortened(tokens.cleaned, 60)
            said.append(f"control characters ({', '.join(found)}) are cleaned away: the encoder sees {sees}")
        if tokens.unused:
            said.append(f"{tokens.whole:,} tokens, the last {tokens.unused:,} are not used")
        return said


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizer of a text encoder."""

    tokenizer: Any
    """That of transformers."""

    def tokens(self, prompt: str, length: int) -> Tokens:
        """A prompt cleaned, and its tokens, at most `length` of them.

        Raises InputError for a prompt of which cleaning leaves nothing, or that is not text, or that the
        tokenizer fails at.
        """
        cleaned = clean_prompt(prompt)
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError("the prompt has half a character (a lone surrogate)", where="prompt")
        if is_empty(cleaned):
            raise InputError("the prompt is empty", where="prompt", expected="some words")
        try:
            with _panics_are_errors():
                whole = self.tokenizer(cleaned, verbose=False).input_ids
                cut = self.tokenizer(cleaned, max_length=length, truncation=True).input_ids
        except Exception as error:  # whatever a wrong tokenizer leads the library to
            raise InputError(f"cannot split it ({first_line(error)})", where="the tokenizer") from error
        return Tokens(cleaned, list(map(int, cut)), len(whole))

    def check_fits(self, files: Umt5Files) -> None:
        """Raise InputError for a tokenizer that is another encoder's, as far as the number of tokens says.

        An encoder has room for as many tokens as its tokenizer has, rounded up; T5's has an eighth of UMT5's.
        """
        have, room = len(self.tokenizer), int(files.config.vocab_size)
        if not room / 2 < have <= room:
            what = f"has {have:,} tokens, and the encoder {files.name} {room:,}: it belongs to another"
            hint = "Name the encoder's own: --tokenizer google/umt5-xxl"
            raise InputError(what, where="the tokenizer", hint=hint)

    def check(self, lines: Sequence[PromptLine], length: int) -> list[CheckedPrompt]:
        """The prompts that are different after cleaning, each at its first line, with their tokens.

        Raises InputError, naming the line, for one that cannot be encoded.
        """
        checked: dict[str, CheckedPrompt] = {}
        for line in lines:
            with line.named():
                tokens = self.tokens(line.text, length)
            checked.setdefault(tokens.cleaned, CheckedPrompt(line, tokens))
        return list(checked.values())


def tokens_digest(checked: Sequence[CheckedPrompt]) -> str:
    """SHA-256 of the tokens of all prompts."""
    return hashlib.sha256(repr([prompt.tokens.ids for prompt in checked]).encode()).hexdigest()


@dataclass(frozen=True)
class PromptEncoder:
    """A text encoder with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    """Where it came from, for the record."""

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.d_model)

    @cached_property
    def digest(self) -> str:
        """What tells this encoder's weights from others (`umt5.digest`)."""
        return digest(self.model)

    def encode(self, prompt: str, length: int) -> npt.NDArray[np.float32]:
        """The embedding of a prompt: (tokens, width), at most `length` tokens, without padding.

        Wan pads with zeros after encoding and masks padding while encoding, so what is not there
        need not be computed. Warns with PromptCutWarning where tokens are left out. Raises InputError for a
        prompt that is empty, and as `encode_tokens` does.
        """
        tokens = PromptTokenizer(self.tokenizer).tokens(prompt, length)
        if tokens.unused:
            what = f"{shortened(prompt)} has {tokens.whole:,} tokens, the last {tokens.unused:,} are not used"
            warnings.warn(what, PromptCutWarning, stacklevel=2)
        return self.encode_tokens(tokens.ids)

    @torch.no_grad()
    def encode_tokens(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The embedding of a prompt's tokens: (tokens, width).

        Raises InputError for tokens that the encoder does not have, and where its numbers overflow.
        """
        vocabulary = int(self.model.config.vocab_size)
        if max(ids) >= vocabulary:
            what = f"the tokenizer gives the token {max(ids)}, and the encoder has {vocabulary}"
            raise InputError(what, where=self.name, hint="Name the encoder's own with --tokenizer.")
        given = torch.tensor([list(ids)])
        try:
            states = self.model(given, attention_mask=torch.ones_like(given)).last_hidden_state
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            what = f"cannot be run as its configuration describes it ({first_line(error)})"
            raise InputError(what, where=self.name) from error
        embedding: npt.NDArray[np.float32] = states[0].float().numpy()
        if not np.isfinite(embedding).all():
            hint = "Take the encoder in bfloat16."
            raise InputError("gives an embedding that is not finite", where=self.name, hint=hint)
        return embedding


def load_prompt_encoder(place: str | Path, tokenizer: str | Path | None = None) -> PromptEncoder:
    """Load a UMT5 encoder, in the dtype that most of its file has (8-bit floats: in bfloat16).

    Args:
        place: a folder of Wan (with `models_t5_umt5-xxl-enc-bf16.pth`), a single file in the naming of Wan or
            of transformers, a folder of diffusers (with `text_encoder/`) or of transformers, or a hub id.
        tokenizer: its folder or hub id; None: the one beside the encoder (`google/umt5-xxl/` in
            Wan's folder, `tokenizer/` in that of diffusers, the folder itself in that of transformers).

    Raises InputError where encoder or tokenizer cannot be found or read, a tensor does not fit, or this
    release of transformers is known to load UMT5 wrongly.
    """
    found = find_encoder(place)
    files = open_encoder(found)
    words = load_tokenizer(found, tokenizer)
    words.check_fits(files)
    return PromptEncoder(files.load(), words.tokenizer, files.name)


def open_encoder(place: EncoderPlace) -> Umt5Files:
    """Open an encoder without loading it. Raises InputError as `load_prompt_encoder` does."""
    release = importlib.metadata.version("transformers")
    if release.startswith(BROKEN_TRANSFORMERS):
        what = f"is release {release}, which loads UMT5 with wrong embeddings"
        expected, hint = "4.51 or later, but not 5.0", "Install another: pip install 'transformers>=5.1'"
        raise InputError(what, where="transformers", expected=expected, hint=hint)
    return open_umt5(place.weights, place.name)


def _refuse_other_files(folder: Path) -> None:
    """Raise InputError for a configuration of a tokenizer that names the files of its words itself.

    transformers would read those, wherever they are, in place of the ones in the folder.
    """
    path = folder / TOKENIZER_CONFIG
    data = _table_of(path)
    named = [name for name in data if name in NAMED_FILES and data[name]]
    if named:
        what, expected = f"names a file as its {named[0]}", "none: the files of the folder are taken"
        raise InputError(what, where=str(path), expected=expected, hint="Take the entry out.")


def _refuse_unknown_entries(folder: Path) -> None:
    """Raise InputError for tokens that are described by other entries than tokens have."""
    for name in TOKEN_FILES:
        data = _table_of(folder / name)
        added, decoded = data.get("added_tokens"), data.get("added_tokens_decoder")
        tokens = [
            value
            for entry, value in data.items()
            if entry.endswith("_token") or name == TOKEN_FILES[2] or _is_token(value)
        ]
        tokens += added if isinstance(added, list) else ()
        tokens += decoded.values() if isinstance(decoded, dict) else ()
        for token in tokens:
            others = set(token) - TOKEN_ENTRIES if isinstance(token, dict) else ()
            if others:
                what, expected = f"describes a token by {min(others)!r}", ", ".join(sorted(TOKEN_ENTRIES))
                raise InputError(
                    what, where=str(folder / name), expected=expected, hint="Take the entry out."
                )


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and not {"__type", "content"}.isdisjoint(value)


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """What the tokenizers library raises where it gives up is no Exception, which nobody would catch."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(str(error) or type(error).__name__) from error


def _table_of(path: Path) -> dict[str, Any]:
    data = read_json(path) if there(path) and path.is_file() else None
    return data if isinstance(data, dict) else {}


def load_tokenizer(place: EncoderPlace, named: str | Path | None = None) -> PromptTokenizer:
    """Load the tokenizer that is named, or else the one beside an encoder.

    Raises InputError where there is none, or it cannot be read.
    """
    import transformers

    words = str(named) if named else str(place.tokenizer())
    _refuse_other_files(Path(words))
    _refuse_unknown_entries(Path(words))
    try:
        # No code of strangers is run, and nobody is asked whether it may be.
        with _panics_are_errors():
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, trust_remote_code=False)
            for settings in ({"verbose": False}, {"max_length": 1, "truncation": True}):
                tokenizer("a", **settings)  # what is wrong with its configuration shows only now
        return PromptTokenizer(tokenizer)
    except Exception as error:  # transformers and tokenizers raise whatever a wrong file leads them to
        what = f"cannot be read by transformers' AutoTokenizer ({first_line(error)})"
        hint = "Name the folder with --text-encoder and, if it lies elsewhere, --tokenizer."
        raise InputError(what, where=words, hint=hint) from error
