"""The whole files that are spoilt: small ones of every format, made in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

SPEC_TOML = """name = "small"
layers = 4
heads = 3
head_dim = 12
ffn_width = 40
latent_channels = 3
patch = 2
text_width = 10
text_length = 5
time_width = 16
frames_per_chunk = 3
attended_frames = 15
ar_start = 1
fps = 16.0
width = 12
height = 8
sink_frames = 1

[resolutions]
large = [24, 16]

[schedule]
denoising_steps = [1000.0, 625.0]
warp = true
shift = 5.0
context_timestep = 0.0

[decoder]
kind = "pixels"

[text]
kind = "words"
vocabulary = ["a", "b", "c", "d", "e"]

[source]
hub = "owner/name"
file = "model.safetensors"
"""
POLICY_TOML = """name = "own"
summary = "of its own"

[groups]
static = [{ role = "sink", frames = 1 }, { role = "recent", frames = 1 }]
dynamic = [
    { role = "sink", frames = 1 },
    { role = "retained", segments = 6, ratio = 0.33, score_layer = 1, choose = "random", seed = 3 },
    { role = "recent", frames = 2 },
]

[unsplit]
layers = [0]
group = "static"
"""


def texts(out: Path) -> None:
    """Head maps, specs, policies and prompts."""
    from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, forcingkv_json
    from forcingkv.headmaps.headmap import Statistics

    labels = tuple(
        tuple("static" if (layer + head) % 2 else "dynamic" for head in range(3)) for layer in range(4)
    )
    scores = tuple(tuple(0.1 * (layer + head) for head in range(3)) for layer in range(4))
    headmap = HeadMap(
        ModelIdentity("small", 4, 3, "ab" * 32),
        labels,
        Rule("threshold", "as asked", alpha=0.8, sink_frames=1, boundary=(1.0, 2.0)),
        scores=scores,
        confidence=scores,
        margins=scores,
        undecided=((0,), (), (1, 2), ()),
        statistics=Statistics(3, 4, 2, 5, "full", 512, "12x8"),
    )
    put(out / "headmap" / "map.json", headmap.to_text())
    put(out / "forcingkv" / "map.json", forcingkv_json.to_text(headmap))
    put(out / "pyramid" / "map.csv", "\n".join(["-1,1,2", "1,1,1", "2,-1,2", "1,2,-1"]) + "\n")
    put(
        out / "duo" / "map.tsv",
        "\n".join(["0.1\t0.9\t0.5", "1\t0\t0.25", "0\t0\t1", "0.75\t0.5\t-0.01"]) + "\n",
    )
    put(out / "spec" / "spec.toml", SPEC_TOML)
    put(out / "policy" / "policy.toml", POLICY_TOML)
    put(out / "prompts-txt" / "prompts.txt", "a red kite\nä “quoted” &amp; prompt\n\n  a dune  \n")
    lines = [{"prompts": ["a kite", "a dune"], "switch_frame_indices": [40]}, {"prompts": ["b"]}]
    put(out / "prompts-jsonl" / "prompts.jsonl", "\n".join(map(json.dumps, lines)) + "\n")


def media(out: Path) -> None:
    """An mp4, pictures and their record."""
    import numpy as np

    from forcingkv.runtime.video import open_writer

    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
    frames[:] = frames[0] // 2 + np.arange(12, dtype=np.uint8)[:, None, None, None] * 8
    (out / "mp4").mkdir()
    with open_writer(out / "mp4" / "video.mp4", fps=16, metadata={"title": "x"}) as writer:
        writer.write(frames)
    with open_writer(out / "frames", fps=16, metadata={"title": "x"}) as writer:
        writer.write(frames[:2])
    (out / "png").mkdir()
    shutil.copy(out / "frames" / "frame-000001.png", out / "png" / "picture.png")


def embeds(out: Path) -> None:
    """Text embeddings."""
    import numpy as np

    from forcingkv.runtime.text import write_embeds

    rng = np.random.default_rng(0)
    (out / "embeds").mkdir()
    arrays = [rng.normal(size=(tokens, 10)).astype(np.float32) for tokens in (3, 5)]
    write_embeds(out / "embeds" / "embeds.safetensors", ["a kite", "a dune"], arrays, {"encoder": "x"})


def bundles(out: Path, bundle: Path) -> None:
    """A bundle, and the state of a video of it."""
    from forcingkv.runtime import Session

    shutil.copytree(bundle, out / "bundle")
    (out / "state").mkdir()
    with Session.open(bundle, threads=1) as session:
        video = session.generate("a b", seed=3, chunks=4)
        next(video)
        next(video)
        video.save(out / "state" / "saved")


def statistics(out: Path) -> None:
    """Three samples of measurements."""
    from forcingkv.analyze import Job, record_samples
    from forcingkv.models.checkpoint import random_weights
    from forcingkv.runtime.text import encode_words
    from tests.conftest import small_spec

    spec = small_spec()
    job = Job(spec, random_weights(spec), [encode_words(spec, "a b")], seed=5, chunks=4)
    record_samples(job, out / "stats", samples=2)


def tensors(out: Path) -> None:
    """Checkpoints of every container, and a LoRA with its configuration."""
    import torch
    from safetensors.torch import save_file

    from tests.conftest import random_model, small_spec

    state = {name: tensor.contiguous() for name, tensor in random_model(small_spec()).state_dict().items()}
    for name in ("checkpoint", "lora", "lora-config", "shards", "torch-zip", "torch-old"):
        (out / name).mkdir()
    save_file(state, out / "checkpoint" / "model.safetensors", {"format": "pt"})
    torch.save({"generator_ema": state, "step": 3}, out / "torch-zip" / "model.pt")
    torch.save({"generator_ema": state}, out / "torch-old" / "model.pt", _use_new_zipfile_serialization=False)
    names = list(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of in halves.items():
        save_file({name: state[name] for name in of}, out / "shards" / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: file for file, of in halves.items() for n in of},
    }
    put(out / "shards" / "model.safetensors.index.json", json.dumps(index))
    lora: dict[str, Any] = {}
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        rows, columns = state[f"{module}.weight"].shape
        lora[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
        lora[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {"ffn.0": 8}}
    for name in ("lora", "lora-config"):
        shutil.copy(out / "checkpoint" / "model.safetensors", out / name / "base.safetensors")
        (out / name / "lora").mkdir()
        save_file(lora, out / name / "lora" / "adapter_model.safetensors", {"ss_network_dim": "2"})
        put(out / name / "lora" / "adapter_config.json", json.dumps(config))


def encoders(out: Path) -> None:
    """A text encoder with its tokenizer, in the layouts of diffusers and of Wan; a VAE's configuration."""
    from tests.models.test_text_encoder import diffusers_folder, wan_folder

    diffusers_folder(out / "encoder")
    for name in ("encoder-config", "tokenizer", "tokenizer-config"):
        shutil.copytree(out / "encoder", out / name)
    wan_folder(out / "encoder-wan")
    from tests.models.test_decoder_files import as_folder
    from tests.models.test_decoders import small_vae

    (out / "vae-config").mkdir()
    as_folder(small_vae().state_dict(), out / "vae-config")


def put(path: Path, text: str) -> None:
    """Write a file of text, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make(out: Path, bundle: Path | None, lean: bool) -> None:
    """All whole files, or only those that are made and read without torch."""
    texts(out)
    media(out)
    embeds(out)
    if bundle is None:
        from tests.runtime.conftest import small_bundle

        bundle = small_bundle("forcing-kv")
    bundles(out, bundle)
    if not lean:
        statistics(out)
        tensors(out)
        encoders(out)


def main() -> None:
    """python -m tests.hostile.seeds OUT [--bundle FOLDER] [--lean]."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    words = sys.argv[1:]
    bundle = Path(words[words.index("--bundle") + 1]) if "--bundle" in words else None
    make(Path(words[0]), bundle, "--lean" in words)


if __name__ == "__main__":
    main()
