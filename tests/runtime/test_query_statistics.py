"""Files of statistics of queries: read, written, refused, and those that TriAttention released."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.presets import load_spec
from forcingkv.models.query_statistics import read_statistics
from forcingkv.runtime.kv.statistics import PARTS, QueryStatistics
from forcingkv.runtime.tensors import new_tensors
from tests.conftest import small_spec
from tests.models.query_statistics import made_up

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
    with pytest.raises(InputError, match=r"is no file of tensors|is not a safetensors file"):
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
