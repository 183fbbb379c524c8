"""Schedules: steps of opening chunks, noise levels from the table, and refusals that name the fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import Bundle
from forcingkv.runtime.schedule import ChunkSteps, Schedule, table_of_levels
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model
from tests.runtime.lanes import On
from tests.runtime.videos import PROMPT

Bundles = Callable[[str], Path]

FOUR = (1000.0, 750.0, 500.0, 250.0)
"""The first chunk of Causal Forcing++ and One-Forcing."""
FALLING = ((1000.0, 800.0, 600.0, 400.0, 200.0), FOUR, (1000.0, 700.0, 400.0))
"""One pass fewer each chunk, as DiagDistill has it."""


def steps_of(schedule: Schedule, chunks: int, given: int = 0) -> list[int]:
    """How many denoising passes each chunk takes."""
    return [len(schedule.of_chunk(chunk, given)) for chunk in range(chunks)]


def test_only_the_first_chunk_has_the_steps_of_the_first() -> None:
    schedule = Schedule((1000.0,), warp=True, shift=5.0, first=FOUR)
    assert steps_of(schedule, 4) == [4, 1, 1, 1]
    assert [round(t, 1) for t in schedule.of_chunk(0).timesteps] == [1000.0, 937.5, 833.3, 625.0]
    assert schedule.of_chunk(1) == ChunkSteps((1000.0,), (1.0, 0.0)) == schedule.later


def test_the_first_chunk_after_given_ones_is_the_first_generated_or_none() -> None:
    """Causal Forcing gives the longer list to the first generated chunk, One-Forcing to the video's first."""
    schedule = Schedule((1000.0,), first=FOUR)
    assert steps_of(schedule, 4, given=2) == [1, 1, 4, 1]
    assert steps_of(replace(schedule, first_counts="video"), 4, given=2) == [4, 1, 1, 1]
    assert steps_of(replace(schedule, first_counts="video"), 4) == [4, 1, 1, 1]


def test_opening_chunks_have_their_own_lists_and_later_ones_the_common_one() -> None:
    schedule = Schedule((1000.0, 500.0), by_chunk=FALLING)
    assert steps_of(schedule, 6) == [5, 4, 3, 2, 2, 2]
    assert steps_of(schedule, 6, given=1)[1:] == [5, 4, 3, 2, 2]
    assert steps_of(replace(schedule, first_counts="video"), 6, given=1)[1:] == [4, 3, 2, 2, 2]
    assert schedule.opening_chunks == 3
    assert [schedule.passes(chunks) for chunks in range(6)] == [0, 5, 9, 12, 14, 16]
    assert set(schedule.kinds) == {schedule.of_chunk(chunk) for chunk in range(6)}


def test_one_list_by_chunk_is_the_first() -> None:
    one, other = Schedule((1000.0,), by_chunk=(FOUR,)), Schedule((1000.0,), first=FOUR)
    assert [one.of_chunk(chunk) for chunk in range(3)] == [other.of_chunk(chunk) for chunk in range(3)]


def test_noise_levels_of_the_table() -> None:
    """Of Krea's steps as its public code has them; 0 has the level of the last entry."""
    steps = (1000.0, 937.0, 833.0, 625.0, 0.0)
    found = Schedule(steps, shift=5.0, noise_levels="table").later
    assert found.timesteps == steps
    expected = (1.0, 0.936873733997345, 0.8327770829200745, 0.625, 0.004980080295354128, 0.0)
    assert found.sigmas == expected
    assert load_spec("krea-14b").schedule.later.sigmas == (*expected[:4], 0.0)


def test_the_table_is_the_one_of_public_code() -> None:
    linear = torch.linspace(1, 0, 1001)[:-1]
    np.testing.assert_array_equal(table_of_levels(5.0), (5 * linear / (1 + 4 * linear)).numpy())


