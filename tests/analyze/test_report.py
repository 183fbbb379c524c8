"""The report: what it says against the analysis it is made of, and that a browser shows it offline."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib import pyplot as plt

from forcingkv.analyze import Analysis, Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.labels import policy_of
from forcingkv.analyze.report import report_html
from forcingkv.analyze.report.attention import examples, frame_attention
from forcingkv.analyze.report.costs import Cost, costs
from forcingkv.analyze.report.page import DARK, LIGHT, drawn, node
from forcingkv.analyze.report.pictures import headmap_picture, undecided_heads
from forcingkv.analyze.stability import REASONS
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.text import encode_words
from tests.conftest import nothing_drawn, small_spec

COMMAND = ["forcingkv", "analyze", "heads", "--prompts", "a file.txt"]
SECTIONS = ("map", "scores", "stability", "attention", "rules", "making")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--dump-dom",
    "--window-size=500,900",
]


class Made(NamedTuple):
    analysis: Analysis
    page: str


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.sources: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.images += [given] if tag == "img" else []
        self.sources += [given] if tag == "source" else []
        self.links += [given["href"] or ""] if tag == "a" else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Reports of small recordings, each made once."""
    found: dict[tuple[int, str], Made] = {}

    def make(samples: int = 3, rule: str = "auto") -> Made:
        if (samples, rule) not in found:
            spec = small_spec()
            place = tmp_path_factory.getbasetemp() / f"report-{samples}"
            texts = [encode_words(spec, prompt) for prompt in ("a b", "c d")]
            record_samples(Job(spec, random_weights(spec), texts, chunks=4), place, samples=samples)
            analysis = analyze_statistics(place, Labelling(rule))  # type: ignore[arg-type]
            with nothing_drawn() if rule == "dummy" else nullcontext():
                found[samples, rule] = Made(analysis, report_html(analysis, COMMAND))
        return found[samples, rule]

    return make


def test_every_picture_is_there_in_both_themes_and_in_words(made: Callable[..., Made]) -> None:
    page = Page(made().page)
    assert len(page.images) == len(page.sources) >= 9
    for image, source in zip(page.images, page.sources, strict=True):
        assert re.search(r"\d", image["alt"] or ""), "a picture is told in numbers"
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert source["media"] == "(prefers-color-scheme: dark)"
        assert (source["srcset"] or "").startswith("data:image/png;base64,")
        assert source["srcset"] != image["src"]
    scores = made().analysis.stability.score
    assert f"scores from {scores.min():.2f} to {scores.max():.2f}" in (page.images[0]["alt"] or "")


def test_the_page_has_its_sections_and_asks_for_nothing(made: Callable[..., Made]) -> None:
    text, page = made().page, Page(made().page)
    assert [link.removeprefix("#") for link in page.links] == list(SECTIONS)
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for absent in ("http", "<script", "url(", made().analysis.recorded.place):
        assert absent not in text
    assert html.escape("--prompts 'a file.txt'", quote=False) in text
    verdict = made().analysis.verdict
    wanted = [f"Verdict: {verdict.level}", *verdict.sentences, made().analysis.headmap.digest]
    for value in (*wanted, "recency score", "sink frames left out", "divergence"):
        assert value in page.text


def test_the_same_data_give_the_same_bytes(made: Callable[..., Made]) -> None:
    assert report_html(made().analysis, COMMAND) == made().page


def test_it_says_what_was_merged_into_the_weights(made: Callable[..., Made]) -> None:
    analysis = made().analysis
    lora = LoraRecord(
        "style.pt", "0" * 64, 0.5, 7, ("LoRA",), (4,), (8.0,), (2.0,), ("its file",), alpha_known=True
    )
    recording = replace(analysis.recorded.recording, loras=(lora,))
    with nothing_drawn():
        page = report_html(
            replace(analysis, recorded=replace(analysis.recorded, recording=recording)), COMMAND
        )
    assert "style.pt: 7 modules (LoRA), rank 4, alpha 8 (its file), strength 0.5" in page
    assert page.index("weights, SHA-256") < page.index("style.pt") < page.index("head map, SHA-256")


