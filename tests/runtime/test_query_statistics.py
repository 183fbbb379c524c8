"""Files of statistics of queries: read, written, refused, and those that TriAttention released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.presets import load_spec
from forcingkv.models.query_statistics import measure_statistics, read_statistics
from forcingkv.runtime import Bundle
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.statistics import PARTS, QueryStatistics
from forcingkv.runtime.tensors import new_tensors
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, random_model, small_spec
from tests.models.query_statistics import made_up
from tests.runtime.videos import PROMPT

Run = Callable[..., Ran]

SPEC = small_spec()
RELEASED = Path(__file__).parents[3] / "shared" / "data" / "statistics"


def written(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    with new_tensors(path, {name: ("F32", part.shape) for name, part in arrays.items()}, metadata) as writer:
        for name, part in arrays.items():
            writer.write(name, part)
    return path


def parts_of(statistics: QueryStatistics) -> dict[str, np.ndarray]:
    return dict(zip(PARTS, (statistics.real, statistics.imaginary, statistics.size), strict=True))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    made = made_up(SPEC, model=SPEC.name)
    made.write(tmp_path / "a.safetensors")
    found = read_statistics(tmp_path / "a.safetensors")
    assert (found.model, found.source, found.digest) == (made.model, made.source, made.digest)
    assert found.digest != made_up(SPEC, seed=1, model=SPEC.name).digest
    found.check_model(SPEC)


def test_a_file_that_torch_saved_is_the_same(tmp_path: Path) -> None:
    """As the release has it: tensors beside a table of what they are of, and counts."""
    made = made_up(SPEC)
    tensors = {name: torch.from_numpy(part) for name, part in parts_of(made).items()}
    said = {"model_name": "Wan2.1-T2V-1.3B", "num_frames": 81, "source": "LongLive"}
    saved = {"metadata": said, **tensors, "token_count": torch.ones(SPEC.layers, dtype=torch.float64)}
    torch.save(saved, tmp_path / "a.pt")
    found = read_statistics(tmp_path / "a.pt")
    np.testing.assert_array_equal(found.real, made.real)
    assert (found.model, found.source) == (None, "LongLive, Wan2.1-T2V-1.3B")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_no_file_and_no_tensors_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind, of any length")
    with pytest.raises(InputError, match=r"cannot be read as a torch file|is not a safetensors file"):
        read_statistics(tmp_path / name)


def test_what_is_no_statistics_is_refused(tmp_path: Path) -> None:
    parts = parts_of(made_up(SPEC))
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"has the tensors 'q_abs_mean, q_mean_imag'; expected float32"):
        read_statistics(written(path, {name: parts[name] for name in PARTS[1:]}))
    with pytest.raises(InputError, match="expected float32 tensors"):
        read_statistics(written(path, parts | {PARTS[0]: parts[PARTS[0]][:1]}))
    with pytest.raises(InputError, match="longer than queries are on average"):
        read_statistics(written(path, parts | {PARTS[2]: parts[PARTS[2]] * 0.4}))
    with pytest.raises(InputError, match="or no finite number"):
        read_statistics(written(path, parts | {PARTS[2]: parts[PARTS[2]] * np.float32(np.inf)}))
    with pytest.raises(InputError, match="says much of what it is of"):
        read_statistics(written(path, parts, {"source": "long " * 200}))


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"needs {RELEASED}")
def test_those_that_triattention_released_are_of_every_model_of_that_size() -> None:
    files = sorted(RELEASED.glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        found = read_statistics(file)
        for name in ("longlive", "self-forcing"):
            found.check_model(load_spec(name))
        assert found.model is None
        assert "Wan2.1-T2V-1.3B" in found.source
        mean = np.hypot(found.real, found.imaginary)
        assert (mean <= found.size * 1.001).all()
        assert 0.5 < float((mean / found.size).mean()) < 0.7
    with pytest.raises(InputError, match=r"30 layers of 12 heads with 64 rotary pairs; expected 40 layers"):
        found.check_model(load_spec("krea-14b"))


def test_what_is_measured_is_what_queries_are_before_rotation(tmp_path: Path) -> None:
    """Of two layers of a small model, against queries that a hook sees before they are rotated."""
    spec = small_spec(layers=2)
    model, text = random_model(spec), torch.from_numpy(encode_words(spec, PROMPT))
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    seen: list[list[torch.Tensor]] = [[], []]

    def hook(layer: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
            heads = out.unflatten(-1, (spec.heads, spec.head_dim // 2, 2))
            seen[layer].append(torch.view_as_complex(heads.double().contiguous())[0])

        return keep

    handles = [
        block.self_attn.norm_q.register_forward_hook(hook(n))  # type: ignore[union-attr, operator]
        for n, block in enumerate(model.blocks)
    ]
    done: list[int] = []
    found = measure_statistics(model, plan, [text, text], 3, 5, done.append)
    for handle in handles:
        handle.remove()
    assert done == [1, 2, 3, 4, 5, 6]
    for layer, parts in enumerate(seen):
        queries = torch.cat(parts)  # of all passes of both videos
        mean, size = queries.mean(0), queries.abs().mean(0)
        np.testing.assert_allclose(found.real[layer], mean.real.numpy(), atol=1e-5)
        np.testing.assert_allclose(found.imaginary[layer], mean.imag.numpy(), atol=1e-5)
        np.testing.assert_allclose(found.size[layer], size.numpy(), rtol=1e-5)
    found.check_model(spec)
    assert found.source == "2 videos of 3 chunks by small, seeds from 5"
    found.write(tmp_path / "queries.safetensors")
    assert read_statistics(tmp_path / "queries.safetensors").digest == found.digest


def test_a_policy_that_scores_by_statistics_is_refused_without(run: Run, tmp_path: Path) -> None:
    words = "--model", "demo", "--policy", "triattention", "--target", "torch", "--out", tmp_path / "b"
    ran = run("export", *words)
    assert ran.code == 2
    assert "scores tokens by statistics of the model's queries" in ran.err
    assert "expected --statistics FILE" in ran.err
    assert not (tmp_path / "b").exists()


@pytest.mark.long
def test_the_way_from_measuring_to_a_video(run: Run, tmp_path: Path) -> None:
    file, bundle = tmp_path / "queries.safetensors", tmp_path / "bundle"
    measured = run("analyze", "queries", "--model", "demo", "--samples", 1, "--chunks", 1, "--out", file)
    assert measured.code == 0, measured.err
    assert "1 videos of 1 chunks by demo, seeds from 0" in measured.out
    words = "export", "--model", "demo", "--target", "torch", "--statistics", file, "--out"
    ran = run(*words, bundle, "--policy", "triattention")
    assert ran.code == 0, ran.err
    assert "note: statistics of queries: 1 videos of 1 chunks by demo" in ran.err
    assert Bundle.open(bundle).statistics is not None
    video = run("generate", "--bundle", bundle, "--prompt", "a 3 moving left and a 7 moving up",
                "--seconds", 0.5, "--out", tmp_path / "video.mp4")  # fmt: skip
    assert video.code == 0, video.err
    useless = run(*words, tmp_path / "full", "--policy", "full")
    assert "the policy full scores by no statistics of queries, and uses none" in useless.err


@pytest.mark.long
def test_with_random_weights_statistics_are_random_too(run: Run, tmp_path: Path) -> None:
    words = "--model", "demo", "--policy", "triattention", "--target", "torch", "--out", tmp_path / "b"
    ran = run("export", *words, "--random-weights", "--layers", 2)
    assert ran.code == 0, ran.err
    assert "no statistics of queries are given: random numbers, as the weights are" in ran.err
