"""What heads see, from what a golden file says to a policy of the product."""

from __future__ import annotations

from dataclasses import replace

from forcingkv.runtime.kv.policies import ALL, Early, Policy, Unsplit
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.spec import ModelSpec
from tests.golden.files import GoldenError
from tests.golden.said import Said

CHUNK_OF_THE_RELEASE = 3
"""Frames that Forcing-KV's release counts `ar_start` in, whatever the chunk is, and that its selection needs
new in a chunk."""
SCORE_LAYER = 1
"""The layer whose keys are compared in Forcing-KV's release."""
BEFORE_SPLIT = {
    "sink and the newest max(static, transition) frames",
    "sink and newest frame",
}


def everything_seen(spec: ModelSpec, said: Said, frames: int) -> tuple[ModelSpec, Policy]:
    """Every head sees the sink and the newest frames, as many as the window has with the chunk's own."""
    sink, window = said.number("sink_frames"), said.need("window_frames", "window")
    if window == -1 or (isinstance(window, str) and window.startswith("everything")):
        window = -(-frames // spec.frames_per_chunk) * spec.frames_per_chunk
    if not isinstance(window, int) or window < spec.frames_per_chunk:
        raise GoldenError(f"its window is {window!r}, and a chunk has {spec.frames_per_chunk} frames")
    spec = replace(spec, attended_frames=window, sink_frames=sink)
    return spec, Policy("golden", "sink and window", {ALL: (Sink(), Recent())})


def forcing_kv(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy]:
    """Forcing-KV's release: static heads, dynamic heads, and layers that are not split."""
    before = said.get("before_split", None)
    if before not in BEFORE_SPLIT:
        raise GoldenError(f"what heads see before the split is {before!r}, which is not known")
    sink, transition = said.number("sink_frames"), said.number("transition_frames")
    # One newest frame before the split, so one in static heads.
    static = said.number("static_frames") if "max" in before else said.get("static_frames", 1)
    retained = _retained(spec, said)
    whole = max(static, transition)
    groups = {
        "static": of_some_frames(Sink(sink), Early(whole - static), Recent(static)),
        "dynamic": of_some_frames(Sink(sink), retained, Early(whole - transition), Recent(transition)),
        "unsplit": of_some_frames(Sink(sink), Recent(whole)),
    }
    layers = tuple(said.need("unsplit_layers"))
    policy = Policy(
        "golden", "as Forcing-KV's release", groups, Unsplit(layers, "unsplit") if layers else None
    )
    said.get("window", None), said.get("window_frames", None)  # these heads never look so far back
    attended = sink + whole + spec.frames_per_chunk
    ar_start = last_before_split(spec, said)
    return replace(spec, ar_start=ar_start, sink_frames=sink, attended_frames=attended), policy


def of_some_frames(*roles: Role | None) -> tuple[Role, ...]:
    """Without those of no frames: they hold nothing."""
    return tuple(role for role in roles if role is not None and getattr(role, "frames", None) != 0)


def last_before_split(spec: ModelSpec, said: Said) -> int:
    """The last chunk in which heads are alike. The release splits after the clean pass of a chunk that begins
    among the three frames from 3 * ar_start on."""
    ar_start, size = said.get("ar_start", None), CHUNK_OF_THE_RELEASE
    if not isinstance(ar_start, int) or ar_start < 0:
        raise GoldenError(f"its ar_start is {ar_start!r}")
    last = -(-size * ar_start // spec.frames_per_chunk)
    if last * spec.frames_per_chunk // size != ar_start:
        raise GoldenError(f"with chunks of {spec.frames_per_chunk} frames ar_start {ar_start} never comes")
    said_last, first = said.get("split_after_frame", None), said.get("first_split_frame", None)
    starts = last * spec.frames_per_chunk
    if said_last not in (None, starts) or first not in (None, starts + spec.frames_per_chunk):
        raise GoldenError(f"it is split after frame {said_last}, and by its ar_start after frame {starts}")
    return last


def _retained(spec: ModelSpec, said: Said) -> Retained | None:
    """Segments that are retained; None: none, since the policy has none or a chunk is too short for it."""
    enabled, count = said.get("dynamic_temporal_enabled", True), said.get("retained_segments", None)
    segments = said.get("segments_per_frame", None) or said.get("segments", None)
    ratio, frames = said.get("ratio", None), said.get("retained_frames", None)
    if count == 0 and segments is None:
        return None
    if not isinstance(segments, int) or not isinstance(ratio, float | int):
        raise GoldenError(f"its segments are {segments!r} a frame, of which the ratio {ratio!r} is kept")
    kept = round(CHUNK_OF_THE_RELEASE * segments * ratio)
    for said_kept in (count, None if frames is None else frames * segments):
        if enabled and said_kept not in (None, kept):
            raise GoldenError(
                f"{said_kept} segments are retained, and by its ratio {kept}: the release stops"
            )
    if not enabled or not kept or spec.frames_per_chunk < CHUNK_OF_THE_RELEASE:
        return None
    return Retained(segments=segments, ratio=ratio, score_layer=SCORE_LAYER)
