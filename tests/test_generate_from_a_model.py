"""`forcingkv generate --model`: no bundle is asked for, and what is chosen is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forcingkv.commands.baked import ModelOptions
from forcingkv.headmaps.errors import InputError
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle, Session
from tests.conftest import Ran

PROMPT = "a 3 moving left and a 7 moving up"
Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of bundles in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "forcingkv" / "bundles"


def words(out: Path, *more: object) -> list[object]:
    return [
        "generate",
        "--model",
        "demo",
        "--prompt",
        PROMPT,
        "--seconds",
        0.3,
        "--out",
        out,
        "--threads",
        1,
        *more,
    ]


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_the_demo_makes_a_video_without_a_bundle(cache: Path, tmp_path: Path, run: Run) -> None:
    ran = run(*words(tmp_path / "v.rgb", "--device", "cpu", "--seed", 7, "--json"))
    assert ran.code == 0, ran.err
    (folder,) = cache.iterdir()
    assert "note: head map: the one that ships with demo (7 static, 17 dynamic)\n" in ran.err
    assert f"baked demo into {folder} in " in ran.err
    result = json.loads(ran.out)
    assert result["runs_on"].endswith("in float32 (torch)")
    assert f"runs on {result['runs_on']}\n" in ran.err
    assert (result["frames"], len(result["seconds_by_chunk"])) == (3, 1)
    assert result["seconds_to_bake"] > 0
    assert result["seconds_to_digest"] > 0
    assert result["seconds_to_load"] > 0
    parts = result["seconds_by_part"]
    assert list(parts) == ["denoise", "clean", "decode"]
    assert 0 < sum(parts.values()) <= result["seconds_to_begin"] + sum(result["seconds_by_chunk"])
    assert result["peak_bytes"] > sum(result["memory"].values())
    with Session.open(folder) as session:
        assert session.bundle.headmap is not None
        assert session.bundle.headmap.counts() == {"static": 7, "dynamic": 17}
        assert result["memory"] == session.footprint
        (chunk,) = session.generate(PROMPT, seed=7, chunks=1)
        assert (tmp_path / "v.rgb").read_bytes() == chunk.frames.tobytes()
    again = run(*words(tmp_path / "w.rgb", "--seed", 7, "--json"))
    assert again.code == 0, again.err
    assert f"using {folder}, baked before\n" in again.err
    assert json.loads(again.out)["seconds_to_bake"] is None
    assert (tmp_path / "w.rgb").read_bytes() == (tmp_path / "v.rgb").read_bytes()


def tiny(tmp_path: Path) -> Path:
    """A spec of a model that takes embeddings, small enough for a test; shares of labels are published."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        'base = "self-forcing"\nname = "self-forcing"\nlayers = 3\nheads = 4\nhead_dim = 12\nffn_width = 16\n'
        "latent_channels = 3\ntext_width = 8\ntext_length = 4\nwidth = 16\nheight = 16\n"
        '[decoder]\nkind = "pixels"\nspatial_stride = 1\ntemporal_stride = 1\n'
    )
    return path


def random(tmp_path: Path, prompt: str = "a red kite") -> list[object]:
    """The words for two layers of it."""
    return ["generate", "--model", tiny(tmp_path), "--random-weights", "--layers", 2, "--prompt", prompt]


def test_random_weights_take_typical_layers_and_random_embeddings(tmp_path: Path, run: Run) -> None:
    red = random(tmp_path)
    switched = ["--switch", "0.4:a blue kite", "--seconds", 0.8]
    ran = run(*red, *switched, "--out", tmp_path / "a.rgb")
    assert ran.code == 0, ran.err
    assert "heads, as `bench` has them" in ran.err
    assert ran.err.count("note: random numbers stand for the embedding of the prompt: none was given") == 2
    (folder,) = (tmp_path / "cache" / "forcingkv" / "bundles").iterdir()
    with Session.open(folder) as session:
        assert session.spec.layers == 2
    again = run(*red, "--seconds", 0.1, "--out", tmp_path / "b.rgb")
    assert again.code == 0, again.err
    other = run(*random(tmp_path, "a green kite"), "--seconds", 0.1, "--out", tmp_path / "c.rgb")
    assert other.code == 0, other.err
    first, same, differs = ((tmp_path / f"{name}.rgb").read_bytes() for name in "abc")
    assert first.startswith(same)
    assert same != differs


def test_another_dtype_is_another_folder_and_the_first_stays(cache: Path, tmp_path: Path, run: Run) -> None:
    given = random(tmp_path)
    assert run(*given, "--seconds", 0.1, "--out", tmp_path / "v.rgb").code == 0
    other = ["--dtype", "float32", "--policy", "full", "--json"]
    ran = run(*given, *other, "--seconds", 0.1, "--out", tmp_path / "w.rgb")
    assert ran.code == 0, ran.err
    assert f"note: {cache} holds 2 folders of " in ran.err
    assert json.loads(ran.out)["runs_on"].endswith("in float32 (torch)")
    made = [Bundle.open(folder).manifest for folder in cache.iterdir()]
    assert {(one.policy.name, one.compute) for one in made} == {
        ("forcing-kv", "bfloat16"),
        ("full", "float32"),
    }


def test_a_saved_video_goes_on_from_the_same_folder(tmp_path: Path, run: Run) -> None:
    whole, kept = tmp_path / "whole.rgb", tmp_path / "v.rgb"
    given = random(tmp_path)
    made = [
        run(*given, "--seconds", 0.7, "--out", whole),
        run(*given, "--seconds", 0.3, "--save", tmp_path / "state", "--save-every", 1, "--out", kept),
        run(*given, "--seconds", 0.7, "--restore", tmp_path / "state", "--out", kept),
    ]
    assert [ran.code for ran in made] == [0, 0, 0], made[-1].err
    assert kept.read_bytes() == whole.read_bytes()


