"""From what a golden file says to what the product is told: a `Case` for each variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.schedule import ChunkSteps, FirstCounts, Schedule
from forcingkv.runtime.spec import Decoder, ModelSpec, Positions, TextEncoder
from tests.golden.averages import MEMROPE, REWARD_FORCING, memrope, reward_forcing
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.pyramid import PYRAMID, pyramid
from tests.golden.rivals import DUMMY, KREA, dummy, krea
from tests.golden.rules import everything_seen, forcing_kv
from tests.golden.said import Said
from tests.golden.shots import cuts_of, is_longlive_2, schedule_of_shots, start_frames_of, with_shots
from tests.golden.switches import Change, change_of, words_of

PATCH = 2
X0 = "x_t - sigma * flow"
RENOISE = "(1 - sigma) * x0 + sigma * noise"
LEVELS_AGREE = 1e-6
"""Relative; the files have timesteps in float32."""


AS_ANOTHER = re.compile(r"as (\w+), but (.*)", re.DOTALL)
"""A variant that is said in words, by another one."""


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
    start_frames: int = 0
    """Frames of the tensor `start` that the video begins with."""
    changes: tuple[Change, ...] = ()
    """Of its prompt on the way."""

    @property
    def given(self) -> int:
        """Whole chunks that are given."""
        return self.start_frames // self.spec.frames_per_chunk


def case_of(file: GoldenFile, variant: str) -> Case:
    """What the product is told of a variant. Raises GoldenError for what it cannot be told."""
    words = words_of(file, variant)
    own = {} if words else _own(file, variant)
    said = Said(own, file.spec.get("policy") or {}, file.spec)
    said.get("policy", None)
    frames, chunks = said.number("frames_per_chunk", least=1), said.number("chunks", least=1)
    if is_longlive_2(file):
        return _of_shots(file, variant, _with_shots_of_file(file, own))
    spec = replace(_model(file, said, frames), schedule=_schedule(said), positions=_positions(said))
    change = change_of(words, said)
    start = said.get("start_frames", 0) and said.number("start_frames", least=1)
    kind = str(said.get("kind", "full"))
    static_heads = said.get("static_heads", None)
    headmap: HeadMap | None = None
    if kind == DUMMY:
        spec, policy, headmap = dummy(spec, said)
    elif kind == KREA:
        spec, policy = krea(spec, said)
        headmap = headmap_of(spec, static_heads)
    elif kind.startswith("forcing-kv") and static_heads is not None:
        spec, policy = forcing_kv(spec, said)
        headmap = headmap_of(spec, static_heads)
    elif kind == "full":
        spec, policy = everything_seen(spec, said, start + chunks * frames)
    elif kind.casefold().startswith((MEMROPE, REWARD_FORCING)):
        rule = memrope if kind.casefold().startswith(MEMROPE) else reward_forcing
        spec, policy = rule(spec, said)
    elif kind.casefold().startswith(PYRAMID):
        spec, policy, headmap = pyramid(spec, said)
    else:
        raise GoldenError(f"the policy {kind!r} is not known")
    noise = str(said.get("noise", "noise"))
    changes = () if change is None else (change,)
    case = Case(variant, spec, policy, headmap, noise, "text", chunks, start, changes)
    _check_texts(file, said)
    if unread := said.unread():
        raise GoldenError(f"it has settings that are not known: {', '.join(unread)}")
    return case


def _with_shots_of_file(file: GoldenFile, own: Mapping[str, Any]) -> Said:
    """What a file with shots says: of a variant whether it has them, of the file where they begin."""
    whole = {"shots_of_file" if name == "shots" else name: value for name, value in file.spec.items()}
    return Said(own, whole)


def _of_shots(file: GoldenFile, variant: str, said: Said) -> Case:
    frames, chunks = said.number("frames_per_chunk", least=1), said.number("chunks", least=1)
    model = replace(_model(file, said, frames), schedule=schedule_of_shots(file, variant, said))
    spec, policy = with_shots(model, said)
    start = start_frames_of(file, said, said.get("first_passes", None))
    text, cuts = cuts_of(said)
    for name in ("shots_of_file", "positions"):
        said.get(name, None)
    _check_texts(file, said, first="text0")
    if unread := said.unread():
        raise GoldenError(f"it has settings that are not known: {', '.join(unread)}")
    return Case(variant, spec, policy, None, "noise", text, chunks, start, cuts)


def _own(file: GoldenFile, variant: str) -> Mapping[str, Any]:
    """What the file says of a variant; in words, "as another, but ...", as far as the words are known."""
    own = file.variants[variant]
    if isinstance(own, Mapping):
        return own
    found = AS_ANOTHER.fullmatch(str(own))
    other = file.variants.get(found[1]) if found else None
    if found and isinstance(other, Mapping) and "only to a chunk at position 0" in found[2]:
        return {**other, "first_counts": "video"}
    raise GoldenError(f"of the variant it says {own!r} only, which is not known")


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


def _check_texts(file: GoldenFile, said: Said, first: str = "text") -> None:
    """A text has as many rows as its tokens are, and zeros after them: there is no mask."""
    counts = said.need("text_tokens")
    for number, tokens in enumerate(counts if isinstance(counts, list) else [counts]):
        name = f"text{number + (first == 'text')}" if number else first
        if file.tensor(name)[tokens:].any():
            raise GoldenError(f"its {name} has rows that are not 0 after its {tokens} tokens")


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
    counts: FirstCounts = "video" if said.get("first_counts", None) == "video" else "generated"
    own = {name: said.get(name, None) for name in ("timesteps", "sigmas", "step_list")}
    common = {name: steps.get(name, None) for name in own}
    others = said.get("other_chunks", None) or (own if own["timesteps"] else common)
    warp, shift = bool(steps.get("warp", False)), float(steps.get("shift", 1.0))
    clean = float(steps.get("clean_timestep", 0))
    steps.get("timesteps_are", None), steps.get("sigma_lookup", None)
    if unread := steps.unread():
        raise GoldenError(f"its schedule has settings that are not known: {', '.join(unread)}")
    schedule = Schedule(
        _steps_of(others, warp),
        warp=warp,
        shift=shift,
        context_timestep=clean,
        first=_steps_of(first, warp) if first and first != others else None,
        first_counts=counts,
        noise_levels="exact" if warp else "table",
    )
    _check_levels(others, schedule.later)
    if first and counts == "generated":
        _check_levels(first, schedule.of_chunk(0))
    return schedule


def _steps_of(one: Mapping[str, Any], warp: bool) -> tuple[float, ...]:
    """Steps as presets have them: before warping, where they are warped."""
    steps = one.get("step_list") if warp else one.get("timesteps")
    if not steps:
        raise GoldenError(f"its schedule has no {'step_list' if warp else 'timesteps'}")
    return tuple(map(float, steps))


def _check_levels(said: Mapping[str, Any], steps: ChunkSteps) -> None:
    """The file says which were really used: another schedule is no rounding."""
    for name, made in (("timesteps", steps.timesteps), ("sigmas", steps.sigmas)):
        used = said.get(name)
        if used is None:
            continue
        if len(used) not in (len(steps), len(made)) or any(
            abs(mine - ref) > LEVELS_AGREE * max(abs(ref), LEVELS_AGREE)
            for ref, mine in zip(used, made[: len(used)], strict=True)
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
