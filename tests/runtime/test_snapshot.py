"""Saved videos: restored they go on to the bit, a state on disk is always whole, and no other is taken."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Chunk, Session
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.snapshot import own_digest
from tests.runtime.lanes import ONNX, TORCH, Ahead, On, OwnState, Plain
from tests.runtime.videos import (
    BUNDLES,
    OTHER,
    PROMPT,
    assert_same,
    differ,
    files,
    python,
    state_in,
    video_of,
)

Bundles = Callable[[str], Path]
CHUNKS = 10


@pytest.fixture
def saved(on: On, bundles: Bundles, tmp_path: Path) -> Path:
    """The state of a video after three of its chunks."""
    with on.open(bundles("forcing-kv")) as session:
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for _ in range(3):
            next(video)
        video.save(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture(scope="module")
def opened(
    on: On, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, list[Chunk], Path]]:
    """A session, a video of it, and the state of a longer one after three of its chunks."""
    with on.open(bundles("forcing-kv")) as session:
        state = tmp_path_factory.mktemp("saved") / "state"
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for _ in range(3):
            next(video)
        video.save(state)
        yield session, video_of(session, 5), state


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("lane", [Plain, Ahead])
def test_a_restored_video_goes_on_to_the_bit(
    on: On, bundles: Bundles, tmp_path: Path, name: str, lane: type
) -> None:
    """Saved before each chunk, in all phases of the cache, and with a chunk that is ready, where one is."""
    session, _ = on.open_with(bundles(name), lane)
    goes_on_to_the_bit(session, tmp_path)


@pytest.mark.parametrize("name", BUNDLES)
def test_with_state_in_onnx_runtimes_own_memory_it_goes_on_to_the_bit(
    bundles: Bundles, tmp_path: Path, name: str
) -> None:
    session, _ = ONNX.open_with(bundles(name), OwnState)
    goes_on_to_the_bit(session, tmp_path)


def goes_on_to_the_bit(session: Session, tmp_path: Path) -> None:
    """What is restored makes the next chunk and the next state, and so all others."""
    with session:
        wanted = video_of(session, CHUNKS)
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for index in range(CHUNKS):
            if index < 8:
                video.save(tmp_path / str(index))
            assert_same([next(video)], wanted[index : index + 1])
        for index in range(8):
            restored = session.restore(tmp_path / str(index))
            assert (restored.index, restored.seed, restored.chunks) == (index, 7, CHUNKS)
            if index in (0, 7):
                assert_same(restored, wanted[index:])
                continue
            assert_same([next(restored)], wanted[index : index + 1])
            restored.save(tmp_path / "again" / str(index + 1))
            assert state_in(tmp_path / "again" / str(index + 1)) == state_in(tmp_path / str(index + 1))


def test_any_lane_goes_on_with_a_chunk_that_was_ready(on: On, bundles: Bundles, tmp_path: Path) -> None:
    ahead, _ = on.open_with(bundles("taehv"), Ahead)
    with ahead:
        video = ahead.generate(PROMPT, seed=7, chunks=CHUNKS)
        for _ in range(3):
            next(video)
        video.save(tmp_path)
    assert [one["index"] for one in json.loads((tmp_path / "state.json").read_text())["ready"]] == [3]
    with on.open(bundles("taehv"), threads=1) as session:
        wanted = video_of(session, CHUNKS)
        assert_same(session.restore(tmp_path), wanted[3:])
        video = session.restore(tmp_path)
        video.save(tmp_path / "again")
        assert_same(video, wanted[3:])
        assert_same(session.restore(tmp_path / "again"), wanted[3:])


GO_ON = """
import sys
import numpy as np
from forcingkv.runtime import Session

with Session.open(sys.argv[1], backend=sys.argv[4]) as session:
    chunks = list(session.restore(sys.argv[2]))
