"""From what a golden file says to what the product is told: a `Case` for each variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import Decoder, ModelSpec, Positions, Schedule, TextEncoder
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.rules import everything_seen, forcing_kv
from tests.golden.said import Said

PATCH = 2
X0 = "x_t - sigma * flow"
RENOISE = "(1 - sigma) * x0 + sigma * noise"
LEVELS_AGREE = 1e-6
"""Relative; the files have timesteps in float32."""


@dataclass(frozen=True)
class Case:
    """A variant of a file, as the product runs it."""

    variant: str
    spec: ModelSpec
    policy: Policy
    headmap: HeadMap | None
    noise: str
    """Name of its noise (chunk, step, 1, channels, frames, height, width)."""
    text: str
    chunks: int
    """That are generated."""


def case_of(file: GoldenFile, variant: str) -> Case:
    """What the product is told of a variant. Raises GoldenError for what it cannot be told."""
    own = file.variants[variant]
    if not isinstance(own, Mapping):
        raise GoldenError(f"of the variant it says {own!r} only")
    said = Said(own, file.spec.get("policy") or {}, file.spec)
    said.get("policy", None)
    frames, chunks = said.number("frames_per_chunk", least=1), said.number("chunks", least=1)
    spec = replace(_model(file, said, frames), schedule=_schedule(said), positions=_positions(said))
    if said.get("switch_at_chunk", None) is not None:
        raise GoldenError("switches are not run yet")
    if said.get("start_frames", 0):
        raise GoldenError("given start latents are not run yet")
    kind = str(said.get("kind", "full"))
    static_heads = said.get("static_heads", None)
    if kind.startswith("forcing-kv") and static_heads is not None:
        spec, policy = forcing_kv(spec, said)
        headmap = headmap_of(spec, static_heads)
    elif kind == "full":
        spec, policy = everything_seen(spec, said, chunks * frames)
        headmap = None
    else:
        raise GoldenError(f"the policy {kind!r} is not known")
    case = Case(variant, spec, policy, headmap, str(said.get("noise", "noise")), "text", chunks)
    said.number("text_tokens")
    if unread := said.unread():
        raise GoldenError(f"it has settings that are not known: {', '.join(unread)}")
    return case


def _model(file: GoldenFile, said: Said, frames: int) -> ModelSpec:
    """The sizes, checked against each other as far as the product derives them."""
    height, width = (said.number(f"latent_{side}", least=PATCH) for side in "hw")
    heads, head_dim = said.number("heads", least=1), said.number("head_dim", least=2)
    spec = ModelSpec(
        name=file.name,
        layers=said.number("layers", least=1),
        heads=heads,
        head_dim=head_dim,
        ffn_width=said.number("ffn", least=1),
        latent_channels=said.number("channels", least=1),
        patch=PATCH,
        text_width=said.number("text_dim", least=1),
        text_length=said.number("text_len", least=1),
        time_width=said.number("freq_dim", least=2),
        frames_per_chunk=frames,
        attended_frames=frames,
        ar_start=0,
        fps=16.0,
        width=8 * width,
        height=8 * height,
        schedule=Schedule((1000.0,)),
        decoder=Decoder("taehv", 8, 4),
        text=TextEncoder("umt5"),
    )
    derived = {
        "dim": spec.dim,
        "frame_tokens": (height // PATCH) * (width // PATCH),
        "rope_split": [2 * pairs for pairs in spec.rotary_pairs],
    }
    for name, value in derived.items():
        if said.get(name, value) != value:
            raise GoldenError(f"its {name} is {said.need(name)}, and the product makes it {value}")
    return spec


def _positions(said: Said) -> Positions:
    """A word, or a sentence that begins with it."""
    words = str(said.get("positions", "absolute"))
    for positions in get_args(Positions):
        if words.startswith(positions):
            found: Positions = positions
            return found
    raise GoldenError(f"its positions are {words!r}, which is not known")


def _schedule(said: Said) -> Schedule:
    """The schedule, checked against the noise levels that the file says were used."""
    file = said.get("schedule", None)
    if not isinstance(file, Mapping):
        raise GoldenError("its spec has no schedule")
    steps = Said(file)
    for name, known in (("x0", X0), ("renoise", RENOISE)):
        if steps.get(name, known) != known:
            raise GoldenError(f"its {name} is {steps.need(name)!r}, and only {known!r} is known")
    first = said.get("first_chunk", None) or said.get("first_generated_chunk", None)
    own = {name: said.get(name, None) for name in ("timesteps", "sigmas", "step_list")}
    common = {name: steps.get(name, None) for name in own}
    others = said.get("other_chunks", None) or (own if own["timesteps"] else common)
    warp, shift = bool(steps.get("warp", False)), float(steps.get("shift", 1.0))
    clean = float(steps.get("clean_timestep", 0))
    steps.get("timesteps_are", None), steps.get("sigma_lookup", None)
    if unread := steps.unread():
        raise GoldenError(f"its schedule has settings that are not known: {', '.join(unread)}")
    if first and first != others:
        raise GoldenError("steps of the first chunk are not run yet")
    schedule = Schedule(_steps_of(others, warp), warp=warp, shift=shift, context_timestep=clean)
    _check_levels(others, schedule.timesteps, schedule.sigmas)
    return schedule


def _steps_of(one: Mapping[str, Any], warp: bool) -> tuple[float, ...]:
    """Steps as presets have them: before warping, where they are warped."""
    steps = one.get("step_list") if warp else one.get("timesteps")
    if not steps:
        raise GoldenError(f"its schedule has no {'step_list' if warp else 'timesteps'}")
    return tuple(map(float, steps))


def _check_levels(said: Mapping[str, Any], timesteps: tuple[float, ...], sigmas: tuple[float, ...]) -> None:
    """The file says which were really used: another schedule is no rounding."""
    for name, made in (("timesteps", timesteps), ("sigmas", sigmas)):
        used = said.get(name)
        if used is None:
            continue
        pairs = list(zip(used, made, strict=False))
        if len(used) not in (len(timesteps), len(made)) or any(
            abs(mine - ref) > LEVELS_AGREE * max(abs(ref), LEVELS_AGREE) for ref, mine in pairs
        ):
            raise GoldenError(f"its {name} are {used}, and the product's {list(made[: len(used)])}")


def headmap_of(spec: ModelSpec, static: Any) -> HeadMap:
    """A map with those heads static in each layer, and the others dynamic."""
    if len(static) != spec.layers or any(not 0 <= head < spec.heads for row in static for head in row):
        raise GoldenError(f"its static heads {static} are not of {spec.layers} layers of {spec.heads} heads")
    labels = tuple(
        tuple("static" if head in row else "dynamic" for head in range(spec.heads)) for row in static
    )
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), labels, Rule("given"))


AS_ANOTHER = re.compile(r"as (\w+), but (.*)", re.DOTALL)
"""A variant that is said in words, by another one."""
