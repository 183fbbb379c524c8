"""The planner's reports as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from forcingkv.measure.planner.published import uncertainty
from forcingkv.measure.tables import wrapped
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.schedule import TOLD

COLUMNS = 4
"""Policies side by side in the table of memory."""
SUGGESTIONS = 3
"""What would fit, for each policy that does not."""


def plan_lines(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a report that `report.plan_report` made."""
    policies = report["policies"]
    yield (
        f"{report['model']} at {report['size']}: {report['frame_tokens']:,} tokens a"
        f" latent frame, {report['dtype']}"
    )
    opening = report["opening_passes"]
    counts = [*map(str, opening[:TOLD]), *(["..."] if len(opening) > TOLD else [])]
    first = f", the first {'ones ' * (len(opening) > 1)}of {', '.join(counts)}" if opening else ""
    yield f"{report['seconds']:g} s are {report['chunks']} chunks of {report['passes']} passes{first}"
    yield from wrapped("", report["schedule"])
    for start in range(0, len(policies), COLUMNS):
        yield from ("", *_memory(policies[start : start + COLUMNS]))
    yield from ("", "heads")
    left_out = {name: f"left out: {why}" for name, why in report["left_out"].items()}
    for name, text in ({one["policy"]: one["heads"] for one in policies} | left_out).items():
        yield from wrapped(f"  {name:<18}", text)
    yield from _positions(policies)
    yield from ("", *_speed(policies))
    short = [line for one in policies for on in one["gpus"] if not on["fits"] for line in _short(one, on)]
    if short:
        yield from ("", *short)
    yield ""
    for note in _notes(report):
        yield from wrapped("", note)
    yield f"A GPU fits if {readable(report['reserve_bytes'])} of its memory stay free."


def _positions(policies: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where they are not those of the video."""
    relative = [one for one in policies if one["positions"] == "relative"]
    if relative:
        yield from ("", "positions")
    for one in relative:
        text = f"relative to the window of {one['window_frames']} frames"
        yield from wrapped(f"  {one['policy']:<18}", text)


def _memory(policies: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'memory of a session':<20}" + "".join(f"{one['policy']:>15}" for one in policies)
    parts = [one["memory"]["parts"] | {"total": one["memory"]["total"]} for one in policies]
    for name in parts[0]:
        if any(sizes[name] for sizes in parts):
            yield f"  {name:<18}" + "".join(f"{readable(sizes[name]):>15}" for sizes in parts)


def _speed(policies: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "predicted: a pass of the last phase; FPS of the video, then with decoding"
    yield (
        f"  {'policy':<14}{'GPU':<13}{'fits':<5}{'pass, ms':>8}{'FPS':>6}{'low-high':>10}{'+decode':>8}"
        f"{'speed-up':>9}{'att.':>5}"
    )
    for policy in policies:
        for one in policy["gpus"]:
            rates = one["fps"], *one["fps_range"], one["fps_with_decode"]
            fps, low, high, shown = ("-" if r is None else f"{r:.{1 + (r < 10)}f}" for r in rates)
            yield (
                f"  {policy['policy']:<14}{one['gpu']:<13}{'yes' if one['fits'] else 'no':<5}"
                f"{one['pass_seconds'] * 1e3:>8,.0f}{fps:>6}{f'{low}-{high}':>10}{shown:>8}"
                f"{one['speedup']:>9.2f}{one['attention_time_share']:>5.0%}"
            )


def _short(policy: dict[str, Any], on: dict[str, Any]) -> list[str]:
    """By how much memory is too small, and what would fit: the nearest on that GPU, and another GPU."""
    same = [fit for fit in on["what_fits"] if fit["gpu"] == on["gpu"]][: SUGGESTIONS - 1]
    others = [fit for fit in on["what_fits"] if fit["gpu"] != on["gpu"]][: SUGGESTIONS - len(same)]
    fits = [
        f"{fit['policy']} at {fit['resolution']} on {fit['gpu']} ({readable(fit['bytes'])})"
        for fit in same + others
    ]
    missing = f"{readable(on['missing_bytes'])} ({on['missing_bytes']:,} bytes) are missing"
    told = f"{policy['policy']} does not fit on {on['gpu']}: {missing}."
    return wrapped("", f"{told} What fits: {'; '.join(fits) or 'nothing'}.")


def _notes(report: dict[str, Any]) -> Iterator[str]:
    origins: dict[tuple[float, str], list[str]] = {}
    for on in report["policies"][0]["gpus"] if report["policies"] else ():
        origins.setdefault((on["efficiency"], on["efficiency_basis"]), []).append(on["gpu"])
    for (value, words), gpus in origins.items():
        yield f"Share of the peak that kernels reach on {', '.join(gpus)}: {value:.1%}, {words}."
    one = next(iter(report["efficiency"].values()))
    ends = f"{one['lowest']:.0%} and {one['highest']:.0%}"
    yield f"Low-high: with {ends}, the least and the most that any published FPS under full needs."
    yield uncertainty()
    if strips := report["decode_strips"]:
        yield (
            f"Decoding ({report['decoder']}) goes over each frame in {strips['count']} strips of"
            f" {strips['rows'] * strips['scale']} rows."
        )
    if report["decode_basis"]:
        yield f"Decoding ({report['decoder']}) is {report['decode_basis']}."
    elif report["decoder"] != "pixels":
        yield f"What decoding with {report['decoder']} takes is not predicted: no figure of it is known."
    for text in dict.fromkeys(text for one in report["policies"] for text in one["memory"]["not_counted"]):
        yield f"Not counted: {text}."
