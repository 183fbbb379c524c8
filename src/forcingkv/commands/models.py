"""Options that several commands have, and the weights and texts that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
from typer import Option

from forcingkv.commands.console import console, default_prompts, say
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.backends import BACKENDS
from forcingkv.runtime.backends.ort_providers import PROVIDERS
from forcingkv.runtime.prompts import PromptLine, shortened
from forcingkv.runtime.schedule import FilledBy
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.text import TextInput, encode_words, read_embeds
from forcingkv.runtime.threads import chosen_threads

if TYPE_CHECKING:
    from forcingkv.models.checkpoint import Weights


Backend: TypeAlias = Annotated[str, Option(help=f"What runs the graphs: {', '.join(BACKENDS)}.")]
BackendOrOwn: TypeAlias = Annotated[
    str | None,
    Option(
        help=f"What runs it: {', '.join(BACKENDS)}; default: onnxruntime, or torch where that alone can or"
        " --device, --dtype or --compile ask for it, without --provider."
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    Option(
        help="Where to run: cpu, cuda, cuda:1, mps or xpu, with --backend torch; a GPU of TensorRT or of a"
        " provider of ONNX Runtime."
    ),
]
ComputeDtype: TypeAlias = Annotated[
    Dtype | None,
    Option(
        "--dtype",
        help="torch: float32, bfloat16 or float16; default: what the bundle was made for.",
    ),
]
Provider: TypeAlias = Annotated[
    str | None,
    Option(
        help=f"ONNX Runtime: what runs the graphs: {', '.join(PROVIDERS)}; default: cuda where it was built"
        " with it, else cpu."
    ),
]
CudaGraphs: TypeAlias = Annotated[
    bool, Option("--cuda-graphs", help="On a GPU of NVIDIA: capture passes and replay them.")
]
Compiled: TypeAlias = Annotated[
    bool, Option("--compile", help="torch: compile the model first, which takes a while.")
]
Model: TypeAlias = Annotated[str, Option(help="Preset or spec file (.toml).")]
Checkpoint: TypeAlias = Annotated[
    str | None,
    Option(help="Weights: a file, a folder or a hub id (owner/name@revision:path); default: those shipped."),
]
Key: TypeAlias = Annotated[
    str | None,
    Option(
        help="Entry of a .pt file: generator_ema, generator, ...; default: the preset's, or the first there."
    ),
]
Loras: TypeAlias = Annotated[
    list[str] | None,
    Option(
        "--lora",
        metavar="FILE[:STRENGTH]",
        help="LoRA to merge: a file, a folder or a hub id (owner/name:path), then its strength if not 1;"
        " may be given again.",
    ),
]
NoPresetLora: TypeAlias = Annotated[
    bool, Option("--no-preset-lora", help="Leave out the LoRA that the model's public weights come with.")
]
RandomWeights: TypeAlias = Annotated[
    bool, Option("--random-weights", help="Draw the weights at random, to try things out.")
]
Layers: TypeAlias = Annotated[
    int | None, Option(min=1, help="With --random-weights: so many typical layers, to try things out.")
]
Embeds: TypeAlias = Annotated[Path | None, Option(help="Text embeddings that `encode` wrote.")]
ExpectDigest: TypeAlias = Annotated[
    str | None,
    Option(metavar="SHA256", help="Refuse the bundle unless it has this digest, which `inspect` prints."),
]
ExpectDigests: TypeAlias = Annotated[
    list[str] | None,
    Option(metavar="SHA256", help="As for `generate`: one for each --bundle, in their order."),
]


def _usable_threads(asked: int | None) -> int | None:
    chosen_threads(asked)
    return asked


Threads: TypeAlias = Annotated[
    int | None,
    Option(
        min=1, callback=_usable_threads, help="CPU threads; default: one a core that this process may use."
    ),
]
CacheFilledBy: TypeAlias = Annotated[
    str | None,
    Option(
        "--context",
        help="Whose keys and values of a chunk the cache takes: clean, of one more pass over what was made;"
        " last, of its last denoising pass, and that is one pass fewer; default: the model's.",
    ),
]
Resolution: TypeAlias = Annotated[str | None, Option(help="WIDTHxHEIGHT of frames, or a name, such as 480p.")]


def with_context(spec: ModelSpec, context: str | None) -> ModelSpec:
    """The model with what `--context` says. Raises InputError for another word, and for a model whose cache
    no chunk fills."""
    return spec.filled_by(one_of(FilledBy, context, "context") if context else None)


def check_layers(layers: int | None, random_weights: bool) -> None:
    """Raise InputError for a number of layers of a model whose weights are its own."""
    if layers and not random_weights:
        raise InputError(
            "stand for a model whose weights are random",
            where="--layers",
            expected="--random-weights beside it",
        )


def weights_for(
    spec: ModelSpec,
    checkpoint: str | None,
    key: str | None,
    loras: Sequence[str] | None,
    no_preset_lora: bool,
    random: bool,
) -> Weights:
    """The weights that the options name; what was chosen of them and merged is said on standard error.

    Raises InputError for options that exclude each other, and as `load_weights` does.
    """
    from forcingkv.models.checkpoint import load_weights, random_weights

    if not random:
        weights = load_weights(
            spec, checkpoint, key=key, lora=loras, preset_lora=not no_preset_lora, progress=_say
        )
        for sentence in weights.taken:
            _say(f"weights: {sentence}")
        for record in weights.loras:
            _say(f"LoRA {record.told}")
        return weights
    if checkpoint or key or loras or no_preset_lora:
        raise InputError("use either --random-weights or --checkpoint, --key and --lora, not both")
    return random_weights(spec)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def text_input(
    spec: ModelSpec, prompt: str | None, embeds: Path | None, *, random: bool = False
) -> TextInput:
    """The model's input for a prompt, with its words; from a file of embeddings if given.

    `random` says that a model which takes embeddings, and is given none, takes random ones: of each prompt
    its own. Says on standard error where it does, and where the embedding leaves out the end of the prompt.
    Raises InputError where neither says what to show, or the model needs embeddings.
    """
    if embeds:
        known = read_embeds(embeds)
        said, text = known.prompts[known.place(prompt)], known.get(prompt, spec)
        if unused := known.cut(prompt):
            say(f"note: the last {unused:,} tokens of {shortened(said)} are not used", error=True)
        return TextInput(said, text)
    if random and spec.text.kind != "words":
        say("note: random numbers stand for the embedding of the prompt: none was given", error=True)
        drawn = np.random.default_rng([*(prompt or "").encode()])
        shape = 1, spec.text_length, spec.text_width
        return TextInput(prompt or "", drawn.standard_normal(shape, dtype=np.float32))
    if not (prompt or "").strip():
        raise InputError("the prompt is empty", where="prompt", expected="some words")
    return TextInput(prompt or "", encode_words(spec, prompt or ""))


def text_inputs(
    spec: ModelSpec, prompts: Sequence[PromptLine] | Sequence[str] | None, embeds: Path | None
) -> list[npt.NDArray[np.float32]]:
    """The model's inputs for several prompts; None: all of the file of embeddings, or those shipped.

    Says on standard error how many of the embeddings leave out the end of their prompt. Raises InputError,
    naming the line of a prompt that comes from a file, where one cannot be used.
    """
    known = read_embeds(embeds) if embeds else None
    texts, cut = [], 0
    for prompt in prompts or (known.prompts if known else default_prompts(spec.name)):
        line = prompt if isinstance(prompt, PromptLine) else None
        with line.named() if line else nullcontext():
            text = line.text if line else str(prompt)
            texts.append(known.get(text, spec) if known else encode_words(spec, text))
            cut += bool(known and known.cut(text))
    if cut:
        say(f"note: {cut} of {len(texts)} prompts are cut to {spec.text_length} tokens", error=True)
    return texts
