"""Sessions whose positions are relative to the window: against torch, saved and restored, switched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.wan import WanModel
from forcingkv.runtime import Bundle, Session, chunks
from forcingkv.runtime.graph_records import TURN
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, headmap_of, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import On
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ, video_of

SPEC = small_spec(layers=2)
POLICY = replace(load_policy("forcing-kv"), positions="relative")
"""Its window has 8 frames: chunks begin at 0, 3, 5, 5, ..."""
MAP = headmap_of(SPEC, [[0], [1]])


@pytest.fixture(scope="module")
def bundle() -> Path:
    weights = random_model(SPEC).state_dict()
    return shared_bundle(SPEC, weights, POLICY, headmap=MAP, verify=False)  # whole videos are compared below


def test_a_session_makes_the_video_that_torch_makes(bundle: Path, on: On) -> None:
    state = permute_heads(random_model(SPEC).state_dict(), SPEC, head_orders(SPEC, POLICY, MAP))
    model, text = WanModel(SPEC), torch.from_numpy(encode_words(SPEC, PROMPT))
    model.load_state_dict(state)
    with on.open(bundle) as session:
        made = video_of(session, 9)
        plan = session.plan
    assert plan.window_frames == 8
    for chunk, known in zip(made, generate(model, plan, text, seeded_noise(plan, 7), 9), strict=True):
        np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=2e-5, rtol=0)
    with on.open(small_bundle("forcing-kv")) as session:
        absolute = video_of(session, 9)
    apart = [float(np.abs(a.latents - b.latents).max()) for a, b in zip(made, absolute, strict=True)]
    assert max(apart[:2]) <= 1e-5, "the first window"
    assert min(apart[2:]) > 1e-4


def test_it_goes_on_to_the_bit_when_restored(bundle: Path, on: On, tmp_path: Path) -> None:
    with on.open(bundle) as session:
        whole = video_of(session, 7)
        for saved_after in (1, 4):
            video = session.generate(PROMPT, seed=7, chunks=7)
            list(islice(video, saved_after))
            video.save(tmp_path / str(saved_after))
        for saved_after in (1, 4):
            assert_same(session.restore(tmp_path / str(saved_after)), whole[saved_after:])


def test_a_cache_that_is_made_anew_begins_at_position_0(
    bundle: Path, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    rotary = chunks.positions.rotary

    def watched(spec: Any, geometry: Any, first: int, frames: int) -> Any:
        began.append(first)
        return rotary(spec, geometry, first, frames)

    monkeypatch.setattr(chunks.positions, "rotary", watched)
    with on.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=20)
        before = list(islice(video, 5))
        assert began == [0, 3, 5, 5, 5]
        video.switch(OTHER)
        list(islice(video, 2))
        # The first chunk and the two newest are encoded again, as if the video had begun with them.
        assert began[5:] == [0, 3, 5, 5, 5]
        again = video_of(session, 5)
    assert_same(again, before)


def test_switched_to_the_same_prompt_from_the_start_nothing_changes(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        plain = video_of(session, 6)
        video = session.generate(PROMPT, seed=7, chunks=6)
        first = list(islice(video, 3))
        video.switch(PROMPT)  # all chunks so far are encoded again, in the same places
        for chunk, known in zip([*first, *video], plain, strict=True):
            np.testing.assert_allclose(chunk.latents, known.latents, atol=1e-6, rtol=0)


def test_only_such_graphs_are_told_how_keys_move(bundle: Path) -> None:
    inputs = Bundle.open(bundle).manifest.graphs["step"].inputs
    assert {name: inputs[name].shape for name in TURN} == dict.fromkeys(TURN, (SPEC.head_dim,))
    assert not set(TURN) & set(Bundle.open(small_bundle("forcing-kv")).manifest.graphs["step"].inputs)


def test_passes_are_timed_at_any_chunk(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        timer = session.pass_timer(40)
        assert min(timer.denoise(), timer.fill()) > 0
        assert not differ(video_of(session, 1)[0], video_of(session, 1)[0])


def test_inspect_says_what_positions_are_counted_from(bundle: Path, run: Callable[..., Ran]) -> None:
    assert "positions   relative to the window of 8 frames" in run("inspect", bundle).out
    plain = run("inspect", small_bundle("forcing-kv")).out
    assert "positions   absolute: from the start of the video" in plain


def test_a_manifest_with_another_word_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert text.count('"relative"') == 1
    manifest.write_text(text.replace('"relative"', '"absolute"'))
    with pytest.raises(InputError, match="turn_cosines"):
        Session.open(folder)
    manifest.write_text(text.replace('"relative"', '"sideways"'))
    with pytest.raises(InputError, match="positions is 'sideways'; expected 'absolute' or 'relative'"):
        Session.open(folder)
