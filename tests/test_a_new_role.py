"""A role that the product does not ship, added as docs/extending.md says, by the code that stands there.

`spaced` keeps every k-th frame of the video, at most n of them, beside sink and transition frame. It goes
the whole way of a role: plan, torch, footprint, recorder, export, session, saved state, switch of the prompt.
"""

from __future__ import annotations
import __future__

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.export import export_bundle
from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data
from forcingkv.models import kv, kv_roles
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.bundle import Manifest
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.kv import roles
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.rebuild import replayed
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The code block of the page in that language in which a word stands, as it is written there."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(next(text for text in blocks if word in text))


POLICY = block("toml", "spaced")
MODULE = "tests.spaced_of_the_page"
"""Where the classes of the page live: fields of dataclasses are looked up in their module."""


def add_the_role() -> None:
    """Run the two blocks of Python, each in what its file imports."""
    module = sys.modules[MODULE] = ModuleType(MODULE)
    for home, word in ((roles, "class Spaced(Role)"), (kv_roles, "class TorchSpaced(TorchRole)")):
        vars(module).update({name: value for name, value in vars(home).items() if not name.startswith("__")})
        # As in those files: annotations are text until a field is read.
        source = compile(
            block("python", word), "docs/extending.md", "exec", __future__.annotations.compiler_flag
        )
        exec(source, vars(module))


@pytest.fixture(scope="module", autouse=True)
def spaced() -> Iterator[None]:
    """The role is there for the tests of this file alone."""
    add_the_role()
    yield
    del roles.Role.KINDS["spaced"], kv_roles.HALVES["spaced"], sys.modules[MODULE]


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    file = tmp_path / "spaced.toml"
    file.write_text(POLICY)
    return load_policy(str(file))


def spec_of_two_layers() -> ModelSpec:
    return small_spec(layers=2)


@pytest.fixture
def plan(policy: Policy) -> CachePlan:
    spec = spec_of_two_layers()
    return build_plan(spec, spec.geometry(), policy)


