"""A disk that is full at every write in turn: an error says so, the old result is whole, nothing is left."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.analyze.recording import COLUMNS, SCHEMA, Recording
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, writing
from forcingkv.measure.tables import write_csv
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.pictures import PngWriter
from forcingkv.runtime.text import read_embeds
from forcingkv.runtime.video import Mp4Writer
from tests.conftest import headmap_of, small_spec
from tests.faults.injection import FullDisk
from tests.faults.small_bundles import hidden
from tests.faults.tasks import Encode, Export
from tests.runtime.conftest import small_bundle

FRAMES = np.arange(3 * 8 * 12 * 3, dtype=np.uint8).reshape(3, 8, 12, 3)
MOST = 400


def each_write(
    write: Callable[[], object], check: Callable[[InputError], None], least: int, step: int = 1
) -> None:
    """Do that on disks that are full from the first write on, from the second, ... until one is not full."""
    for number in range(0, MOST, step):
        disk = FullDisk(number)
        with disk.mounted():
            try:
                write()
            except InputError as error:
                raised: InputError | None = error
            else:
                raised = None
        if not disk.was_full:
            assert number >= least, f"only {number} writes"
            return
        assert raised is not None, f"nothing is said of write {number}"
        assert "cannot be written (No space left on device). Make room there" in str(raised), raised
        check(raised)
    raise AssertionError("there is no end of writes")


def test_export(quick: Path) -> None:
    """FAULTS.md F13: every file of a bundle, weights and graphs too; each third write, for time's sake."""
    task = Export()
    task.load()
    task.write(quick, 0)
    before = Bundle.open(quick / "bundle").digest

    def check(error: InputError) -> None:
        assert "bundle cannot be written" in str(error)
        assert Bundle.open(quick / "bundle").digest == before
        assert os.listdir(quick) == ["bundle"]

    each_write(lambda: task.write(quick, 1), check, least=20, step=3)
    assert Bundle.open(quick / "bundle").digest != before
    assert os.listdir(quick) == ["bundle"]


def test_encode(quick: Path) -> None:
    """What is done stays beside the old file, and the next run goes on with it."""
    task = Encode()
    task.write(quick, 0)
    before = task.whole(quick)

    def check(_: InputError) -> None:
        assert task.whole(quick) == before
        assert set(hidden(quick)) <= {".e.safetensors.growing.forcingkv"}
        for path in quick.glob(".*growing*"):
            path.unlink()

    each_write(lambda: task.write(quick, 1), check, least=30)
    assert float(read_embeds(quick / "e.safetensors").arrays[0][0, 0]) == 100
    assert os.listdir(quick) == ["e.safetensors"]


def test_head_maps_and_tables(quick: Path) -> None:
    spec = small_spec(layers=2)
    old, new = headmap_of(spec, [[0], [1]]), headmap_of(spec, [[1], [2]])
    old.write(quick / "map.json")
    (quick / "t.csv").write_text("old")

    def check(_: InputError) -> None:
        assert HeadMap.read(quick / "map.json") == old
        assert (quick / "t.csv").read_text() == "old"
        assert sorted(os.listdir(quick)) == ["map.json", "t.csv"]

    each_write(lambda: new.write(quick / "map.json"), check, least=2)
    old.write(quick / "map.json")
    each_write(lambda: write_csv(quick / "t.csv", ["a"], [{"a": 1}]), check, least=2)
    assert (quick / "t.csv").read_text() == "a\n1\n"


