"""A role that the product does not ship, added as docs/extending.md says: one class on each side, one row.

`strided` keeps every k-th frame of the video, at most n of them, beside sink and transition frame. It goes
through everything that a role goes through, and nothing outside of this file knows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.export import export_bundle
from forcingkv.headmaps import InputError
from forcingkv.models.cache import HALVES, CleanPass, TorchRole, torch_half
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.plan import CachePlan, HeadGroup, build_plan, rows_name
from forcingkv.runtime.policies import Policy, load_policy
from forcingkv.runtime.recache import replayed
from forcingkv.runtime.roles import Role, Rows, Span
from forcingkv.runtime.spec import Geometry, ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.runtime.videos import OTHER, PROMPT, assert_same

POLICY = """
name = "strided"
summary = "every head sees the sink, the transition frame, and every k-th frame between"

[groups]
all = [
    { role = "sink", frames = 1 },
    { role = "strided", every = 3, frames = 2 },
    { role = "recent", frames = 1 },
]
"""


@dataclass(frozen=True)
class Strided(Role):
    """Every k-th frame of the video that is not in the sink: the newest n of them."""

    every: int
    """Divides the frames of a chunk, so that each chunk gives as many: every phase has static shapes."""
    frames: int

    name: ClassVar[str] = "strided"
    takes_rows: ClassVar[bool] = True

    def kept(self, plan: CachePlan, group: HeadGroup, chunk: int) -> list[int]:
        """The frames that the chunk sees."""
        opening = sum(role.opening_frames(plan.spec) for role in group.roles)
        past = range(0, chunk * plan.spec.frames_per_chunk, self.every)
        return [frame for frame in past if frame >= opening][-self.frames :]

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        return plan.frame_tokens * len(self.kept(plan, group, chunk))

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * self.frames

    def spans(
        self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Sequence[int] | None
    ) -> list[Span]:
        return [Span(frame, plan.frame_tokens) for frame in self.kept(plan, group, chunk)]

    def rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        first = chunk * plan.spec.frames_per_chunk
        opening = sum(role.opening_frames(plan.spec) for role in group.roles)
        frames = range(0, plan.spec.frames_per_chunk, self.every)
        tokens = [
            np.arange(frame * plan.frame_tokens, (frame + 1) * plan.frame_tokens)
            for frame in frames
            if first + frame >= opening
        ]
        return np.concatenate([np.empty(0), *tokens]).astype(np.int32)

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return 0, -(-self.frames * self.every // spec.frames_per_chunk)

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        if self.every < 1 or spec.frames_per_chunk % self.every:
            expected = f"a divisor of {spec.frames_per_chunk}"
            raise InputError(f"every {self.every} frames are kept", where=where, expected=expected)


class TorchStrided(TorchRole):
    of = Strided

    def advance(self, role: Strided, done: CleanPass) -> KeysValues:
        if done.rows is not None:
            rows = done.rows[rows_name(done.group, role)]
        else:
            assert done.chunk is not None
            rows = torch.from_numpy(role.rows(done.plan, done.group, done.chunk))
        newest = slice(-role.steady_tokens(done.plan, done.group), None)
        pairs = zip(done.held[role.name], done.new, strict=True)
        joined = [torch.cat([old, new.index_select(2, rows)], 2) for old, new in pairs]
        return KeysValues(*(part[:, :, newest] for part in joined))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """What a role's two modules do when they are imported."""
    Role.KINDS[Strided.name] = Strided
    torch_half(TorchStrided)
    yield
    del Role.KINDS[Strided.name], HALVES[Strided.name]


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    file = tmp_path / "strided.toml"
    file.write_text(POLICY)
    return load_policy(str(file))


def spec_of_two_layers() -> ModelSpec:
    return small_spec(layers=2)


@pytest.fixture
def plan(policy: Policy) -> CachePlan:
    spec = spec_of_two_layers()
    return build_plan(spec, spec.geometry(), policy)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strided")
    (folder / "strided.toml").write_text(POLICY)
    Role.KINDS[Strided.name] = Strided
    torch_half(TorchStrided)
    spec = spec_of_two_layers()
    policy = load_policy(str(folder / "strided.toml"))
    # Verified: every graph is compared with torch in every phase.
    export_bundle(spec, random_model(spec).state_dict(), policy, folder / "bundle")
    return folder / "bundle"


