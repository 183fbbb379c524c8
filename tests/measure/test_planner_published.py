"""Published figures: the fit, what is off and why, and the table in the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import InputError, read_headmap
from forcingkv.measure.nominal import published_counts
from forcingkv.measure.planner.fit import BOUND, basis, efficiencies, fit_efficiency, hold, outcomes
from forcingkv.measure.planner.gpus import gpu_names, load_gpu
from forcingkv.measure.planner.heads import Given, plan_for
from forcingkv.measure.planner.prediction import predict, video_work
from forcingkv.measure.planner.published import Case, published_rows, rows_from
from forcingkv.models.presets import load_spec
from forcingkv.runtime.policies import load_policy
from tests.conftest import Ran

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"
FPS = [row for row in published_rows() if row.measure == "fps"]


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.02, 0.9), st.lists(st.sampled_from(FPS), min_size=1, max_size=3, unique_by=lambda r: r.name)
)
def test_the_fit_finds_the_constant_that_figures_were_made_with(constant: float, rows: list) -> None:
    made = [Case(replace(row, published=Case(row).predicted(constant))) for row in rows]
    assert fit_efficiency(made) == pytest.approx(constant, rel=1e-9)


def test_figures_that_disagree_are_met_in_the_middle() -> None:
    row = FPS[0]
    fast, slow = (Case(replace(row, published=row.published * by)) for by in (1.1, 1 / 1.1))
    assert fit_efficiency([fast, slow]) == pytest.approx(fit_efficiency([Case(row)]))


@pytest.mark.parametrize("measures", [[], ["speedup"], ["fps", "attention_share"]])
def test_only_frames_a_second_say_how_fast_a_gpu_is(measures: list[str]) -> None:
    rows = [next(row for row in published_rows() if row.measure == measure) for measure in measures]
    with pytest.raises(ValueError, match="frames a second"):
        fit_efficiency([Case(row) for row in rows])


def test_one_row_is_fitted_and_so_is_exact() -> None:
    fitted = [one for one in outcomes() if one.row.fitted]
    assert [one.row.name for one in fitted] == ["LongLive 480p 30 s, full"]
    assert fitted[0].error == pytest.approx(0, abs=1e-9)
    assert fitted[0].needed == pytest.approx(efficiencies()["datacenter"].value)


def test_a_class_without_figures_takes_over_a_constant_and_says_so() -> None:
    found = efficiencies()
    assert found["datacenter"].carried_from is None
    assert found["rtx"].carried_from == "datacenter"
    assert found["rtx"].value == found["datacenter"].value
    assert basis(load_gpu("h200")) == "fitted to LongLive 480p 30 s, full"
    for name in ("a100", "h100", "b200", "rtx-4090", "rtx-5090", "rtx-pro-6000"):
        assert basis(load_gpu(name)).endswith(": not fitted, never measured")
    assert found["datacenter"].lowest <= found["datacenter"].value <= found["datacenter"].highest


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
    frames = hold(Case(row), constant).policy_frames
    assert frames is not None
    case = Case(row)
    sizes = [phase[1]["attention"].flops for phase in case.video.phases]
    one_frame = sizes[0] / 3
    mean = sum(count * works["attention"].flops for count, works in case.video.phases) / case.video.chunks
    seconds = 12 / (5 * predict(case.video, case.gpu, constant).fps)
    saved = (mean - frames * one_frame) / (constant * case.gpu.peak_flops)
    assert 12 / (5 * (seconds - saved)) == pytest.approx(row.published)


def test_counts_stand_for_the_released_maps(data: Path) -> None:
    """Layer 0 is not split, so what matters beside the counts is how many of its heads are static."""
    policy = load_policy("forcing-kv")
    for model, file in (("self-forcing", "selfforcing"), ("longlive", "longlive")):
        spec = load_spec(model)
        headmap = read_headmap(data / "headmaps" / f"forcingkv_heads_{file}.json")
        assert published_counts(spec, policy) == headmap.counts()
        exact, counted = (
            predict(
                video_work(plan_for(spec, spec.geometry(), policy, heads)[0], 40), load_gpu("h200"), 0.3
            ).fps
            for heads in (Given(headmap=headmap), Given())
        )
        assert counted == pytest.approx(exact, rel=0.005)


def test_every_row_with_labels_is_planned_with_published_heads() -> None:
    """Not with the costliest, which `plan_for` falls back to."""
    for row in published_rows():
        policy = load_policy(row.policy)
        assert not policy.needs_headmap or published_counts(load_spec(row.model), policy), row.name


def test_the_documentation_has_the_table_that_the_command_prints(run: Callable[..., Ran]) -> None:
    printed = run("plan", "--published").out
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"<!-- published -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found
    assert found.group(1).strip() == printed.strip()


def test_the_documentation_has_the_gpus_of_the_file() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for gpu in map(load_gpu, gpu_names()):
        cells = (
            f"`{gpu.key}`",
            gpu.name,
            str(gpu.sm),
            f"{gpu.memory_bytes >> 20:,}",
            f"{gpu.peak_flops / 1e12:g}",
            f"{gpu.bandwidth / 1e9:g}",
            f"`{gpu.family}`",
            gpu.source,
        )
        assert f"| {' | '.join(cells)} |" in text


def test_what_the_documentation_reads_from_it() -> None:
    """The time of a pass that does not grow with what it attends to, and the gain of Krea 14B at 30 s."""
    highest = efficiencies()["datacenter"].highest
    gaps = []
    for case in map(Case, FPS):
        if case.row.resolution == "480p" and case.plan.spec.dim == 1536:
            published = case.video.frames / case.video.passes / case.row.published
            gaps.append(1e3 * (published - predict(case.video, case.gpu, highest).mean_pass))
    assert (round(min(gaps)), round(max(gaps))) == (41, 52)
    needed = {one.row.model: one.needed for one in outcomes() if one.row.policy == "full" and one.needed}
    fitted = efficiencies()["datacenter"].value
    assert round(needed["self-forcing"] / fitted, 1) == 2.1
    assert round(needed["krea-14b"] / fitted, 1) == 1.3
    krea = next(one.row for one in outcomes() if (one.row.model, one.row.measure) == ("krea-14b", "speedup"))
    assert round(Case(replace(krea, chunks=40)).predicted(fitted), 2) == 1.54


def test_a_row_with_a_wrong_field_is_refused() -> None:
    with pytest.raises(InputError, match=r"published\.toml.*measure"):
        rows_from(
            '[[rows]]\nname = "x"\nmodel = "longlive"\nresolution = "480p"\nchunks = 7\npolicy = "full"\n'
            'measure = "speed"\npublished = 1.0\n'
        )
