"""The planner's reports as text for people, in lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from forcingkv.measure.planner.published import uncertainty
from forcingkv.runtime.footprint import readable

WIDTH = 80
COLUMNS = 4
"""Policies side by side in the table of memory."""
SUGGESTIONS = 3
"""What would fit, for each policy that does not."""


def plan_lines(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a report that `report.plan_report` made."""
    yield (
        f"{report['model']} at {report['width']}x{report['height']}: {report['frame_tokens']:,} tokens a"
        f" latent frame, {report['dtype']}"
    )
    yield f"{report['seconds']:g} s are {report['chunks']} chunks of {report['passes']} passes"
    for group in _batched(report["policies"], COLUMNS):
        yield from ("", *_memory(group))
    yield from ("", *_heads(report), "", *_speed(report))
    short = list(_short(report))
    if short:
        yield from ("", *short)
    yield from ("", *_notes(report))


def _memory(policies: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'memory of a session':<20}" + "".join(f"{one['policy']:>15}" for one in policies)
    for part in policies[0]["memory"]["parts"]:
        sizes = [one["memory"]["parts"][part] for one in policies]
        if any(sizes):
            yield f"  {part:<18}" + "".join(f"{readable(size):>15}" for size in sizes)
    yield f"  {'total':<18}" + "".join(f"{readable(one['memory']['total']):>15}" for one in policies)


def _heads(report: dict[str, Any]) -> Iterator[str]:
    yield "heads"
    for one in report["policies"]:
        yield from _wrapped(f"  {one['policy']:<18}", one["heads"])
    for name, why in report["left_out"].items():
        yield from _wrapped(f"  {name:<18}", f"left out: {why}")


def _speed(report: dict[str, Any]) -> Iterator[str]:
    yield "predicted without decoding and text: a pass of the last phase, FPS of the video"
    yield (
        f"  {'policy':<15}{'GPU':<13}{'fits':<5}{'pass, ms':>9}{'FPS':>7}{'low - high':>14}"
        f"{'speed-up':>9}{'att.':>5}"
    )
    for policy in report["policies"]:
        for one in policy["gpus"]:
            low, high = map(_rate, one["fps_range"])
            yield (
                f"  {policy['policy']:<15}{one['gpu']:<13}{'yes' if one['fits'] else 'no':<5}"
                f"{one['pass_seconds'] * 1e3:>9,.0f}{_rate(one['fps']):>7}{f'{low} - {high}':>14}"
                f"{one['speedup']:>9.2f}{one['attention_time_share']:>5.0%}"
            )


def _short(report: dict[str, Any]) -> Iterator[str]:
    """Where memory is too small: by how much, and what would fit."""
    for policy in report["policies"]:
        for one in policy["gpus"]:
            if one["fits"]:
                continue
            fits = [
                f"{fit['policy']} at {fit['resolution']} on {fit['gpu']} ({readable(fit['bytes'])})"
                for fit in _nearest(one["what_fits"], one["gpu"])
            ]
            yield from textwrap.wrap(
                f"{policy['policy']} does not fit on {one['gpu']}: {readable(one['missing_bytes'])}"
                f" ({one['missing_bytes']:,} bytes) are missing. What fits: {'; '.join(fits) or 'nothing'}.",
                WIDTH,
                subsequent_indent="  ",
            )


def _nearest(fits: Sequence[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """The first few on the same GPU, and the first other GPU."""
    same = [fit for fit in fits if fit["gpu"] == gpu][: SUGGESTIONS - 1]
    return same + [fit for fit in fits if fit["gpu"] != gpu][: SUGGESTIONS - len(same)]


def _notes(report: dict[str, Any]) -> Iterator[str]:
    origins: dict[tuple[float, str], list[str]] = {}
    for on in report["policies"][0]["gpus"] if report["policies"] else ():
        origins.setdefault((on["efficiency"], on["efficiency_basis"]), []).append(on["gpu"])
    for (value, words), gpus in origins.items():
        yield from _wrapped(
            "", f"Share of the peak that kernels reach on {', '.join(gpus)}: {value:.1%}, {words}."
        )
    one = next(iter(report["efficiency"].values()))
    yield from _wrapped(
        "",
        f"Low - high: at the {one['lowest']:.0%} and {one['highest']:.0%} that published FPS under full would"
        " each need.",
    )
    yield from _wrapped("", uncertainty())
    missing = dict.fromkeys(text for one in report["policies"] for text in one["memory"]["not_counted"])
    for text in missing:
        yield from _wrapped("", f"Not counted: {text}.")
    yield f"A GPU fits if {readable(report['reserve_bytes'])} of its memory stay free."


def _rate(fps: float) -> str:
    return f"{fps:.2f}" if fps < 10 else f"{fps:.1f}"


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _wrapped(first: str, text: str) -> list[str]:
    """Text with that before its first line; its other lines begin below its first word, or set in."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (len(first) or 2))
