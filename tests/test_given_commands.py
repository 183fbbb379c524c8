"""Noise and latents of files through the commands: what is said, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forcingkv.runtime import Session
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.tensors import new_tensors, read_arrays, read_header
from tests.conftest import Ran, small_spec
from tests.runtime.conftest import small_bundle
from tests.runtime.videos import PROMPT

SEED, CHUNKS = 7, 4


@pytest.fixture(scope="module")
def bundle() -> Path:
    return small_bundle("forcing-kv")


@pytest.fixture(scope="module")
def noise(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The noise that seed 7 draws, of four chunks."""
    with Session.open(bundle) as session:
        shape = latent_shape(session.plan)
    drawn = np.stack([[chunk_noise(SEED, c, s, shape) for s in range(2)] for c in range(CHUNKS)])
    path = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    with new_tensors(path, {"noise": ("F32", drawn.shape)}) as writer:
        writer.write("noise", drawn)
    return path


def words(bundle: Path, out: Path, *more: object) -> list[object]:
    return ["generate", "--bundle", bundle, "--prompt", PROMPT, "--out", out, *more]


def test_latents_are_written_and_go_on(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    seconds = (3 * CHUNKS) / 16
    first, whole = tmp_path / "first.safetensors", tmp_path / "whole.safetensors"
    more = ("--seed", SEED, "--seconds", seconds, "--latents-out", whole)
    ran = run(*words(bundle, tmp_path / "a.rgb", *more))
    assert ran.code == 0, ran.err
    with Session.open(bundle) as session:
        made = [chunk.latents for chunk in session.generate(PROMPT, seed=SEED, chunks=CHUNKS)]
        digest = session.bundle.digest
    np.testing.assert_array_equal(read_arrays(whole)["latents"], np.concatenate(made, 2))
    said = read_header(whole)[1]
    assert (said["forcingkv.seed"], said["forcingkv.bundle"]) == ("7", digest)
    assert said["forcingkv.prompt"] == PROMPT
    # Half of it as the start of another: the same video.
    latents = np.ascontiguousarray(np.concatenate(made, 2)[:, :, :6])
    with new_tensors(first, {"latents": ("F32", latents.shape)}) as writer:
        writer.write("latents", latents)
    ran = run(
        *words(bundle, tmp_path / "b.rgb", "--start-latents", first, "--seed", SEED, "--seconds", seconds)
    )
    assert ran.code == 0, ran.err
    assert f"begins with 2 given chunks of {first}" in " ".join(ran.err.split())
    assert (tmp_path / "b.rgb").read_bytes() == (tmp_path / "a.rgb").read_bytes()
    ran = run(*words(bundle, tmp_path / "c.rgb", "--start-latents", first, "--seconds", 0.3))
    assert ran.code == 2
    assert "begins the video with 2 chunks, and the whole has 2. Make it longer: --seconds" in " ".join(
        ran.err.split()
    )


def test_noise_of_a_file_says_so_and_is_as_long_as_the_video(
    bundle: Path, noise: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    ran = run(*words(bundle, tmp_path / "a.rgb", "--noise", noise, "--json"))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["chunks"] == CHUNKS
    assert f"noise: all noise of {noise} (4 chunks)" in " ".join(ran.err.split())
    plain = run(*words(bundle, tmp_path / "b.rgb", "--seed", SEED, "--seconds", 3 * CHUNKS / 16))
    assert plain.code == 0, plain.err
    assert (tmp_path / "a.rgb").read_bytes() == (tmp_path / "b.rgb").read_bytes()
    ran = run(*words(bundle, tmp_path / "c.rgb", "--noise", noise, "--seconds", 5))
    assert (ran.code, (tmp_path / "c.rgb").exists()) == (2, False)
    assert "has noise for 4 chunks, and 27 are to be generated" in " ".join(ran.err.split())


def test_a_saved_video_goes_on_with_its_noise_and_its_latents(
    bundle: Path, noise: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    state, latents = tmp_path / "state", tmp_path / "latents.safetensors"
    given = ("--noise", noise, "--save", state, "--save-every", 1)
    ran = run(*words(bundle, tmp_path / "a.rgb", *given, "--seconds", 0.3, "--latents-out", latents))
    assert ran.code == 0, ran.err
    again = ("--restore", state, "--seconds", 3 * CHUNKS / 16, "--latents-out", latents)
    ran = run(*words(bundle, tmp_path / "a.rgb", *again))
    assert ran.code == 2
    assert "noise came in a file" in " ".join(ran.err.split())
    ran = run(*words(bundle, tmp_path / "a.rgb", *again, "--noise", noise))
    assert ran.code == 0, ran.err
    assert f"{latents} keeps its first 6 latent frames, and the rest follows" in " ".join(ran.err.split())
    with Session.open(bundle) as session:
        made = [chunk.latents for chunk in session.generate(PROMPT, seed=SEED, chunks=CHUNKS)]
    np.testing.assert_array_equal(read_arrays(latents)["latents"], np.concatenate(made, 2))
    other = tmp_path / "other.safetensors"
    with new_tensors(other, {"latents": ("F32", made[0].shape)}) as writer:
        writer.write("latents", made[0])
    ran = run(*words(bundle, tmp_path / "a.rgb", *again[:4], "--latents-out", other, "--noise", noise))
    assert ran.code == 2
    assert "does not say of which video it is" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--noise", "none.safetensors"), "none.safetensors cannot be read"),
        (("--start-latents", "none.safetensors"), "none.safetensors cannot be read"),
        (("--latents-out", "."), "is a folder"),
        (("--latents-out", "a.rgb"), "--latents-out is --out too; expected another file"),
    ],
)
def test_files_that_cannot_be_used(
    bundle: Path,
    tmp_path: Path,
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*words(bundle, Path("a.rgb"), *more))
    assert ran.code == 2
    assert told in " ".join(ran.err.split())
    assert list(tmp_path.iterdir()) == []


def test_evaluate_and_analyze_take_one_file_or_one_for_each_video(
    bundle: Path, noise: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\n")
    three = ("--noise", noise) * 3
    ran = run("evaluate", "--bundle", bundle, "--prompts", prompts, "--chunks", CHUNKS, *three)
    assert ran.code == 2
    assert "--noise is given 3 times for 2 videos" in " ".join(ran.err.split())
    ran = run("evaluate", "--bundle", bundle, "--prompts", prompts, "--chunks", CHUNKS + 1, "--noise", noise)
    assert ran.code == 2
    assert "has noise for 4 chunks, and 5 are to be generated" in " ".join(ran.err.split())
    ran = run("evaluate", "--video", "a.mp4", "--noise", noise)
    assert "--noise and --latents-out go with --bundle, not --video" in " ".join(ran.err.split())
    ran = run(*("analyze", "heads", "--model", "demo", "--samples", 2, "--out", tmp_path / "heads"), *three)
    assert ran.code == 2
    assert "--noise is given 3 times for 2 videos" in " ".join(ran.err.split())


def test_evaluate_writes_the_latents_of_every_video(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "latents"
    prompts.write_text("a b\nc d\n")
    words = ("evaluate", "--bundle", bundle, "--prompts", prompts, "--chunks", 2, "--seed", SEED)
    ran = run(*words, "--latents-out", out)
    assert ran.code == 0, ran.err
    assert sorted(file.name for file in out.iterdir()) == [
        "0000-0-forcing-kv.safetensors",
        "0001-0-forcing-kv.safetensors",
    ]
    with Session.open(bundle) as session:
        for number, prompt in enumerate(("a b", "c d")):
            made = [chunk.latents for chunk in session.generate(prompt, seed=SEED + number, chunks=2)]
            file = out / f"000{number}-0-forcing-kv.safetensors"
            np.testing.assert_array_equal(read_arrays(file)["latents"], np.concatenate(made, 2))
            said = read_header(file)[1]
            assert (said["forcingkv.prompt"], said["forcingkv.seed"]) == (prompt, str(SEED + number))
    ran = run(*words, "--latents-out", prompts)
    assert ran.code == 2, "a file is no folder"


def test_heads_are_measured_on_latents_that_are_kept(tmp_path: Path, run: Callable[..., Ran]) -> None:
    torch = pytest.importorskip("torch")
    from forcingkv.analyze import Job
    from forcingkv.analyze.run import SampleRecorder
    from forcingkv.models.checkpoint import Weights
    from forcingkv.models.generate import generate, seeded_noise
    from forcingkv.runtime.text import encode_words
    from tests.conftest import random_model

    spec = small_spec(layers=2)
    model, text = random_model(spec), encode_words(spec, PROMPT)
    state = model.state_dict()
    weights = Weights({name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)
    job = Job(spec, weights, [text], SEED, chunks=3, latents=tmp_path / "latents")
    SampleRecorder(job, job.recording, str(tmp_path / "stats")).record(1, text)
    plan = job.plan()
    made = generate(model, plan, torch.from_numpy(text), seeded_noise(plan, SEED + 1), 3)
    wanted = torch.cat([chunk.latents for chunk in made], 2).numpy()
    found = read_arrays(tmp_path / "latents" / "0001.safetensors")["latents"]
    np.testing.assert_array_equal(found, wanted)
    more = ("--latents-out", tmp_path / "l", "--ray", "10.0.0.1:6379", "--out", tmp_path / "heads")
    ran = run("analyze", "heads", "--model", "demo", "--samples", 1, *more)
    assert ran.code == 2
    assert "--latents-out: would be written by workers on other machines" in " ".join(ran.err.split())


def test_statistics_are_those_of_the_noise(noise: Path) -> None:
    from forcingkv.analyze.recorder import record_sample
    from forcingkv.runtime.given import read_noise
    from forcingkv.runtime.kv.plan import build_plan
    from forcingkv.runtime.kv.policies import load_policy
    from forcingkv.runtime.text import encode_words
    from tests.conftest import random_model

    torch = pytest.importorskip("torch")
    spec = small_spec(layers=2)
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    model, text = random_model(spec), torch.from_numpy(encode_words(spec, PROMPT))
    given = read_noise(noise, plan)
    wanted = record_sample(model, plan, text, SEED, 0, 3)
    assert record_sample(model, plan, text, 1, 0, 3, given=given).equals(wanted)
    assert not record_sample(model, plan, text, 1, 0, 3).equals(wanted)
