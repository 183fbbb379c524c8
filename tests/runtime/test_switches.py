"""Switches that encode newest frames anew, and those that fade: what a session does, on the backend torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from forcingkv.headmaps import InputError
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import Chunk, Session, Video, positions
from forcingkv.runtime.kv.rebuild import encoding, kept_chunks
from forcingkv.runtime.snapshot import own_digest
from forcingkv.runtime.spec import Recache
from forcingkv.runtime.text import TextInput, encode_words
from tests.conftest import random_model
from tests.runtime.lanes import ONNX, TORCH, Ahead
from tests.runtime.test_torch_backend import kv_of
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ, video_of

Bundles = Callable[[str], Path]
KINDS: tuple[Recache, ...] = ("keep-sink", "empty-sink")
THIRD = "e a"
LONG = pytest.mark.long


@pytest.fixture(scope="module", params=["forcing-kv", pytest.param("window", marks=LONG)])
def session(request: pytest.FixtureRequest, bundles: Bundles) -> Iterator[Session]:
    with TORCH.open(bundles(request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def window(bundles: Bundles) -> Iterator[Session]:
    with TORCH.open(bundles("window")) as opened:
        yield opened


def begun(session: Session, chunks: int, of: int = 9) -> tuple[Video, list[Chunk]]:
    video = session.generate(PROMPT, seed=7, chunks=of)
    return video, list(islice(video, chunks))


@pytest.mark.parametrize(("made", "how"), [(2, "keep-sink"), (6, "keep-sink"), (6, "empty-sink")])
def test_the_cache_is_that_of_one_pass_without_a_mask(window: Session, made: int, how: Recache) -> None:
    """Each frame that is encoded sees all of them, and the sink of the old prompt where it stays."""
    plan, spec, model = window.plan, window.spec, random_model(window.spec)
    video, chunks = begun(window, made)
    before = kv_of(window)
    video.switch(OTHER, recache=how)
    one, after = encoding(plan, made, keep_sink=how == "keep-sink"), kv_of(window)
    latents = torch.from_numpy(np.concatenate([chunk.latents for chunk in chunks], 2)[:, :, one.first :])
    rotary = positions.rotary(spec, plan.geometry, one.first, one.frames)
    time = torch.from_numpy(positions.time_features(spec, np.array([[0.0]])))
    made_anew: list[KeysValues] = []

    def attend(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
        made_anew.append(current)
        sink = [torch.from_numpy(before[f"cache.{layer}.all.sink.{part}"]) for part in ("keys", "values")]
        seen = [torch.cat(pair, 2) for pair in zip(sink, current, strict=True)] if one.keeps_sink else current
        return F.scaled_dot_product_attention(queries, *seen)

    with torch.no_grad():
        prompt = model.prompt(torch.from_numpy(encode_words(spec, OTHER)))
        model.flow(latents, time, tuple(map(torch.from_numpy, rotary)), prompt, attend)
    for entry in plan.entries:
        new = getattr(made_anew[entry.layer], entry.part).numpy()
        tokens = plan.tokens(entry.group, entry.role, one.passes)
        if entry.role.name == "sink":
            wanted = before[entry.name] if one.keeps_sink else new[:, :, :tokens]
        else:
            wanted = new[:, :, new.shape[2] - tokens :]
        np.testing.assert_allclose(after[entry.name], wanted, rtol=0, atol=1e-5, err_msg=entry.name)


@pytest.mark.parametrize(
    ("at", "how"),
    [
        (1, "keep-sink"),
        (5, "empty-sink"),
        *(
            pytest.param(*one, marks=LONG)
            for one in ((2, "keep-sink"), (5, "keep-sink"), (1, "empty-sink"), (2, "empty-sink"))
        ),
    ],
)
def test_at_any_chunk_and_again_and_from_a_saved_state(
    session: Session, at: int, how: Recache, tmp_path: Path
) -> None:
    """Before the cache is full, after, and twice: planned or not, saved on the way or not, to the bit."""
    video, wanted = begun(session, at, at + 4)
    assert video.switch(OTHER, recache=how) == at
    wanted += islice(video, 2)
    video.switch(THIRD, recache=how)
    wanted += video
    assert all(np.isfinite(chunk.latents).all() for chunk in wanted)
    planned = session.generate(PROMPT, seed=7, chunks=at + 4)
    planned.switch(OTHER, recache=how, at=at)
    planned.switch(THIRD, recache=how, at=at + 2)
    found = []
    for chunk in planned:
        found.append(chunk)
        if planned.index >= at:
            planned.save(tmp_path / str(planned.index))
    assert_same(found, wanted)
    for index in (at, at + 1, at + 2, at + 3):
        restored = session.restore(tmp_path / str(index))
        assert [switch.recache for switch in restored.switches] == [how, how]
        assert_same(restored, wanted[index:])


@LONG
def test_the_ways_differ_and_none_is_the_default_of_this_model(session: Session) -> None:
    made = {}
    for how in ("replay", *KINDS, "none", True, False, None):
        video, _ = begun(session, 5, 6)
        video.switch(OTHER, recache=how)  # type: ignore[arg-type]
        made[how] = next(video)
        assert video.switches[0].recache == {True: "replay", None: "replay", False: "none"}.get(how, how)  # type: ignore[arg-type]
    words = [made[how] for how in ("replay", *KINDS, "none")]
    assert all(differ(one, other) for one in words for other in words if one is not other)
    assert not differ(made[None], made["replay"])
    assert not differ(made[True], made["replay"])
    assert not differ(made[False], made["none"])


@LONG
def test_on_lanes_that_look_ahead(bundles: Bundles) -> None:
    made = []
    for kind in (Ahead, None):
        session = TORCH.open_with(bundles("window"), kind)[0] if kind else TORCH.open(bundles("window"))
        with session:
            video = session.generate(PROMPT, seed=7, chunks=7)
            video.switch(OTHER, recache="keep-sink", at=5, fade=1)
            made.append(list(video))
    assert_same(*made)


def test_before_the_first_chunk_there_is_nothing_to_encode(session: Session) -> None:
    wanted = list(session.generate(OTHER, seed=7, chunks=2))
    video = session.generate(PROMPT, seed=7, chunks=2)
    video.switch(OTHER, recache="keep-sink")
    assert_same(video, wanted)


def test_what_a_session_or_a_video_cannot_do_is_refused_and_changes_nothing(bundles: Bundles) -> None:
    with ONNX.open(bundles("window")) as session:
        wanted = video_of(session, 4)
        video, found = begun(session, 2, 4)
        for how in KINDS:
            for at in (None, 3):
                with pytest.raises(
                    InputError, match=f"recache is {how}, for which this session has no graph"
                ):
                    video.switch(OTHER, recache=how, at=at)
        with pytest.raises(InputError, match="recache is 'always'; expected 'replay' or 'keep-sink' or"):
            video.switch(OTHER, recache="always")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="fade is -1"):
            video.switch(OTHER, fade=-1)
        assert video.switches == ()
        assert_same([*found, *video], wanted)


def test_states_that_need_that_pass_are_refused_where_there_is_none(bundles: Bundles, tmp_path: Path) -> None:
    """A state of the backend torch on ONNX Runtime: what comes would fail in the midst of the video."""
    with TORCH.open(bundles("forcing-kv")) as session:
        told = {}
        for name, options in {
            "planned": {"recache": "keep-sink", "at": 8},
            "fading": {"recache": "keep-sink", "fade": 3},
            "hollow": {"recache": "empty-sink"},
            "made": {"recache": "keep-sink"},
        }.items():
            video, _ = begun(session, 5, 10)
            video.switch(OTHER, **options)  # type: ignore[arg-type]
            if name != "hollow":
                next(video)
            video.save(tmp_path / name)
            told[name] = list(video)
    with ONNX.open(bundles("forcing-kv")) as session:
        for name in ("planned", "fading", "hollow"):
            with pytest.raises(InputError, match="for which this session has no graph"):
                session.restore(tmp_path / name)
        for one, other in zip(session.restore(tmp_path / "made"), told["made"], strict=True):
            np.testing.assert_allclose(one.latents, other.latents, atol=1e-4)


def earlier(folder: Path, **changes: Any) -> None:
    """Makes a state one of an earlier version: yes and no for words, and without what it did not know."""
    state = json.loads((folder / "state.json").read_text())
    for switch in [*state["switches"], *state["planned"]]:
        switch["recache"] = switch["recache"] != "none"
    state = {**state, **changes}
    state = {name: value for name, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(state | {"digest": own_digest(state)}))


def test_switches_of_earlier_versions_were_replays(session: Session, tmp_path: Path) -> None:
    video, wanted = begun(session, 2)
    video.switch(OTHER)
    video.switch(THIRD, recache=False, at=4)
    wanted += islice(video, 1)
    video.save(tmp_path)
    wanted += video
    earlier(tmp_path)
    restored = session.restore(tmp_path)
    assert [switch.recache for switch in restored.switches] == ["replay", "none"]
    assert_same(restored, wanted[3:])


def test_a_state_without_the_latents_that_are_asked_for(
    window: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of earlier versions, which kept what a replay needs."""
    video, _ = begun(window, 8, 20)
    with monkeypatch.context() as patch:
        patch.setattr("forcingkv.runtime.streaming.kept_chunks", lambda plan, made: (0, made - 2, made - 1))
        next(video)
        video.save(tmp_path)
    assert kept_chunks(window.plan, 9) == (0, 5, 6, 7, 8)
    restored = window.restore(tmp_path)
    with pytest.raises(InputError, match="does not have the latents of chunk 6"):
        restored.switch(OTHER, recache="keep-sink")
    restored.switch(OTHER, recache="keep-sink", at=10)
    assert len(list(islice(restored, 3))) == 3


