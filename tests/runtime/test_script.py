"""A video's prompts: switches that are planned, what states keep of them, and saves that fail."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import MemoryShortError, Session
from forcingkv.runtime.script import PromptRecord
from forcingkv.runtime.tensors import TensorWriter
from forcingkv.runtime.text import TextInput, encode_words
from tests.runtime.lanes import Ahead, On, Plain
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ, state_in, video_of

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def session(on: On, bundles: Bundles) -> Iterator[Session]:
    with on.open(bundles("forcing-kv")) as opened:
        yield opened


@pytest.mark.parametrize("recache", [True, False])
@pytest.mark.parametrize("lane", [Plain, Ahead])
def test_a_planned_switch_is_made_with_its_chunk_on_every_lane(
    on: On, bundles: Bundles, lane: type, recache: bool, tmp_path: Path
) -> None:
    """As if it had been asked for between two chunks on a CPU; and so after the video was saved."""
    with on.open(bundles("taehv")) as plain:
        video = plain.generate(PROMPT, seed=7, chunks=7)
        wanted = [next(video) for _ in range(4)]
        assert video.switch(OTHER, recache=recache) == 4
        wanted += list(video)
    session, _ = on.open_with(bundles("taehv"), lane)
    with session:
        video = session.generate(PROMPT, seed=7, chunks=7)
        assert video.switch(OTHER, recache=recache, at=4) == 4
        found = []
        for chunk in video:
            found.append(chunk)
            video.save(tmp_path / str(video.index))
        assert_same(found, wanted)
        for index in range(1, 7):
            restored = session.restore(tmp_path / str(index))
            assert restored.prompt == video.prompt
            assert restored.switches == video.switches
            if index in (1, 6):
                assert_same(restored, wanted[index:])
                continue
            # The next chunk and the next state, and so all others.
            assert_same([next(restored)], wanted[index : index + 1])
            restored.save(tmp_path / "again" / str(index + 1))
            assert state_in(tmp_path / "again" / str(index + 1)) == state_in(tmp_path / str(index + 1))


def test_what_a_video_says_of_its_prompts(session: Session, tmp_path: Path) -> None:
    array = encode_words(session.spec, OTHER)
    digest = hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
    video = session.generate(PROMPT, seed=7, chunks=6)
    assert video.prompt is not None
    assert video.prompt.text == PROMPT
    video.switch(TextInput("said so", array), at=4)
    next(video)
    video.switch(array)
    known = [(s.chunk, s.prompt, s.recache) for s in video.switches]
    assert known == [
        (1, PromptRecord(digest), "replay"),
        (4, PromptRecord(digest, "said so"), "replay"),
    ]
    video.save(tmp_path, notes={"a": "b"})
    assert session.restore(tmp_path).notes == {"a": "b"}
    next(session.restore(tmp_path))
    assert PromptRecord.of(session.spec, "D  e")[0].digest == digest, (
        "what the model gets, not how it is written"
    )


@pytest.mark.parametrize(
    ("at", "message"), [(1, "is 1, and 2 chunks were begun already"), (4, "is 4, with which")]
)
def test_a_switch_that_cannot_be_planned_changes_nothing(session: Session, at: int, message: str) -> None:
    wanted = video_of(session, 4)
    video = session.generate(PROMPT, seed=7, chunks=4)
    video.switch(OTHER, at=4)
    found = [next(video), next(video)]
    with pytest.raises(InputError, match=message):
        video.switch("a", at=at)
    assert_same([*found, *video], wanted)


def test_states_of_earlier_versions_are_restored(session: Session, tmp_path: Path) -> None:
    video = session.generate(PROMPT, seed=7, chunks=5)
    next(video)
    video.switch(OTHER)
    video.save(tmp_path)
    wanted = list(video)
    state = json.loads((tmp_path / "state.json").read_text())
    for name in ("prompt", "switches", "planned", "notes", "digest"):
        del state[name]
    (tmp_path / "state.json").write_text(json.dumps(state))
    restored = session.restore(tmp_path)
    assert (restored.prompt, restored.switches, restored.notes) == (None, (), {})
    restored.save(tmp_path / "again")
    assert session.restore(tmp_path / "again").prompt is None
    assert_same(session.restore(tmp_path), wanted)


@pytest.mark.parametrize("chunks", [-1, 1.5, math.nan, -math.inf])
def test_a_number_of_chunks_that_is_none_is_refused(session: Session, tmp_path: Path, chunks: float) -> None:
    wanted = video_of(session, 2)
    video = session.generate(PROMPT, seed=7, chunks=2)
    video.save(tmp_path)
    for begin in (
        lambda: session.generate("a", seed=7, chunks=chunks),
        lambda: session.restore(tmp_path, chunks=chunks),
    ):
        with pytest.raises(
            InputError, match=f"chunks is {chunks}; expected a whole number from 0 on, or None"
        ):
            begin()
    assert_same(video, wanted)


def test_infinity_is_without_end(session: Session, tmp_path: Path) -> None:
    video = session.generate(PROMPT, seed=7, chunks=math.inf)
    assert video.chunks is None
    video = session.generate(PROMPT, seed=7, chunks=1)
    video.save(tmp_path)
    endless = session.restore(tmp_path, chunks=math.inf)
    assert endless.chunks is None
    assert [next(endless).index for _ in range(3)] == [0, 1, 2]
    assert list(session.generate(PROMPT, seed=7, chunks=0)) == []


def fails_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "error", "raised"),
    [
        ((TensorWriter, "write"), FULL, InputError),
        ("forcingkv.runtime.snapshot.record_file", FULL, InputError),
        ("forcingkv.runtime.snapshot.write_text", FULL, InputError),
        ("forcingkv.runtime.snapshot.write_text", KeyboardInterrupt(), KeyboardInterrupt),
        ((TensorWriter, "write"), MemoryError(), MemoryShortError),
    ],
)
def test_a_save_that_fails_leaves_the_video_and_the_state_before(
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    error: Exception,
    raised: type[BaseException],
) -> None:
    wanted = video_of(session, 5)
    video = session.generate(PROMPT, seed=7, chunks=5)
    found = [next(video)]
    video.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found.append(next(video))
    with monkeypatch.context() as patch:
        if isinstance(place, str):
            patch.setattr(place, fails_with(error))
        else:
            patch.setattr(*place, fails_with(error))
        with pytest.raises(raised):
            video.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same([*found, *video], wanted)
    assert_same(session.restore(tmp_path), wanted[1:])


def test_the_words_of_a_prompt_are_one_with_their_embedding(session: Session) -> None:
    text = TextInput("anything", encode_words(session.spec, PROMPT))
    assert_same(list(session.generate(text, seed=7, chunks=2)), video_of(session, 2))
    with pytest.raises(InputError, match="prompt has the shape"):
        session.generate(TextInput("x", np.zeros((2, 2), np.float32)), seed=7)
    assert differ(next(session.generate(OTHER, seed=7)), video_of(session, 1)[0])
