"""Every format that is read: what of it is spoilt, how a stranger would mend it, and what reads it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.mutations import (
    Spoil,
    spoil_bytes,
    spoil_json,
    spoil_parquet,
    spoil_pickle,
    spoil_table,
    spoil_tensors,
    spoil_toml,
    spoil_zip,
)

FEW = 60
"""Numbers of an array that stand for it when results are compared."""


@dataclass(frozen=True)
class Format:
    """A format."""

    name: str
    seed: str
    """The folder of its whole files."""
    files: tuple[str, ...]
    """Those that are spoilt, one of them each time."""
    spoil: Spoil
    read: Callable[[Path], object]
    """Reads what is in the folder as a user would, and gives what it found."""
    mend: Callable[[Path, str], None] = lambda folder, file: None
    """Makes digests fit again, as a stranger would; nothing where there are none."""
    lean: bool = True
    """Whether it is read without torch."""
    weight: float = 1.0
    """How often it is taken, against the others."""

    def prepare(self, rng: Random, folder: Path) -> None:
        """Spoil a file of the folder."""
        file = rng.choice(self.files)
        path = folder / file
        content = path.read_bytes()
        path.unlink()  # a link to the whole file
        path.write_bytes(self.spoil(rng, content))
        if rng.random() < 0.9:
            self.mend(folder, file)


def summed(value: Any) -> Any:
    """Arrays and tensors as a digest, within tables and lists."""
    if hasattr(value, "numpy"):
        value = value.detach().float().numpy()
    if hasattr(value, "tobytes"):
        return value.dtype.name, value.shape, hashlib.sha256(value.tobytes()).hexdigest()[:16]
    if isinstance(value, dict):
        return {key: summed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [summed(item) for item in value]
    return value


def mend_bundle(folder: Path, file: str) -> None:
    """The manifest's digest of a file, and of a head map."""
    from forcingkv.headmaps import HeadMap, InputError

    path = folder / "manifest.json"
    if file == "manifest.json":
        return
    data = json.loads(path.read_text())
    content = (folder / file).read_bytes()
    data["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    if file == "headmap.json":
        try:
            data["headmap"] = HeadMap.read(folder / file).digest
        except (InputError, RecursionError):
            data["headmap"] = hashlib.sha256(content).hexdigest()
    path.unlink()
    path.write_text(json.dumps(data))


def mend_state(folder: Path, file: str) -> None:
    """The digest of a state's tensors."""
    path = folder / "saved" / "state.json"
    if file.endswith("state.json"):
        return
    data = json.loads(path.read_text())
    content = (folder / file).read_bytes()
    data["record"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.unlink()
    path.write_text(json.dumps(data))


def open_bundle(folder: Path) -> object:
    """What `inspect` shows."""
    from forcingkv.commands.console import say
    from forcingkv.commands.inspect import _footprints, _sections
    from forcingkv.runtime import Bundle

    bundle = Bundle.open(folder)
    for section in _sections(bundle):
        say(*section)
    return bundle.manifest, _footprints(bundle)


def run_bundle(folder: Path) -> object:
    """What `inspect` shows, and the first two chunks of a video."""
    from forcingkv.runtime import Session

    shown = open_bundle(folder)
    with Session.open(folder, threads=1) as session:
        text = "a b" if session.spec.text.kind == "words" else None
        video = session.generate(text, seed=3, chunks=2)
        return shown, [summed(chunk.frames) for chunk in video]


def restore(bundle: Path, folder: Path) -> object:
    """A state, and the chunk that follows it."""
    from forcingkv.runtime import Session

    with Session.open(bundle, threads=1) as session:
        video = session.restore(folder / "saved")
        return video.index, video.chunks, summed(next(video, None) and video.index)


def show_map(folder: Path, file: str) -> object:
    """What `headmap show` and `validate` show, and the map."""
    from forcingkv.commands.headmap import _summary, show, validate
    from forcingkv.headmaps import HeadMap, read_headmap

    headmap = read_headmap(folder / file)
    show(folder / file)
    validate(folder / file)
    assert HeadMap.from_json(json.loads(headmap.to_text())) == headmap, "written and read it is another"
    return _summary(headmap)


def plan_spec(folder: Path) -> object:
    """What `plan` says of a spec under every policy."""
    from forcingkv.commands.console import say
    from forcingkv.measure.planner.gpus import load_gpu
    from forcingkv.measure.planner.plan_tables import plan_lines
    from forcingkv.measure.planner.report import plan_report
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_policy, policy_names

    spec = load_spec("spec.toml")
    policies = [load_policy(name) for name in policy_names()]
    report = plan_report(spec, policies, [load_gpu("h200")], resolution=None, seconds=5.0, dtype="bfloat16")
    say(*plan_lines(report))
    return spec, report


def plan_policy(folder: Path) -> object:
    """A policy, applied to a model."""
    from forcingkv.commands.console import say
    from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
    from forcingkv.runtime.footprint import kv_parts
    from forcingkv.runtime.kv.plan import build_plan
    from forcingkv.runtime.kv.policies import load_policy
    from tests.conftest import small_spec

    policy, spec = load_policy("policy.toml"), small_spec()
    labels = list(policy.groups)
    rows = tuple(tuple(labels[(layer + head) % len(labels)] for head in range(3)) for layer in range(4))
    plan = build_plan(spec, spec.geometry(), policy, HeadMap(ModelIdentity("s", 4, 3), rows, Rule("given")))
    say(policy.name, policy.summary)
    return policy, plan.phases, plan.kv_bytes(), kv_parts(plan, "float32"), summed(plan.rows(0))


def prompts(folder: Path, file: str) -> object:
    """Prompts as they are cleaned."""
    from forcingkv.runtime.prompts import clean_prompt, plain_form, read_prompts

    lines = read_prompts(Path(file))
    return [(line.text, clean_prompt(line.text), plain_form(line.text)) for line in lines]


def embeddings(folder: Path) -> object:
    """Embeddings as a model takes them."""
    from forcingkv.runtime.text import read_embeds
    from tests.conftest import small_spec

    known, spec = read_embeds("embeds.safetensors"), small_spec()
    return known.prompts, [(known.cut(one), summed(known.get(one, spec))) for one in known.prompts]


def pictures(folder: Path) -> object:
    """A folder that pictures are written into again."""
    import numpy as np

    from forcingkv.runtime.video import open_writer

    with open_writer(".", fps=16) as writer:
        writer.write(np.zeros((1, 8, 8, 3), np.uint8))
    return sorted(path.name for path in folder.iterdir())


def video(folder: Path, file: str) -> object:
    """The frames of a video."""
    from forcingkv.runtime.video_reader import open_video

    with open_video(Path(file)) as (rate, frames):
        return rate, [summed(frame) for frame in frames]


def analysis(folder: Path) -> object:
    """What statistics come to."""
    from forcingkv.analyze import Labelling, analyze_statistics
    from forcingkv.analyze.storage import Storage

    Storage(folder).check_versions()
    found = analyze_statistics(folder, Labelling(rule="threshold", alpha=0.6))
    return found.headmap.to_text()


def weights(folder: Path, file: str, lora: str | None = None) -> object:
    """All tensors of a checkpoint."""
    from forcingkv.models.checkpoint import load_weights
    from tests.conftest import small_spec

    found = load_weights(small_spec(), file, lora=lora)
    return [(name, summed(found[name])) for name in found], found.loras


def encode(folder: Path) -> object:
    """The embedding of a prompt."""
    from forcingkv.models.text_encoder import load_prompt_encoder

    return summed(load_prompt_encoder(".").encode("a red kite", 12))


def vae(folder: Path) -> object:
    """A decoder."""
    from forcingkv.models.decoders import load_decoder

    return sorted(load_decoder("wan-vae", Path("vae")).state_dict())[:FEW]


def formats(seeds: Path) -> list[Format]:
    """All of them. `seeds`: where the whole files lie."""
    graphs = ("prompt.onnx", "step.onnx", "decode.onnx")
    csv, tsv = (functools.partial(spoil_table, separator=separator) for separator in ",\t")
    tokenizer = ("tokenizer/tokenizer.json",)
    tokenizer_config = ("tokenizer/tokenizer_config.json",)

    def of(name: str, seed: str, files: str | tuple[str, ...], spoil: Any, read: Any, **more: Any) -> Format:
        return Format(name, seed, (files,) if isinstance(files, str) else files, spoil, read, **more)

    bundle = seeds / "bundle"
    return [
        of("manifest", "bundle", "manifest.json", spoil_json, run_bundle, weight=3),
        of("graph", "bundle", graphs, spoil_bytes, run_bundle, mend=mend_bundle, weight=1.5),
        of("bundle-weights", "bundle", "weights.safetensors", spoil_tensors, run_bundle, mend=mend_bundle),
        of("bundle-map", "bundle", "headmap.json", spoil_json, open_bundle, mend=mend_bundle),
        of("state", "state", "saved/state.json", spoil_json, functools.partial(restore, bundle)),
        of(
            "state-tensors",
            "state",
            "saved/state-000002.safetensors",
            spoil_tensors,
            functools.partial(restore, bundle),
            mend=mend_state,
        ),
        of(
            "headmap",
            "headmap",
            "map.json",
            spoil_json,
            functools.partial(show_map, file="map.json"),
            weight=2,
        ),
        of(
            "forcingkv-map", "forcingkv", "map.json", spoil_json, functools.partial(show_map, file="map.json")
        ),
        of("pyramid-map", "pyramid", "map.csv", csv, functools.partial(show_map, file="map.csv")),
        of("duo-map", "duo", "map.tsv", tsv, functools.partial(show_map, file="map.tsv")),
        of("spec", "spec", "spec.toml", spoil_toml, plan_spec, weight=3),
        of("policy", "policy", "policy.toml", spoil_toml, plan_policy, weight=2),
        of(
            "prompts",
            "prompts-txt",
            "prompts.txt",
            spoil_bytes,
            functools.partial(prompts, file="prompts.txt"),
        ),
        of(
            "prompts-jsonl",
            "prompts-jsonl",
            "prompts.jsonl",
            lambda rng, content: b"\n".join(
                spoil_json(rng, line) if rng.random() < 0.7 else line for line in content.splitlines()
            ),
            functools.partial(prompts, file="prompts.jsonl"),
        ),
        of("embeds", "embeds", "embeds.safetensors", spoil_tensors, embeddings, weight=2),
        of("frames", "frames", "frames.json", spoil_json, pictures),
        of("png", "png", "picture.png", spoil_bytes, functools.partial(video, file="picture.png")),
        of("mp4", "mp4", "video.mp4", spoil_bytes, functools.partial(video, file="video.mp4"), weight=1.5),
        of("statistics", "stats", "sample-0001.parquet", spoil_parquet, analysis, lean=False, weight=1.5),
        of("versions", "stats", "versions.json", spoil_json, analysis, lean=False, weight=0.3),
        of(
            "checkpoint",
            "checkpoint",
            "model.safetensors",
            spoil_tensors,
            functools.partial(weights, file="model.safetensors"),
            lean=False,
        ),
        of(
            "shards",
            "shards",
            "a.safetensors",
            spoil_tensors,
            functools.partial(weights, file="."),
            lean=False,
            weight=0.5,
        ),
        of(
            "shard-index",
            "shards",
            "model.safetensors.index.json",
            spoil_json,
            functools.partial(weights, file="."),
            lean=False,
        ),
        of(
            "torch-zip",
            "torch-zip",
            "model.pt",
            spoil_zip,
            functools.partial(weights, file="model.pt"),
            lean=False,
            weight=2,
        ),
        of(
            "torch-old",
            "torch-old",
            "model.pt",
            spoil_pickle,
            functools.partial(weights, file="model.pt"),
            lean=False,
        ),
        of(
            "lora",
            "lora",
            "lora/adapter_model.safetensors",
            spoil_tensors,
            functools.partial(weights, file="base.safetensors", lora="lora"),
            lean=False,
        ),
        of(
            "lora-config",
            "lora-config",
            "lora/adapter_config.json",
            spoil_json,
            functools.partial(weights, file="base.safetensors", lora="lora"),
            lean=False,
        ),
        of(
            "encoder",
            "encoder",
            "text_encoder/model.safetensors",
            spoil_tensors,
            encode,
            lean=False,
            weight=0.7,
        ),
        of("encoder-config", "encoder-config", "text_encoder/config.json", spoil_json, encode, lean=False),
        of("tokenizer", "tokenizer", tokenizer, spoil_json, encode, lean=False),
        of("tokenizer-config", "tokenizer-config", tokenizer_config, spoil_json, encode, lean=False),
        of(
            "encoder-wan",
            "encoder-wan",
            "models_t5_umt5-xxl-enc-bf16.pth",
            spoil_zip,
            encode,
            lean=False,
            weight=0.7,
        ),
        of("vae-config", "vae-config", "vae/config.json", spoil_json, vae, lean=False, weight=0.5),
    ]
