"""What pixel decoders hold: `decoders.toml`, read into `DecoderCosts`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data


@dataclass(frozen=True)
class DecoderCosts:
    """The sizes of a decoder; see the file for what they mean and where they come from."""

    parameters: int
    cached: int
    activation_bytes: int | None = None


@cache
def _file() -> dict[str, DecoderCosts]:
    text = resources.files(__package__).joinpath("decoders.toml").read_text(encoding="utf-8")
    return {
        kind: from_data(DecoderCosts, entry, f"decoders.toml: {kind}")
        for kind, entry in tomllib.loads(text).items()
    }


def decoder_costs(kind: str) -> DecoderCosts:
    """The sizes of a decoder. Raises InputError naming the kinds there are."""
    if kind not in _file():
        raise InputError(
            f"there is no decoder {kind!r}", where="decoder", expected=f"one of {', '.join(_file())}"
        )
    return _file()[kind]
