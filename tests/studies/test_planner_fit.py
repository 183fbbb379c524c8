"""The planner against published figures: the fit, what is off and why, and the file that the product has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.measure.nominal import known_map
from forcingkv.measure.planner.speed import predict
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.policies import load_policy
from studies.planner_fit import (
    BOUND,
    OUT,
    FigureWork,
    efficiencies,
    findings,
    fit_efficiency,
    hold,
    outcomes,
    parse_published,
    published_rows,
)

FPS = [row for row in published_rows() if row.measure == "fps"]


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.02, 0.9), st.lists(st.sampled_from(FPS), min_size=1, max_size=3, unique_by=lambda r: r.name)
)
def test_the_fit_finds_the_constant_that_figures_were_made_with(constant: float, rows: list) -> None:
    made = [FigureWork(replace(row, published=FigureWork(row).predicted(constant))) for row in rows]
    assert fit_efficiency(made) == pytest.approx(constant, rel=1e-9)


def test_figures_that_disagree_are_met_in_the_middle() -> None:
    row = FPS[0]
    fast, slow = (FigureWork(replace(row, published=row.published * by)) for by in (1.1, 1 / 1.1))
    assert fit_efficiency([fast, slow]) == pytest.approx(fit_efficiency([FigureWork(row)]))


@pytest.mark.parametrize("measures", [[], ["speedup"], ["fps", "attention_share"]])
def test_only_frames_a_second_say_how_fast_a_gpu_is(measures: list[str]) -> None:
    rows = [next(row for row in published_rows() if row.measure == measure) for measure in measures]
    with pytest.raises(ValueError, match="frames a second"):
        fit_efficiency([FigureWork(row) for row in rows])


def test_one_row_is_fitted_and_so_is_exact() -> None:
    fitted = [one for one in outcomes() if one.row.fitted]
    assert [one.row.name for one in fitted] == ["LongLive 480p 30 s, full"]
    assert fitted[0].error == pytest.approx(0, abs=1e-9)
    assert fitted[0].needed == pytest.approx(efficiencies()["datacenter"].value)


def test_every_row_that_is_off_says_why_and_no_other() -> None:
    for one in outcomes():
        assert one.off == (abs(one.error) > BOUND)
        assert bool(one.row.reason) == one.off, (one.row.name, one.row.measure, one.error)


def test_every_figure_of_the_method_is_there() -> None:
    published = {(row.model, row.measure, row.published) for row in published_rows()}
    rates = {21.10, 22.34, 27.45, 26.21, 26.77, 1.71, 4.13, 5.22, 22.81, 27.75}
    assert {value for _, measure, value in published if measure == "fps"} == rates
    gains = {value for model, measure, value in published if (model, measure) == ("self-forcing", "speedup")}
    assert gains == {1.23, 1.56, 1.24, 1.50, 1.44, 2.82}
    assert {value for _, measure, value in published if measure == "attention_share"} == {0.24, 0.61, 0.89}


def test_what_is_said_to_be_needed_would_do() -> None:
    """Frames that would explain a row: with so many for all heads the prediction is the published figure."""
    row = next(row for row in FPS if row.model == "self-forcing")
    constant = efficiencies()["datacenter"].value
    frames = hold(FigureWork(row), constant).policy_frames
    assert frames is not None
    case = FigureWork(row)
    sizes = [phase.work["attention"].flops for phase in case.video.phases]
    one_frame = sizes[0] / 3
    attended = sum(phase.chunks * phase.work["attention"].flops for phase in case.video.phases)
    mean = attended / case.video.chunks
    seconds = 12 / (5 * predict(case.video, case.gpu, constant)["fps"])
    saved = (mean - frames * one_frame) / (constant * case.gpu.peak_flops)
    assert 12 / (5 * (seconds - saved)) == pytest.approx(row.published)


def test_every_row_with_labels_is_planned_with_published_heads() -> None:
    """Not with the costliest, which `plan_for` falls back to."""
    for row in published_rows():
        policy = load_policy(row.policy)
        assert not policy.needs_headmap or known_map(load_spec(row.model), policy), row.name


def test_what_the_documentation_reads_from_it() -> None:
    """The time of a pass that does not grow with what it attends to, and the gain of Krea 14B at 30 s."""
    highest = efficiencies()["datacenter"].highest
    gaps = []
    for case in map(FigureWork, FPS):
        if case.row.resolution == "480p" and case.plan.spec.dim == 1536:
            published = case.video.frames / case.video.passes / case.row.published
            predicted = predict(case.video, case.gpu, highest)["mean_chunk_seconds"] / case.video.passes
            gaps.append(1e3 * (published - predicted))
    assert (round(min(gaps)), round(max(gaps))) == (41, 52)
    needed = {one.row.model: one.needed for one in outcomes() if one.row.policy == "full" and one.needed}
    fitted = efficiencies()["datacenter"].value
    assert round(needed["self-forcing"] / fitted, 1) == 2.1
    assert round(needed["krea-14b"] / fitted, 1) == 1.3
    krea = next(one.row for one in outcomes() if (one.row.model, one.row.measure) == ("krea-14b", "speedup"))
    assert round(FigureWork(replace(krea, chunks=40)).predicted(fitted), 2) == 1.57


def test_a_row_with_a_wrong_field_is_refused() -> None:
    with pytest.raises(InputError, match=r"published\.toml.*measure"):
        parse_published(
            '[[rows]]\nname = "x"\nmodel = "longlive"\nresolution = "480p"\nchunks = 7\npolicy = "full"\n'
            'measure = "speed"\npublished = 1.0\n'
        )


def test_the_product_ships_what_the_study_finds() -> None:
    """If not, predictions have changed: run `python studies/planner_fit.py`, and the tables of the docs."""

    def compare(shipped: object, found: object) -> None:
        if isinstance(found, dict):
            assert isinstance(shipped, dict)
            assert list(shipped) == list(found)
            for name, value in found.items():
                compare(shipped[name], value)
        elif isinstance(found, list):
            assert isinstance(shipped, list)
            for pair in zip(shipped, found, strict=True):
                compare(*pair)
        else:
            assert shipped == (pytest.approx(found) if isinstance(found, float) else found)

    compare(json.loads(OUT.read_text(encoding="utf-8")), json.loads(json.dumps(findings())))