@pytest.fixture(scope="module")
def bundle(spaced: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaced")
    (folder / "spaced.toml").write_text(POLICY)
    spec = spec_of_two_layers()
    policy = load_policy(str(folder / "spaced.toml"))
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


def test_it_moves_with_the_window(policy: Policy) -> None:
    spec = spec_of_two_layers()
    plan = build_plan(spec, spec.geometry(), replace(policy, positions="relative"))
    assert plan.window_frames == 1 + 6 + 3, "the sink, back to the older of two frames, the chunk"
    wanted, text = {}, torch.from_numpy(encode_words(spec, PROMPT))
    for chunk in generate(random_model(spec), plan, text, seeded_noise(plan, 7), 4):
        wanted[chunk.index] = chunk.latents
    absolute = build_plan(spec, spec.geometry(), policy)
    for chunk in generate(random_model(spec), absolute, text, seeded_noise(plan, 7), 4):
        inside = 3 * chunk.index + 3 <= plan.window_frames
        assert torch.allclose(chunk.latents, wanted[chunk.index], atol=1e-5) == inside


def test_a_policy_that_it_does_not_fit_is_refused(policy: Policy) -> None:
    spec = small_spec(frames_per_chunk=4, attended_frames=16)
    with pytest.raises(InputError, match="every 3 frames are kept; expected a divisor of 4"):
        build_plan(spec, spec.geometry(), policy)


def test_bytes_are_counted(plan: CachePlan, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    parts = footprint(opened.manifest, opened.plan)
    one = 4 * 2 * plan.spec.dim * plan.frame_tokens * plan.spec.layers  # a frame's keys and values
    assert (parts["kv_sink"], parts["kv_spaced"], parts["kv_recent"]) == (one, 2 * 2 * one, 2 * one)
    with Session.open(opened) as session:
        assert session.pass_timer(9).cache_bytes == 7 * one


def test_the_recorder_names_its_frames(plan: CachePlan) -> None:
    model = random_model(plan.spec)
    text = torch.from_numpy(encode_words(plan.spec, PROMPT))
    rows = record_sample(model, plan, text, 1, 0, 5)
    last = rows.filter(rows["chunk"] == 4).row(0, named=True)
    assert list(zip(last["role"], last["key_frame"], strict=True)) == [
        ("sink", 0),
        ("spaced", 6),
        ("spaced", 9),
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


@pytest.mark.parametrize("at", [2, 5])
def test_a_session_on_torch_makes_the_video_that_torch_makes(
    plan: CachePlan, bundle: Path, tmp_path: Path, at: int
) -> None:
    """With its cache in place; saved, restored and switched as on ONNX Runtime."""
    text = torch.from_numpy(encode_words(plan.spec, PROMPT))
    wanted = list(generate(random_model(plan.spec), plan, text, seeded_noise(plan, 7), 7))
    with Session.open(bundle, backend="torch") as session, Session.open(bundle) as other:
        video = session.generate(PROMPT, seed=7, chunks=7)
        found = list(islice(video, at))
        video.save(tmp_path / "state")
        found += list(video)
        for chunk, known in zip(found, wanted, strict=True):
            np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=1e-4, rtol=0)
        assert_same(list(session.restore(tmp_path / "state")), found[at:])
        pair = [one.generate(PROMPT, seed=7, chunks=7) for one in (session, other)]
        for one in pair:
            list(islice(one, at))
            one.switch(OTHER)
        for chunk, known in zip(*pair, strict=True):
            np.testing.assert_allclose(chunk.latents, known.latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", None])
def test_a_role_that_is_read_otherwise_lies_apart_on_torch(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    """Cached in half the bytes, or at twice the value and halved as it is read."""
    kind, half = roles.Role.KINDS["spaced"], kv_roles.HALVES["spaced"]
    with Session.open(bundle, backend="torch") as session:
        plain, without = list(session.generate(PROMPT, seed=7, chunks=6)), session._memory().cache.nbytes

    class Apart(type(half)):  # type: ignore[misc]
        def read(self, role: object, held: kv.KeysValues, like: torch.Tensor) -> kv.KeysValues:
            return kv.KeysValues(*(part.to(like) * (1 if dtype else 0.5) for part in held))

        def advance(self, role: object, done: kv_roles.CleanPass) -> kv.KeysValues:
            grown = kv.KeysValues(*(part * (1 if dtype else 2) for part in done.new))
            (cached_in, _), _ = kv.part_layouts(done.plan.spec, role, grown.keys.dtype)  # type: ignore[arg-type]
            cached = replace(done, new=kv.KeysValues(*(part.to(cached_in) for part in grown)))
            made: kv.KeysValues = super().advance(role, cached)
            return made

    monkeypatch.setitem(kv_roles.HALVES, "spaced", Apart())
    monkeypatch.setattr(kind, "read_as_cached", False)
    if dtype:
        monkeypatch.setattr(kind, "exact_dtype", lambda self, compute: dtype)
    opened = Bundle.open(bundle) if not dtype else None
    shown = opened or _unchecked(bundle)
    with Session.open(shown, backend="torch") as session:
        found = list(session.generate(PROMPT, seed=7, chunks=6))
        cache = session._memory().cache
        parts = footprint(session.bundle.manifest, session.plan)
        assert cache.nbytes == sum(size for name, size in parts.items() if name.startswith("kv_"))
        assert cache.nbytes > without
    for one, other in zip(found, plain, strict=True):
        if dtype:
            np.testing.assert_allclose(one.latents, other.latents, atol=0.02, rtol=0)
        else:
            np.testing.assert_array_equal(one.latents, other.latents)
    assert not dtype or differ(found[-1], plain[-1])


def _unchecked(bundle: Path) -> Bundle:
    """The bundle, though the dtype of a role is another now than when it was exported."""
    data = json.loads((bundle / "manifest.json").read_text())
    manifest = from_data(Manifest, data, "manifest.json")
    return Bundle(bundle, manifest, None)


def test_a_half_that_reads_otherwise_than_the_role_says_is_refused() -> None:
    class Reading(kv_roles.TorchRole):
        of = roles.Sink

        def read(self, role: object, held: kv.KeysValues, like: torch.Tensor) -> kv.KeysValues:
            return held

        def advance(self, role: object, done: kv_roles.CleanPass) -> kv.KeysValues:
            return done.new

    before = dict(kv_roles.HALVES)
    with pytest.raises(TypeError, match="sink says read_as_cached = True, and Reading reads it otherwise"):
        kv_roles.torch_half(Reading)
    assert before == kv_roles.HALVES


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
    assert {"role": "spaced", "every": 3, "frames": 2} in data["policy"]["groups"]["all"]


def test_a_torch_half_that_does_not_say_how_it_advances_is_refused() -> None:
    class Unfinished(kv_roles.TorchRole):
        of = roles.Sink

    before = dict(kv_roles.HALVES)
    with pytest.raises(TypeError, match="advance"):
        kv_roles.torch_half(Unfinished)
    assert before == kv_roles.HALVES
