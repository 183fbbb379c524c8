"""What decoding should take: scaled from one published figure, and said where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from forcingkv.measure.planner.decoding import decoder_costs
from forcingkv.measure.planner.gpus import load_gpu
from forcingkv.models.presets import load_spec
from tests.conftest import Ran

WORDS = ("plan", "--model", "self-forcing", "--policy", "full,forcing-kv", "--gpu", "h200,b200", "--json")


@pytest.mark.parametrize(
    ("kind", "gpu", "resolution", "frames", "seconds"),
    [
        ("wan-vae", "h100", "480p", 81, 4.5),  # as published
        ("wan-vae", "h200", "480p", 81, 4.5),  # of as many operations a second
        ("wan-vae", "h100", "1080p", 1, 4.5 / 81 * (1920 * 1088) / (832 * 480)),
        ("taehv", "a100", "480p", 12, 0.0135),
        ("taehv", "h100", "480p", 12, 0.0135 * 2039 / 3350),
        ("taehv", "h100", "1080p", 4, 0.0135 * 2039 / 3350 * (1920 * 1088) / (832 * 480) / 3),
    ],
)
def test_a_decoder_is_scaled_by_pixels_and_by_what_bounds_it(
    kind: str, gpu: str, resolution: str, frames: int, seconds: float
) -> None:
    figure = decoder_costs(kind).published
    assert figure
    geometry = load_spec("self-forcing").geometry(resolution)
    assert figure.seconds_on(load_gpu(gpu), geometry, frames) == pytest.approx(seconds)


def test_the_other_figure_that_is_known_of_taehv_comes_out_within_a_tenth() -> None:
    """flashdreams has 3.5 ms a chunk of a GB200, whose B200 moves as many bytes a second."""
    figure = decoder_costs("taehv").published
    assert figure
    predicted = figure.seconds_on(load_gpu("b200"), load_spec("self-forcing").geometry("480p"), 12)
    assert predicted == pytest.approx(0.0035, rel=0.1)


def test_frames_a_second_come_with_and_without_decoding(run: Callable[..., Ran]) -> None:
    report = json.loads(run(*WORDS).out)
    for policy in report["policies"]:
        for one in policy["gpus"]:
            chunk = one["mean_chunk_seconds"]
            assert one["fps_with_decode"] == pytest.approx(12 / (chunk + one["decode_chunk_seconds"]))
            assert one["fps_with_decode"] < one["fps"] == pytest.approx(12 / chunk)
            low, high = one["fps_with_decode_range"]
            assert low <= one["fps_with_decode"] <= high
    assert "4.5 of 7.9 s" in report["decode_basis"]
    tiny = json.loads(run(*WORDS, "--decoder", "taehv").out)["policies"][0]["gpus"][0]
    assert tiny["fps"] == report["policies"][0]["gpus"][0]["fps"]
    assert tiny["fps_with_decode"] > report["policies"][0]["gpus"][0]["fps_with_decode"]


def test_a_decoder_of_which_nothing_is_known_is_not_guessed(run: Callable[..., Ran]) -> None:
    report = json.loads(run(*WORDS, "--decoder", "lighttae").out)
    one = report["policies"][0]["gpus"][0]
    assert report["decode_basis"] is None
    assert (one["decode_chunk_seconds"], one["fps_with_decode"], one["fps_with_decode_range"]) == (
        None,
        None,
        [None, None],
    )
    shown = run(*WORDS[:-1], "--decoder", "lighttae").out
    assert "What decoding with lighttae takes is not predicted: no figure of it is known." in " ".join(
        shown.split()
    )
    assert "not predicted" not in run("plan", "--model", "demo", "--gpu", "h200").out
