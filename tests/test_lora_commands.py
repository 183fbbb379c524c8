"""LoRAs on the command line: merged, said, and written down in the bundle and in what `analyze` makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forcingkv.models.checkpoint import load_weights, random_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from tests.conftest import Ran
from tests.test_model_commands import PIXELS, SPEC

SOURCE = """
[source]
hub = "x/y"
file = "models/base.safetensors"
lora = "models/lora.safetensors"
lora_alpha = 8.0
"""
UNSAID = "taken as the rank: nothing says it"
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset with a LoRA of its own, and two more: one says its alpha, one does not."""
    folder = tmp_path_factory.mktemp("place")
    text = SPEC.replace("layers = 2", "layers = 1") + PIXELS + SOURCE
    (folder / "spec.toml").write_text(text.replace('dtype = "float32"', ""))
    spec = load_spec(str(folder / "spec.toml"))
    models = folder / "repository" / "models"
    models.mkdir(parents=True)
    (folder / "style").mkdir()
    save_file(dict(random_weights(spec)), models / "base.safetensors")
    torch.manual_seed(0)
    for number, file in enumerate(
        [
            models / "lora.safetensors",
            folder / "style" / "adapter_model.safetensors",
            folder / "other.safetensors",
        ]
    ):
        rank = 2 + number
        state = {f"{Q}.lora_A.weight": torch.randn(rank, 24), f"{Q}.lora_B.weight": torch.randn(24, rank)}
        save_file(state, file)
    (folder / "style" / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    return folder


def words(place: Path, *more: object) -> list[object]:
    return ["--model", place / "spec.toml", "--checkpoint", place / "repository", *more]


def test_what_was_merged_is_said_and_stands_in_the_bundle(
    place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    added = ["--lora", place / "style", "--lora", f"{place / 'other.safetensors'}:-0.5"]
    ran = run(
        "export", *words(place, *added), "--policy", "full", "--no-verify", "--out", tmp_path / "b", "--json"
    )
    assert ran.code == 0, ran.err
    told = [line.removeprefix("LoRA ") for line in ran.err.splitlines() if line.startswith("LoRA ")]
    assert told == [
        "lora.safetensors: 1 module (LoRA), rank 2, alpha 8 (the model's preset), strength 1",
        "adapter_model.safetensors: 1 module (LoRA), rank 3, alpha 6 (adapter_config.json), strength 1",
        "other.safetensors: 1 module (LoRA), rank 4, alpha 4 (" + UNSAID + "), strength -0.5",
    ]
    records = Bundle.open(tmp_path / "b").manifest.loras
    assert records is not None
    assert json.loads(ran.out)["loras"][2]["strength"] == -0.5
    assert [(one.scales, one.ranks, one.modules, one.alpha_known) for one in records] == [
        ((4.0,), (2,), 1, True),
        ((2.0,), (3,), 1, True),
        ((1.0,), (4,), 1, False),
    ]
    own, style, other = (
        load_file(file)
        for file in (
            place / "repository" / "models" / "lora.safetensors",
            place / "style" / "adapter_model.safetensors",
            place / "other.safetensors",
        )
    )
    expected = load_file(place / "repository" / "models" / "base.safetensors")[f"{Q}.weight"].double()
    for scale, lora in ((4.0, own), (2.0, style), (-0.5, other)):
        expected += scale * (lora[f"{Q}.lora_B.weight"].double() @ lora[f"{Q}.lora_A.weight"].double())
    stored = load_file(tmp_path / "b" / "weights.safetensors")[f"{Q}.weight"].double()
    assert torch.allclose(stored, expected.t(), rtol=2**-7, atol=1e-2), "the bundle holds the merged weights"
    shown = run("inspect", tmp_path / "b")
    assert shown.out.count("  lora ") == 3
    lines = " ".join(shown.out.split())
    for record, line in zip(records, told, strict=True):
        assert f"lora {line}, sha256 {record.sha256[:12]}" in lines
    assert json.loads(run("inspect", tmp_path / "b", "--json").out)["loras"][1]["alphas"] == [6.0]


def test_a_bundle_without_a_lora_says_nothing_of_any(
    place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    ran = run(
        "export",
        *words(place, "--no-preset-lora"),
        "--policy",
        "full",
        "--no-verify",
        "--out",
        tmp_path / "b",
    )
    assert (ran.code, "LoRA" in ran.err) == (0, False), ran.err
    assert "loras" not in json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert Bundle.open(tmp_path / "b").manifest.loras is None
    assert "  lora " not in run("inspect", tmp_path / "b").out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora", "none.safetensors"], "--lora none.safetensors cannot be read: there is no such file"),
        (["--lora", "OTHER:much"], "has the strength 'much'; expected a finite number"),
        (["--lora", "OTHER", "--lora", "OTHER:0.5"], "it would be added twice"),
        (["--lora", "OWN"], "is the same LoRA as"),
        (["--random-weights"], "use either --random-weights or --checkpoint, --key and --lora, not both"),
    ],
)
@pytest.mark.parametrize("command", ["export", "analyze heads"])
def test_wrong_input(
    command: str, more: list[str], message: str, place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    own = place / "repository" / "models" / "lora.safetensors"
    embeds = tmp_path / "embeds"
    given = [
        word.replace("OTHER", str(place / "other.safetensors")).replace("OWN", str(own)) for word in more
    ]
    out = ["--policy", "full", "--out", tmp_path / "out"]
    if command != "export":
        from forcingkv.runtime.text import write_embeds

        write_embeds(embeds, ["a kite"], [torch.zeros(5, 8).numpy()], {})
        out += ["--embeds", embeds]
    ran = run(*command.split(), *words(place, *given), *out)
    assert (ran.code, message in ran.err, "Traceback" in ran.err) == (2, True, False), ran.err
    assert not (tmp_path / "out").exists()


def test_statistics_say_what_they_were_measured_with(place: Path) -> None:
    from forcingkv.analyze import Job
    from forcingkv.analyze.recording import Recording

    spec = load_spec(str(place / "spec.toml"))
    kinds = []
    for lora in ([], [place / "style"], [f"{place / 'style'}:0.5"]):
        weights = load_weights(spec, place / "repository", lora=lora)
        recording = Job(spec, weights, [torch.zeros(1, 6, 8).numpy()]).recording
        assert Recording.from_text(recording.to_text(), "here") == recording
        kinds.append((recording.model.weights, [(one.file, one.strength) for one in recording.loras or ()]))
    assert [of for _, of in kinds] == [
        [("lora.safetensors", 1.0)],
        [("lora.safetensors", 1.0), ("adapter_model.safetensors", 1.0)],
        [("lora.safetensors", 1.0), ("adapter_model.safetensors", 0.5)],
    ]
    assert len({digest for digest, _ in kinds}) == 3, "measurements of other weights are not added to"