def blended(session: Session, share: float) -> np.ndarray:
    old, new = (encode_words(session.spec, words) for words in (PROMPT, OTHER))
    return np.float32(1 - np.float32(share)) * old + np.float32(share) * new


@pytest.mark.parametrize("how", ["keep-sink", *(pytest.param(way, marks=LONG) for way in ("replay", "none"))])
def test_a_fade_is_a_switch_to_each_blend(session: Session, how: Recache, tmp_path: Path) -> None:
    """Of three chunks: 3/4, 2/4 and 1/4 of the old prompt, then none; saved anywhere in it."""
    video = session.generate(PROMPT, seed=7, chunks=6)
    for chunk, share in ((2, 0.25), (3, 0.5), (4, 0.75)):
        video.switch(TextInput("both", blended(session, share)), recache=how, at=chunk)
    video.switch(OTHER, recache=how, at=5)
    wanted = list(video)
    video = session.generate(PROMPT, seed=7, chunks=6)
    video.switch(OTHER, recache=how, at=2, fade=3)
    assert str(video.switches[0]).startswith("'d e' from chunk 2 on, over 3 chunks of both")
    found = []
    for one in video:
        found.append(one)
        video.save(tmp_path / str(video.index))
    assert_same(found, wanted)
    for index in (1, 2, 4, 5):
        restored = session.restore(tmp_path / str(index))
        assert restored.switches == video.switches
        assert_same(restored, wanted[index:])


def test_another_switch_ends_a_fade(session: Session) -> None:
    """And another fade begins with what the video follows then."""
    video = session.generate(PROMPT, seed=7, chunks=5)
    video.switch(OTHER, at=2, fade=3)
    video.switch(THIRD, at=3, fade=1)
    third = encode_words(session.spec, THIRD)
    found = list(video)
    video = session.generate(PROMPT, seed=7, chunks=5)
    first = blended(session, 0.25)
    for chunk, text in ((2, first), (3, np.float32(0.5) * first + np.float32(0.5) * third), (4, third)):
        video.switch(text, at=chunk)
    assert_same(found, list(video))


def test_a_state_that_does_not_know_its_prompt_fades_nothing(session: Session, tmp_path: Path) -> None:
    video, wanted = begun(session, 3, 5)
    video.save(tmp_path)
    wanted += video
    earlier(tmp_path, prompt=None, switches=None, planned=None)
    restored = session.restore(tmp_path)
    with pytest.raises(InputError, match="does not keep the prompt's embeddings, so nothing fades"):
        restored.switch(OTHER, fade=2)
    assert_same(restored, wanted[3:])