def test_text_from_outside_is_escaped() -> None:
    assert (
        node("p", "<b>&", node("i", "<"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;&amp;<i>&lt;</i></p>'
    )


def test_undecided_heads_are_marked_and_explained(made: Callable[..., Made]) -> None:
    analysis, page = made().analysis, Page(made().page)
    unsure = undecided_heads(analysis.headmap)
    np.testing.assert_array_equal(unsure, analysis.stability.undecided)
    assert unsure.any(), "random weights leave heads undecided"
    assert f"{int(unsure.sum())} undecided" in (page.images[0]["alt"] or "")
    assert f"Undecided heads: {int(unsure.sum())} of {unsure.size}" in page.text
    for name, found in analysis.stability.reasons.items():
        assert (REASONS[name] in page.text) == bool(found.any())
    for layer, head in np.argwhere(unsure)[:40]:
        assert f"L{layer} H{head}" in page.words
    decided = replace(analysis.headmap, undecided=None)
    assert headmap_picture(decided).light != headmap_picture(analysis.headmap).light


def test_one_sample_says_what_is_unknown_and_warns_of_nothing(made: Callable[..., Made]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(made(samples=1).page)
    for said in (
        "Verdict: unknown",
        "over samples is unknown",
        "are needed is unknown",
        "Intervals are unknown",
    ):
        assert said in page.text
    alts = " ".join(image["alt"] or "" for image in page.images)
    assert not {"nan", "nan%"} & {*page.text.lower().split(), *alts.split()}
    assert "head x sample" not in alts


def test_classes_of_dummy_forcing_are_shown_with_another_rules_stability(made: Callable[..., Made]) -> None:
    analysis, page = made(rule="dummy").analysis, Page(made(rule="dummy").page)
    assert page.text.count("The classes of Dummy Forcing are not two sides of a boundary") == 2
    assert f"about another rule: {analysis.decision.rule.name}" in page.text
    assert "this map, dummy-forcing" in page.words
    assert "dummy" in (page.images[0]["alt"] or "")


def test_costs_are_those_of_the_plans(made: Callable[..., Made]) -> None:
    """The published figure for `full`, and the plan's own numbers for a map."""
    spec = load_spec("self-forcing")
    model = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(model, (("static",) * 4 + ("dynamic",) * 8,) * 30, Rule("given"))
    full, found = costs(spec, {"a": headmap}).values()
    assert list(full) == ["480p", "720p", "1080p"]
    for name, gibibytes in (("480p", 5.6), ("720p", 13.0), ("1080p", 29.4)):
        before, after = full[name], found[name]
        assert isinstance(before, Cost) and isinstance(after, Cost)  # noqa: PT018
        assert round(before.kv_bytes / 2**30, 1) == gibibytes
        plan = build_plan(spec, spec.geometry(name), load_policy("forcing-kv"), headmap)
        assert (after.kv_bytes, after.flops) == (plan.kv_bytes("bfloat16"), chunk_flops(plan))
    dummies = HeadMap(model, (("sink", "dummy") * 6,) * 30, Rule("dummy"))
    assert (policy_of(headmap), policy_of(dummies)) == ("forcing-kv", "dummy-forcing")
    whole, own = (cost["12x8"] for cost in costs(small_spec(), {"this": made().analysis.headmap}).values())
    assert isinstance(whole, Cost) and isinstance(own, Cost)  # noqa: PT018
    assert f"{own.kv_bytes / whole.kv_bytes:.0%}" in Page(made().page).words


def test_a_resolution_that_cannot_be_planned_says_why() -> None:
    spec = small_spec(resolutions={"tiny": (4, 4), "usual": (12, 8)})
    headmap = HeadMap(ModelIdentity("small", 4, 3), (("static", "dynamic", "dynamic"),) * 4, Rule("given"))
    found = costs(spec, {"a": headmap})["a, forcing-kv"]
    assert "6 segments are asked of the 4 tokens" in str(found["tiny"])
    assert isinstance(found["usual"], Cost)


def test_shown_heads_are_of_their_kind_and_shown_once(made: Callable[..., Made]) -> None:
    stability = made().analysis.stability
    shown = examples(stability)
    assert len(set(shown.values())) == len(shown)
    for head, kind in shown.items():
        if kind.startswith("typical"):
            assert not stability.undecided[head]
            assert stability.static[head] == ("static" in kind)
        if "changes sides" in kind:
            assert stability.reasons[kind.split()[-1] + "s"][head]


def test_frame_attention_is_the_mean_over_samples(made: Callable[..., Made]) -> None:
    recorded = made().analysis.recorded
    part = frame_attention(recorded, [(2, 1)], [(3, 1)])[(2, 1), (3, 1)]
    rows = recorded.rows.filter(layer=2, head=1, chunk=3, step=1).collect().explode("key_frame", "mass")
    for query in range(3):
        for place, frame in enumerate(part.frames):
            masses = rows.filter((pl.col("query_frame") == query) & (pl.col("key_frame") == frame))["mass"]
            assert abs(part.mass[query, place] - masses.sum() / 3) < 1e-6
    assert part.frames == tuple(range(12))
    assert abs(part.share(0, 11) - 1) < 1e-5


def test_pictures_leave_no_figure_and_no_setting_behind() -> None:
    before, opened = dict(matplotlib.rcParams), plt.get_fignums()
    picture = drawn("one axis", 2, 1, lambda figure, theme: figure.subplots().set(xlabel=theme.ink) and None)
    assert picture.light.startswith(b"\x89PNG")
    assert b"matplotlib" not in picture.light.lower()
    assert plt.get_fignums() == opened
    assert dict(matplotlib.rcParams) == before


def contrast(a: str, b: str) -> float:
    """Of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_both_themes() -> None:
    for theme in (LIGHT, DARK):
        assert min(contrast(colour, theme.paper) for colour in (theme.ink, theme.soft)) >= 4.5
        assert min(contrast(level, theme.shade) for level in theme.levels) >= 4.5
        assert min(contrast(label, theme.paper) for label in theme.labels) >= 3


class Shown(NamedTuple):
    """What a browser made of a page: images, pixels too wide, console, what the page asked for."""

    images: int
    over: int
    said: str
    asked: list[str]


COUNT = """<script>addEventListener("load", () => {
const shown = [...document.images].filter((image) => image.naturalWidth > 0).length;
const over = document.documentElement.scrollWidth - innerWidth;
document.body.append(`${shown} images, ${over} over`); });</script></body>"""


def browse(text: str, folder: Path) -> Shown:
    folder.mkdir()
    page, log = folder / "page.html", folder / "net.json"
    page.write_text(text.replace("</body>", COUNT), encoding="utf-8")
    places = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", page.as_uri()]
    ran = subprocess.run([str(CHROMIUM), *FLAGS, *places], capture_output=True, text=True, timeout=99)
    found = re.search(r"(\d+) images, (-?\d+) over</body>", ran.stdout)
    assert found, ran.stderr
    net = json.loads(log.read_text())
    started = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event["params"] for event in net["events"] if event["type"] == started and "params" in event]
    # A file's origin is opaque, written "null"; what the browser asks for itself has none, or its own.
    of_page = [one["url"] for one in asked if str(one.get("initiator")).startswith(("null", "file:"))]
    said = "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)
    return Shown(int(found[1]), int(found[2]), said, of_page)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
def test_a_browser_shows_it_whole_and_asks_no_one(made: Callable[..., Made], tmp_path: Path) -> None:
    shown = browse(made().page, tmp_path / "report")
    assert shown.images == len(Page(made().page).images)
    assert shown.over <= 0, "the page scrolls sideways"
    assert shown.said == ""
    assert [url for url in shown.asked if not url.startswith(("data:", "file:"))] == []

    wide = '<body style="width: 3000px"><img src="http://127.0.0.1:9/a.png"><script>throw 1</script></body>'
    faulty = browse(wide, tmp_path / "faulty")
    assert (faulty.images, faulty.over > 0, faulty.said != "") == (0, True, True)
    assert faulty.asked == ["http://127.0.0.1:9/a.png"], "what the test looks for is seen where it is"