def test_warped_steps_are_entries_of_the_table() -> None:
    exact = Schedule(FOUR, warp=True, shift=5.0)
    looked_up = replace(exact, noise_levels="table")
    np.testing.assert_allclose(looked_up.later.sigmas, exact.later.sigmas, rtol=0, atol=6e-8)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_any_number_of_steps(count: int) -> None:
    steps = tuple(1000 * (1 - n / count) for n in range(count))
    for noise_levels in ("exact", "table"):
        found = Schedule(steps, warp=True, shift=5.0, noise_levels=noise_levels).later  # type: ignore[arg-type]
        assert len(found) == count
        assert len(found.sigmas) == count + 1
        assert list(found.sigmas) == sorted(found.sigmas, reverse=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"first": ()}, r"first \[\] cannot be run.*at least one timestep"),
        ({"first": (500.0, 750.0)}, r"first \[500.0, 750.0\] cannot be run.*falling"),
        ({"first": (500.0, 500.0)}, r"first .*falling"),
        ({"first": (1001.0,)}, r"first .*at most 1000"),
        ({"first": (1000.0, -1.0)}, r"first .*cannot be run"),
        ({"first": (math.nan,)}, r"first .*cannot be run"),
        ({"denoising_steps": (math.inf,)}, r"denoising_steps .*cannot be run"),
        ({"by_chunk": (FOUR, (1000.0, math.nan, 500.0))}, r"by_chunk\[1\] .*cannot be run"),
        ({"solver": "unipc"}, "adds no noise between passes.*renoise = 'predicted'"),
        ({"by_frame": True, "redraw_from": 0}, "by_frame and redraw_from"),
        ({"first": tuple(1000 - n / 2 for n in range(1001))}, "first has 1001 timesteps.*at most 1000"),
        ({"by_chunk": ()}, "by_chunk has 0 lists"),
        ({"by_chunk": ((1000.0,),) * 1001}, "by_chunk has 1001 lists"),
        ({"by_chunk": (FOUR, (250.0, 500.0))}, r"by_chunk\[1\] .*falling"),
        ({"by_chunk": (FOUR, ())}, r"by_chunk\[1\] \[\] cannot be run"),
        ({"first": FOUR, "by_chunk": (FOUR,)}, "has both first and by_chunk"),
        ({"first": (1000.0, 0.0)}, r"first .*a pass at 0.*noise_levels = 'table'"),
        ({"denoising_steps": (1000.0, 0.0)}, r"denoising_steps .*a pass at 0"),
        ({"denoising_steps": (0.0,)}, r"denoising_steps .*a pass at 0"),
        ({"denoising_steps": (5e-324,)}, r"denoising_steps .*a pass at 0"),
        ({"denoising_steps": (1000.0, 999.9), "noise_levels": "table", "shift": 5.0}, "one noise level"),
        ({"first": FOUR, "redraw_from": 1}, "redraw_from is 1.*a pass of denoising_steps, 0 to 0"),
        ({"by_chunk": ((1000.0,),), "denoising_steps": FOUR, "redraw_from": 1}, r"a pass of by_chunk\[0\]"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"schedule.*{said}|{said}"):
        Schedule(**({"denoising_steps": (1000.0,)} | changes))


def test_a_spec_says_it_in_toml(tmp_path: Path) -> None:
    place = tmp_path / "mine.toml"
    place.write_text(
        'base = "self-forcing"\nname = "mine"\n[schedule]\ndenoising_steps = [1000]\n'
        "by_chunk = [[1000, 500], [1000]]\n"
        'first_counts = "video"\nnoise_levels = "table"\n'
    )
    schedule = load_spec(str(place)).schedule
    assert (schedule.warp, schedule.by_chunk) == (True, ((1000.0, 500.0), (1000.0,)))
    assert (schedule.first_counts, schedule.noise_levels) == ("video", "table")
    assert steps_of(schedule, 3, given=1) == [2, 1, 1]


def test_a_schedule_survives_a_manifest_and_older_manifests_are_read() -> None:
    for schedule in (
        Schedule(FOUR, first=FALLING[0], first_counts="video"),
        Schedule(FOUR, by_chunk=FALLING, noise_levels="table", shift=5.0),
    ):
        assert from_data(Schedule, json.loads(json.dumps(to_data(schedule))), "s") == schedule
    older = {"denoising_steps": [1000.0], "warp": False, "shift": 1.0, "renoise": "fresh"}
    older |= {"context_timestep": 0.0, "redraw_from": None}
    assert from_data(Schedule, older, "s") == Schedule((1000.0,))


SCHEDULES: dict[str, dict[str, Any]] = {
    "first": {"denoising_steps": (1000.0,), "first": FOUR},
    "by chunk, from the table": {
        "denoising_steps": (1000.0, 625.0, 0.0),
        "by_chunk": FALLING,
        "shift": 5.0,
        "noise_levels": "table",
    },
}
"""Numbers of passes that are odd and even, so that either of the two latents is read at each place."""


def with_schedule(bundle: Bundle, schedule: Schedule) -> Bundle:
    """A bundle run by another schedule: its graphs know nothing of it."""
    model = replace(bundle.manifest.model, schedule=schedule)
    return Bundle(bundle.path, replace(bundle.manifest, model=model), bundle.headmap)


def in_torch(bundle: Bundle, chunks: int) -> list[np.ndarray]:
    """The latents of a video, of the loop in torch. The bundles' weights are those of `random_model`."""
    spec, plan, headmap = bundle.plan.spec, bundle.plan, bundle.headmap
    state = random_model(spec).state_dict()
    model = WanModel(spec)
    model.load_state_dict(permute_heads(state, spec, head_orders(spec, plan.policy, headmap)))
    text = torch.from_numpy(encode_words(spec, PROMPT))
    return [c.latents.numpy() for c in generate(model, plan, text, seeded_noise(plan, 7), chunks)]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_session_runs_each_chunk_as_torch_does(on: On, bundles: Bundles, kind: str) -> None:
    opened = with_schedule(Bundle.open(bundles("forcing-kv")), Schedule(**SCHEDULES[kind]))
    chunks = len(FALLING) + 2
    with on.open(opened) as session:
        found = list(session.generate(PROMPT, seed=7, chunks=chunks))
    for chunk, wanted in zip(found, in_torch(opened, chunks), strict=True):
        assert relative(chunk.latents, wanted) < 1e-5, chunk.index
