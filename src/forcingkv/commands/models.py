"""Options that several commands have, and the weights and texts that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
from typer import Option

from forcingkv.commands.console import default_prompts
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import BACKENDS
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words, read_embeds

if TYPE_CHECKING:
    from forcingkv.models.checkpoint import Weights


Backend: TypeAlias = Annotated[str, Option(help=f"What runs the graphs: {', '.join(BACKENDS)}.")]
Model: TypeAlias = Annotated[str, Option(help="Preset or spec file (.toml).")]
Checkpoint: TypeAlias = Annotated[
    str | None, Option(help="Weights: a file, a folder or a hub id; default: those shipped.")
]
Key: TypeAlias = Annotated[
    str | None, Option(help="Entry of a .pt file: generator_ema, generator, ...; default: the first there.")
]
Lora: TypeAlias = Annotated[
    Path | None, Option(help="LoRA (PEFT) to merge; default: the one that comes with a folder or hub id.")
]
RandomWeights: TypeAlias = Annotated[
    bool, Option("--random-weights", help="Draw the weights at random, to try things out.")
]
Embeds: TypeAlias = Annotated[Path | None, Option(help="Text embeddings that `encode` wrote.")]
Threads: TypeAlias = Annotated[int | None, Option(min=1, help="CPU threads.")]
Resolution: TypeAlias = Annotated[str | None, Option(help="WIDTHxHEIGHT of frames, or a name, such as 480p.")]


def weights_for(
    spec: ModelSpec, checkpoint: str | None, key: str | None, lora: Path | None, random: bool
) -> Weights:
    """The weights that the options name. Raises InputError for options that exclude each other."""
    from forcingkv.models.checkpoint import load_weights, random_weights

    if not random:
        return load_weights(spec, checkpoint, key=key, lora=lora)
    if checkpoint or key or lora:
        raise InputError("use either --random-weights or --checkpoint, --key and --lora, not both")
    return random_weights(spec)


def text_input(spec: ModelSpec, prompt: str | None, embeds: Path | None) -> npt.NDArray[np.float32]:
    """The model's input (1, text_length, text_width) for a prompt, from a file of embeddings if given.

    Raises InputError where neither says what to show, or the model needs embeddings.
    """
    if embeds:
        return read_embeds(embeds).get(prompt, spec)
    if not (prompt or "").strip():
        raise InputError("the prompt is empty", where="prompt", expected="some words")
    return encode_words(spec, prompt or "")


def text_inputs(
    spec: ModelSpec, prompts: Sequence[str] | None, embeds: Path | None
) -> list[npt.NDArray[np.float32]]:
    """The model's inputs for several prompts; None: all of the file of embeddings, or those shipped."""
    if embeds:
        known = read_embeds(embeds)
        return [known.get(prompt, spec) for prompt in prompts or known.prompts]
    return [encode_words(spec, prompt) for prompt in prompts or default_prompts(spec.name)]