def test_a_sample_of_statistics(quick: Path) -> None:
    """FAULTS.md F18: no `.sample-NNNN.parquet.partial` stays."""
    import polars as pl

    spec = small_spec()
    model = ModelIdentity(spec.name, spec.layers, spec.heads)
    common = Recording(SCHEMA, model, spec, 12, 8, "full", None, 0, 4, None, "float32", None)
    recording = replace(common, sample=0)
    storage, rows = Storage(quick / "stats"), pl.DataFrame(schema=COLUMNS)

    def check(error: InputError) -> None:
        assert "sample-0000.parquet cannot be written" in str(error)
        assert os.listdir(quick) == [], "not even the folder"

    each_write(lambda: storage.write(rows, recording), check, least=2)
    assert os.listdir(quick / "stats") == ["sample-0000.parquet"]
    with pytest.raises(InputError, match="cannot be written"), FullDisk(0).mounted():
        Storage(quick / "others").check_writable()
    assert os.listdir(quick) == ["stats"]


def test_states(quick: Path) -> None:
    with Session.open(small_bundle("window"), threads=1) as session:
        video = session.generate("a b", seed=3, chunks=3)
        next(video)
        video.save(quick / "state")
        next(video)
        (quick / "keep").write_text("x")
        before = json.loads((quick / "state" / "state.json").read_text())

        def check(_: InputError) -> None:
            assert json.loads((quick / "state" / "state.json").read_text()) == before
            assert sorted(os.listdir(quick / "state"))[1:] == [before["tensors"], "state.json"][1:]

        each_write(lambda: video.save(quick / "state"), check, least=5)
        assert json.loads((quick / "state" / "state.json").read_text())["index"] == 2
        assert len(os.listdir(quick / "state")) == 2


def test_an_error_just_after_a_state_took_its_name(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors stay: state.json names them, and no longer those of the state before."""
    with Session.open(small_bundle("window"), threads=1) as session:
        video = session.generate("a b", seed=3, chunks=3)
        next(video)
        video.save(quick / "state")
        next(video)

        def renamed_and_failed(folder: Path) -> None:
            if json.loads((quick / "state" / "state.json").read_text())["index"] == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(writing, "sync_folder", renamed_and_failed)
        with pytest.raises(InputError, match="cannot be written"):
            video.save(quick / "state")
        monkeypatch.undo()
        assert session.restore(quick / "state").index == 2


def test_pictures(quick: Path) -> None:
    """A shorter video, which says how long it is; where not even that fits, one that the next run cleans."""

    def write() -> None:
        with PngWriter(quick / "frames", 8.0) as writer:
            writer.write(FRAMES[:1])
            writer.write(FRAMES[1:])

    def check(_: InputError) -> None:
        folder = quick / "frames"
        if not folder.exists():
            return
        pictures = sorted(path.name for path in folder.glob("*.png"))
        if (folder / "frames.json").exists():
            assert json.loads((folder / "frames.json").read_text())["count"] == len(pictures)
            assert hidden(folder) == []
        else:
            assert hidden(folder) == [".frames.lock.forcingkv"]

    each_write(write, check, least=7)
    names = [*(f"frame-00000{number}.png" for number in (1, 2, 3)), "frames.json"]
    assert sorted(os.listdir(quick / "frames")) == names


def test_a_video_keeps_its_whole_fragments(quick: Path) -> None:
    import av

    path = quick / "a.mp4"

    def write() -> None:
        with Mp4Writer(path, 8.0) as writer:
            writer.write(FRAMES[:1])
            writer.write(FRAMES[1:])

    lengths = []

    def check(_: InputError) -> None:
        assert os.listdir(quick) in ([], ["a.mp4"])
        if path.exists():
            with av.open(io.BytesIO(path.read_bytes())) as video:
                lengths.append(sum(1 for _ in video.decode(video=0)))
            path.unlink()

    each_write(write, check, least=4)
    assert set(lengths) == {1}, "the first fragment alone"
    with av.open(str(path)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 3


def test_a_full_disk_is_one(quick: Path) -> None:
    """That the faults of these tests happen at all, and half of a write is there."""
    disk: Any = FullDisk(0)
    with disk.mounted(), pytest.raises(OSError, match="No space left"):
        (quick / "a").write_bytes(b"1234")
    assert (disk.was_full, (quick / "a").read_bytes()) == (True, b"12")