def test_both_neither_and_what_belongs_to_the_other_are_refused(tmp_path: Path, run: Run) -> None:
    none = run("generate", "--prompt", "a", "--out", tmp_path / "v.rgb")
    both = run(*words(tmp_path / "v.rgb", "--bundle", tmp_path))
    for ran in (none, both):
        assert ran.code == 2
        assert "generate needs a bundle or a model, and not both" in flat(ran.err)
    options: dict[str, object] = {
        "checkpoint": "a.pt",
        "key": "generator",
        "lora": ["b.safetensors"],
        "no_preset_lora": True,
        "random_weights": True,
        "headmap": Path("map.json"),
        "policy": "forcing-kv",
        "resolution": "480p",
        "decoder": "taehv",
        "vae": Path("vae.pth"),
        "encoder": Path("vae.pth"),
        "layers": 2,
        "context": "last",
        "statistics": Path("q.safetensors"),
    }
    assert options.keys() == ModelOptions.__dataclass_fields__.keys() - {"model"}
    for name, value in options.items():
        with pytest.raises(
            InputError, match=f"--bundle has what --{name.replace('_', '-')} would say already"
        ):
            ModelOptions(**{name: value}).check(tmp_path)  # type: ignore[arg-type]
    ModelOptions(lora=[]).check(tmp_path)


def test_classes_may_be_found_in_the_video(tmp_path: Path, run: Run) -> None:
    """No map ships for the policy, and none is needed; the same again makes the same video."""
    online = ("--policy", "dummy-forcing", "--classes", "online")
    videos = []
    for name in ("a", "b"):
        ran = run(*words(tmp_path / f"{name}.rgb", "--seconds", 0.9, *online))
        assert ran.code == 0, ran.err
        assert re.search(r"classes of this video: \d+ sink, \d+ neighbour, 12 dummy\n", ran.err), ran.err
        videos.append((tmp_path / f"{name}.rgb").read_bytes())
    assert videos[0] == videos[1]


REFUSED = {
    "a device that is not there": (["--device", "xpu"], "finds no device xpu here"),
    "no device": (["--device", "tpu"], "there is no device 'tpu'"),
    "another backend": (["--backend", "onnxruntime"], "cannot run a model that was not exported"),
    "no backend": (["--backend", "mine"], "cannot run a model that was not exported"),
    "a provider": (["--provider", "cpu"], "--provider is nothing that the backend torch has a use for"),
    "CUDA graphs": (["--cuda-graphs"], "CUDA graphs"),
    "layers of real weights": (["--layers", "2"], "expected --random-weights beside it"),
    "a map of other labels": (["--policy", "dummy-forcing"], "needs a head map, and none ships with demo"),
    "classes of a policy without": (["--classes", "online"], "has the groups static dynamic"),
    "classes of no kind": (["--classes", "best"], "there is no way to classes of heads 'best'"),
    "classes and a state": (["--classes", "online", "--save", "a"], "Leave out --save, or --classes online"),
    "a prompt": (["--prompt", "a zebra"], "does not know the word 'zebra'"),
    "a prompt to come": (["--switch", "0.2:a zebra"], "does not know the word 'zebra'"),
    "a resolution": (["--resolution", "9p"], "9p"),
    "a decoder": (["--decoder", "taehv"], "the latents of demo are pixels"),
    "weights": (["--checkpoint", "none.pt"], "none.pt"),
    "weights of two kinds": (["--random-weights", "--key", "a"], "use either --random-weights or"),
    "another digest": (["--expect-digest", "0" * 64], "has the digest"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_baked(
    why: str, cache: Path, tmp_path: Path, run: Run
) -> None:
    options, message = REFUSED[why]
    ran = run(*words(tmp_path / "v.rgb", *options))
    assert ran.code == 2, ran.out + ran.err
    assert message in flat(ran.err)
    assert "Traceback" not in ran.err
    assert why == "another digest" or not cache.exists()
    assert not (tmp_path / "v.rgb").exists()


def test_a_map_is_asked_for_where_none_ships(tmp_path: Path, run: Run) -> None:
    given = ["generate", "--model", "self-forcing", "--checkpoint", "none.pt", "--out", tmp_path / "v.mp4"]
    embeds = tmp_path / "e.safetensors"
    from forcingkv.runtime.text import write_embeds

    width = load_spec("self-forcing").text_width
    write_embeds(embeds, ["a kite"], [np.zeros((2, width), np.float32)], {})
    ran = run(*given, "--embeds", embeds, "--vae", "none.pth")
    assert ran.code == 2
    assert "the policy forcing-kv needs a head map, and none ships with self-forcing" in flat(ran.err)
    assert "--policy full" in flat(ran.err)
    without = run(*given, "--prompt", "a kite")
    assert without.code == 2
    assert "self-forcing takes text embeddings, not words" in flat(without.err)


def test_a_shipped_map_says_that_it_was_measured_on_other_weights(tmp_path: Path, run: Run) -> None:
    from safetensors.torch import save_file

    from forcingkv.models.checkpoint import load_weights

    weights = load_weights(load_spec("demo"))
    save_file({name: weights[name].contiguous() * 0.9 for name in weights}, tmp_path / "mine.safetensors")
    ran = run(*words(tmp_path / "v.rgb", "--checkpoint", tmp_path / "mine.safetensors"))
    assert ran.code == 0, ran.err
    assert "the head map that ships with demo was measured on other weights than these" in ran.err