def test_the_plan_asks_it(plan: CachePlan) -> None:
    frames = [[n // plan.frame_tokens for *_, n in plan.phase(chunk).tokens] for chunk in range(5)]
    assert frames == [[0, 0, 0], [1, 0, 1], [1, 1, 1], [1, 2, 1], [1, 2, 1]]
    assert [phase.first_chunk for phase in plan.phases] == [0, 1, 2, 3]
    group = plan.layers[0][0]
    seen = [[s.frame for role in group.roles for s in role.spans(plan, group, n, None)] for n in range(1, 6)]
    assert seen == [[0, 2], [0, 3, 5], [0, 3, 6, 8], [0, 6, 9, 11], [0, 9, 12, 14]]


def test_a_policy_that_it_does_not_fit_is_refused(policy: Policy) -> None:
    spec = small_spec(frames_per_chunk=4, attended_frames=16)
    with pytest.raises(InputError, match="every 3 frames are kept; expected a divisor of 4"):
        build_plan(spec, spec.geometry(), policy)


def test_bytes_are_counted(plan: CachePlan, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    parts = footprint(opened.manifest, opened.plan)
    one = 4 * 2 * plan.spec.dim * plan.frame_tokens * plan.spec.layers  # a frame's keys and values
    assert (parts["kv_sink"], parts["kv_strided"], parts["kv_recent"]) == (one, 2 * 2 * one, 2 * one)
    with Session.open(opened) as session:
        assert session.rehearse(9).cache_bytes == 7 * one


def test_the_recorder_names_its_frames(plan: CachePlan) -> None:
    model = random_model(plan.spec)
    text = torch.from_numpy(encode_words(plan.spec, PROMPT))
    rows = record_sample(model, plan, text, 1, 0, 5)
    last = rows.filter(rows["chunk"] == 4).row(0, named=True)
    assert list(zip(last["role"], last["key_frame"], strict=True)) == [
        ("sink", 0),
        ("strided", 6),
        ("strided", 9),
        ("recent", 11),
        *(("current", n) for n in (12, 13, 14)),
    ]
    assert sum(last["mass"]) == pytest.approx(1, abs=1e-5)


def test_a_session_makes_the_video_that_torch_makes(plan: CachePlan, bundle: Path) -> None:
    text = torch.from_numpy(encode_words(plan.spec, PROMPT))
    wanted = list(generate(random_model(plan.spec), plan, text, seeded_noise(plan, 7), 6))
    with Session.open(bundle) as session:
        for chunk, known in zip(session.generate(PROMPT, seed=7, chunks=6), wanted, strict=True):
            np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=1e-3, rtol=0)


def test_a_saved_video_goes_on_to_the_bit(bundle: Path, tmp_path: Path) -> None:
    with Session.open(bundle) as session:
        whole = list(session.generate(PROMPT, seed=7, chunks=7))
        for at in (1, 3, 5):
            video = session.generate(PROMPT, seed=7, chunks=7)
            list(islice(video, at))
            video.save(tmp_path / str(at))
            assert_same(list(session.restore(tmp_path / str(at))), whole[at:])


def test_a_switch_rebuilds_the_frames_it_holds(plan: CachePlan, bundle: Path) -> None:
    """The newest chunks are enough: what they leave is of the same frames as what the whole video left."""
    group = plan.layers[0][0]
    for made in range(12):
        chunks = replayed(plan, made)
        known = [chunk * 3 + frame for chunk in chunks for frame in range(3)]
        for role in group.roles:
            held, again = (role.spans(plan, group, n, None) for n in (made, len(chunks)))
            assert [known[span.frame] for span in again] == [span.frame for span in held]
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=8)
        list(islice(video, 5))
        assert video.switch(OTHER) == 5
        assert [chunk.index for chunk in video] == [5, 6, 7]
        same = session.generate(PROMPT, seed=7, chunks=3)
        first = list(islice(same, 2))
        same.switch(PROMPT)
        assert_same([*first, *same], list(session.generate(PROMPT, seed=7, chunks=3)))


def test_the_manifest_says_it(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    assert {"role": "strided", "every": 3, "frames": 2} in data["policy"]["groups"]["all"]
