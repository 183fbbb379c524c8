"""`forcingkv analyze queries`: statistics of a model's queries, for policies that score tokens by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import MOST, AsJson, emit, must_end, need, progress_bar, say
from forcingkv.commands.models import (
    Checkpoint,
    Embeds,
    Key,
    Loras,
    Model,
    NoPresetLora,
    RandomWeights,
    Resolution,
    Threads,
    text_inputs,
    weights_for,
)
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.prompts import read_prompts


def queries(
    model: Model,
    out: Annotated[Path, Option(help="File for the statistics (.safetensors).")],
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Loras = None,
    no_preset_lora: NoPresetLora = False,
    random_weights: RandomWeights = False,
    resolution: Resolution = None,
    prompts: Annotated[Path | None, Option(help="Text file, one prompt a line.")] = None,
    embeds: Embeds = None,
    samples: Annotated[int, Option(min=1, max=MOST, help="Videos to measure.")] = 4,
    seed: Annotated[int, Option(min=0, help="Seed of the first video.")] = 0,
    chunks: Annotated[int | None, Option(min=1, max=MOST, help="Chunks a video.")] = None,
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1, mps or xpu; default: cuda if there is one.")
    ] = None,
    dtype: Annotated[str, Option(help="What to compute in: float32 or bfloat16.")] = "float32",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure where each head's queries point before rotation, on average over all passes of some videos.

    Policies that score tokens by such statistics (triattention) are exported with the file.

    Example: forcingkv analyze queries --model demo --out queries.safetensors
    """
    need("analyze", "torch")
    must_end(out, ".safetensors")
    import torch

    from forcingkv.analyze.recording import RecordedDtype
    from forcingkv.analyze.run import choose_device, recording_plan, video_length
    from forcingkv.models.checkpoint import build_model
    from forcingkv.models.presets import load_spec
    from forcingkv.models.query_statistics import measure_statistics
    from forcingkv.models.torch_threads import use_threads
    from forcingkv.runtime.backends.torch_device import faults

    spec = load_spec(model)
    plan, length = recording_plan(spec, resolution, "full", None), video_length(spec, chunks)
    kind = getattr(torch, one_of(RecordedDtype, dtype, "dtype"))
    placed = {"dtype": kind, "device": choose_device(device)}
    texts = text_inputs(spec, read_prompts(prompts) if prompts else None, embeds)
    weights = weights_for(spec, checkpoint, key, lora, no_preset_lora, random_weights)
    use_threads(threads)
    with faults(f"measuring queries of {spec.name}"), progress_bar() as shown, torch.inference_mode():
        built = build_model(spec, weights, **placed)
        given = [torch.tensor(texts[n % len(texts)], **placed) for n in range(samples)]
        task = shown.add_task("measuring (chunks)", total=samples * length)
        found = measure_statistics(
            built, plan, given, length, seed, lambda done: shown.update(task, completed=done)
        )
    found.write(out)
    told = {"out": str(out), "model": spec.name, "source": found.source, "digest": found.digest}
    if as_json:
        emit(told)
    else:
        say(f"{out}: statistics of queries, {found.source}")