np.savez(sys.argv[3], latents=[c.latents for c in chunks], frames=np.concatenate([c.frames for c in chunks]))
"""


@pytest.mark.parametrize(
    ("on", "name"),
    [
        (ONNX, "forcing-kv"),
        (ONNX, "taehv"),
        pytest.param(TORCH, "taehv", marks=pytest.mark.long),  # a process that loads torch takes seconds
    ],
    indirect=["on"],
    ids=lambda value: getattr(value, "name", value),
)
def test_another_process_goes_on_to_the_bit(on: On, bundles: Bundles, tmp_path: Path, name: str) -> None:
    with on.open(bundles(name)) as session:
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for _ in range(3):
            next(video)
        video.switch(OTHER)
        next(video)
        video.save(tmp_path / "state")
        wanted = list(video)
    python(GO_ON, bundles(name), tmp_path / "state", tmp_path / "found.npz", on.name)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["latents"], np.stack([chunk.latents for chunk in wanted]))
    np.testing.assert_array_equal(found["frames"], np.concatenate([chunk.frames for chunk in wanted]))


@pytest.mark.parametrize("name", BUNDLES)
def test_a_restored_video_switches_as_the_one_that_was_saved(
    on: On, bundles: Bundles, tmp_path: Path, name: str
) -> None:
    with on.open(bundles(name)) as session:
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for _ in range(6):
            next(video)
        video.save(tmp_path)
        video.switch(OTHER)
        wanted = list(video)
        for _ in range(2):
            video = session.restore(tmp_path)
            assert video.switch(OTHER) == 6
            assert_same(video, wanted)
        assert differ(next(session.restore(tmp_path)), wanted[0])


def test_numbers_of_numpy_are_saved_too(on: On, bundles: Bundles, tmp_path: Path) -> None:
    with on.open(bundles("forcing-kv")) as session:
        video = session.generate(PROMPT, seed=np.int64(7), chunks=np.int32(CHUNKS))  # type: ignore[arg-type]
        next(video)
        video.save(tmp_path)
        wanted = list(video)
        assert_same(session.restore(tmp_path), wanted)


def test_a_state_takes_the_place_of_the_one_before(on: On, bundles: Bundles, tmp_path: Path) -> None:
    """Of the same chunk too, and beside what a process that was killed has left."""
    with on.open(bundles("forcing-kv")) as session:
        for seed in (1, 2, 3, 4):
            video = session.generate(PROMPT, seed=seed, chunks=5)
            next(video)
            (tmp_path / ".state-000009.safetensors.partial").write_bytes(b"half")
            (tmp_path / "state-000001.safetensors").touch()
            (tmp_path / ".state.json.partial").write_bytes(b"half")
            before = set(files(tmp_path))
            video.save(tmp_path)
            used = json.loads((tmp_path / "state.json").read_text())["tensors"]
            assert used not in before, "the file in use is not written to"
            assert {path.name for path in tmp_path.iterdir()} <= {"state.json", used, ".state.json.partial"}
            wanted = list(video)
            assert_same(session.restore(tmp_path), wanted)


@pytest.mark.parametrize("name", ["notes.txt", "state-of-the-art.txt", "state-1.json", ".state"])
def test_a_folder_of_other_files_is_left_alone(on: On, bundles: Bundles, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session, 3)
        video = session.generate(PROMPT, seed=7, chunks=3)
        found = [next(video)]
        with pytest.raises(InputError, match="holds other files than a saved state"):
            video.save(tmp_path)
        with pytest.raises(InputError, match="cannot be written"):
            video.save(tmp_path / name)
        assert files(tmp_path) == {name: b"mine"}
        assert_same([*found, *video], wanted)


def test_noise_of_ones_own_cannot_be_saved(on: On, bundles: Bundles, tmp_path: Path) -> None:
    def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
        return chunk_noise(7, chunk, step, shape)

    with on.open(bundles("forcing-kv")) as session:
        wanted = video_of(session, 3)
        video = session.generate(PROMPT, seed=1, chunks=3, noise=noise)
        found = [next(video)]
        with pytest.raises(InputError, match="noise source of its own"):
            video.save(tmp_path / "state")
        assert list(tmp_path.iterdir()) == []
        assert_same([*found, *video], wanted)


def edit(sign: bool = True, **changes: Any) -> Callable[[Path], object]:
    """Changes fields of state.json: by hand, or as if it had been saved so (None: the field is not there)."""

    def apply(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text()) | changes
        state = {name: value for name, value in state.items() if value is not None or name == "seed"}
        state |= {"digest": own_digest(state)} if sign else {}
        (folder / "state.json").write_text(json.dumps(state))

    return apply


def text(number: int) -> dict[str, Any]:
    return {"prompt": {"digest": "0" * 64}, "recache": True, "chunk": number}


def tensors(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(next(folder.glob("*.safetensors")))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


READY = {"index": 3, "timing": {"denoise": 0.0, "clean": 0.0, "decode": 0.0, "total": 0.0}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "holds no saved state"),
        (lambda folder: (folder / "state.json").unlink(), "holds no saved state"),
        (lambda folder: (folder / "state.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "state.json").write_text("[" * 100_000), "is not JSON"),
        (lambda folder: (folder / "state.json").write_text("[]"), "a table of fields"),
        (tensors(Path.unlink), "is missing, or not the file that was saved"),
        (tensors(flip), "is missing, or not the file that was saved"),
        (tensors(lambda path: os.truncate(path, 100)), "is missing, or not the file that was saved"),
        (edit(tensors="../state.safetensors"), "is not inside the folder"),
        (edit(tensors="state.json"), "is missing, or not the file that was saved"),
        (edit(bundle="0" * 64), "was saved of the bundle 000000000000"),
        (edit(schema="forcingkv.snapshot/2"), "expected 'forcingkv.snapshot/1'"),
        (edit(extra=1), "unknown field 'extra'"),
        (edit(seed=None), "expected a value of type int"),
        (edit(seed=-1), "seed is -1"),
        (edit(index=2), "do not go together"),
        (edit(index=-1, made=-1), "do not go together"),
        (edit(index=4, made=4, decoder_calls=4), "has no tensor latents/3"),
        (edit(index=10**12, made=10**12, decoder_calls=10**12), "has no tensor latents/"),
        (edit(made=4), "do not go together"),
        (edit(made=4, decoder_calls=4, ready=[READY]), "has no tensor latents/3"),
        (edit(passes=2), r"has cache/cache\.1\.dynamic\.retained\.keys of the shape"),
        (edit(passes=4), "do not go together"),
        (edit(decoder_calls=2), "do not go together"),
        (edit(ready=[READY]), "do not go together"),
        (edit(switches=[text(4)]), "do not go together"),
        (edit(switches=[text(2), text(1)]), "do not go together"),
        (edit(planned=[text(2)]), "do not go together"),
        (edit(planned=[text(4), text(4)]), "do not go together"),
        (edit(planned=[text(4)]), "has no tensor planned/0"),
        (edit(notes={"a": 1}), "expected a value of type str"),
        (edit(sign=False, seed=1), "was changed: it is not what its own digest says"),
        (edit(sign=False, chunks=11), "was changed: it is not what its own digest says"),
        (edit(sign=False, prompt={"digest": "0" * 64}), "was changed"),
        (edit(sign=False, notes={"a": "b"}), "was changed"),
        (edit(sign=False, digest="0" * 64), "was changed"),
    ],
)
def test_a_state_that_is_damaged_or_foreign_changes_nothing(
    opened: tuple[Session, list[Chunk], Path],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    session, wanted, state = opened
    spoilt = shutil.copytree(state, tmp_path / "state")
    spoil(spoilt)
    before = files(spoilt) if spoilt.is_dir() else {}
    running = session.generate(PROMPT, seed=7, chunks=5)
    found = [next(running), next(running)]
    with pytest.raises(InputError, match=message):
        session.restore(spoilt)
    assert_same([*found, *running], wanted)
    assert (files(spoilt) if spoilt.is_dir() else {}) == before


def test_a_state_of_another_bundle_is_named(on: On, bundles: Bundles, saved: Path) -> None:
    with (
        on.open(bundles("window")) as session,
        pytest.raises(InputError, match="was saved of the bundle"),
    ):
        session.restore(saved)


SAVE_ON = """
import sys
from forcingkv.runtime import Session

with Session.open(sys.argv[1], threads=1, backend=sys.argv[4]) as session:
    video = session.generate(sys.argv[3], seed=7)
    for chunk in video:
        video.save(sys.argv[2])
        print(chunk.index, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_a_whole_state(
    on: On, bundles: Bundles, tmp_path: Path
) -> None:
    if on.name == "torch":
        pytest.skip("what writes the files is the same, and each of four processes would load torch")
    chance = random.Random(0)
    with on.open(bundles("forcing-kv"), threads=1) as session:
        for _ in range(4):
            with subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SAVE_ON,
                    str(bundles("forcing-kv")),
                    str(tmp_path / "state"),
                    PROMPT,
                    on.name,
                ],
                stdout=subprocess.PIPE,
                text=True,
            ) as process:
                assert process.stdout
                for _ in range(chance.randint(1, 6)):
                    process.stdout.readline()
                time.sleep(chance.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                told = process.stdout.read().split()
            restored = session.restore(tmp_path / "state")
            index = restored.index
            assert index >= max(map(int, told), default=0)
            found = next(restored)
            assert_same([found], video_of(session, index + 1)[index:])
