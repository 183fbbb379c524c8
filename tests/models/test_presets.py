"""Presets: the figures of docs/method.md, the policies at every geometry, and users' own files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy, policy_names
from forcingkv.runtime.shipped import shipped_names

PRESETS = ["causal-forcing", "krea-14b", "longlive", "raven", "raven-cmgrpo", "self-forcing"]
FRAME_WISE = {
    "causal-forcing-framewise": ("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt", 4),
    "causal-forcing++-2step": ("zhuhz22/Causal-Forcing", "causal-forcing++/framewise-2step.pt", 2),
    "causal-forcing++-1step": ("zhuhz22/Causal-Forcing", "causal-forcing++/framewise-1step.pt", 1),
    "one-forcing": ("JiaqiFeng/OneForcing", "checkpoints/one_forcing.pt", 1),
}
"""Chunks of one frame: repository and file of the weights, and denoising passes of every later chunk."""
OF_SCENES = {
    "longlive2-5b": (999.0, 937.0, 833.0, 624.0),
    "longlive2-5b-2step": (999.0, 833.0),
}
"""LongLive 2: timesteps of a chunk."""
RECOMPUTED = ["krea-14b-served"]
"""Their context is made anew before each chunk: `tests/runtime/test_context.py`."""
GEOMETRIES = {"480p": (60, 104, 1560), "720p": (90, 160, 3600), "1080p": (136, 240, 8160)}


def test_the_presets_are_there() -> None:
    assert shipped_names("forcingkv.models.presets") == sorted(
        [*PRESETS, *FRAME_WISE, *OF_SCENES, *RECOMPUTED, "demo", "demo-occluded"]
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes(preset: str) -> None:
    spec = load_spec(preset)
    layers, heads, ffn = (40, 40, 13824) if preset == "krea-14b" else (30, 12, 8960)
    assert (spec.layers, spec.heads, spec.head_dim, spec.ffn_width) == (layers, heads, 128, ffn)
    assert (spec.latent_channels, spec.patch, spec.frames_per_chunk) == (16, 2, 3)
    assert (spec.text_width, spec.text_length, spec.time_width, spec.rotary_pairs) == (
        4096,
        512,
        256,
        (22, 21, 21),
    )
    assert (spec.fps, spec.frames_of(1), spec.frames_of(2), spec.frames_of(7)) == (16, 9, 21, 81)
    assert (spec.epsilon, spec.rope_theta, spec.position_table) == (1e-6, 10000, False)
    assert spec.ar_start == (2 if preset == "longlive" else 1)
    assert (spec.attended_frames, spec.sink_frames) == ((12, 3) if preset == "longlive" else (21, 0))
    for name, (height, width, tokens) in GEOMETRIES.items():
        geometry = spec.geometry(name)
        assert (geometry.latent_height, geometry.latent_width, geometry.frame_tokens) == (
            height,
            width,
            tokens,
        )


SOURCES = {
    "self-forcing": ("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", None),
    "longlive": ("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", "models/lora.pt"),
    "causal-forcing": ("zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt", None),
    "raven": ("mvp-lab/RAVEN", "raven_model.pt", None),
    "raven-cmgrpo": ("mvp-lab/RAVEN", "cmgrpo_raven_merge.pt", None),
    "krea-14b": ("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors", None),
}
KEYS = {"self-forcing": "generator_ema", "longlive": "generator", "causal-forcing": "generator"}
"""Entries that the authors of a model take. The other files are flat."""
ALPHAS = {"longlive": 256, "raven-cmgrpo": 256}


@pytest.mark.parametrize("preset", PRESETS)
def test_where_the_weights_are(preset: str) -> None:
    source = load_spec(preset).source
    assert source is not None
    assert (source.hub, source.file, source.lora) == SOURCES[preset]
    assert source.lora_alpha == ALPHAS.get(preset)
    if preset in KEYS:
        assert source.key == KEYS[preset]


@pytest.mark.parametrize("preset", FRAME_WISE)
def test_frame_wise_presets(preset: str) -> None:
    """Self Forcing's sizes, a chunk a frame, and four steps for the first one."""
    spec, base, (hub, file, later) = load_spec(preset), load_spec("self-forcing"), FRAME_WISE[preset]
    differing = {"name", "frames_per_chunk", "ar_start", "schedule", "source"}
    assert {f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(base, f.name)} <= (
        differing
    )
    assert (spec.frames_per_chunk, spec.attended_frames, spec.sink_frames, spec.ar_start) == (1, 21, 0, 3)
    assert (spec.frames_of(1), spec.frames_of(2), spec.frames_of(21), spec.chunks_for(5)) == (1, 5, 81, 21)
    four = base.schedule.of_chunk(0)
    assert four.timesteps == pytest.approx((1000, 937.5, 833.333, 625), abs=1e-3)
    assert spec.schedule.of_chunk(0) == four
    wanted = {4: four.timesteps, 2: (four.timesteps[0], four.timesteps[2]), 1: (1000.0,)}[later]
    assert {spec.schedule.of_chunk(chunk).timesteps for chunk in range(1, 30)} == {wanted}
    # With a start image One-Forcing gives no frame four steps, the others the first that they generate.
    given = wanted if preset == "one-forcing" else four.timesteps
    assert spec.schedule.of_chunk(1, given=1).timesteps == given
    source = spec.source
    assert source is not None
    assert (source.hub, source.file, source.key, source.lora) == (hub, file, "generator_ema", None)


@pytest.mark.parametrize("preset", FRAME_WISE)
def test_frames_each_head_of_a_frame_wise_model_sees(preset: str) -> None:
    full = plan_of(preset, "480p", "full")
    assert cached_frames(full, 5, "all", 30) == [min(chunk, 20) for chunk in range(30)]
    window = plan_of(preset, "480p", "window")
    assert cached_frames(window, 5, "all", 12) == [min(chunk, 9) for chunk in range(12)]
    pruned = plan_of(preset, "480p", "forcing-kv")
    assert cached_frames(pruned, 5, "static", 12) == [0, 1, *[2] * 10]
    # Of each frame that leaves, the 2 of 6 segments that are least like the next one.
    assert cached_frames(pruned, 5, "dynamic", 12) == [0, 1, *[2] * 3, *[2 + 2 / 6] * 7]
    assert pruned.choice is not None
    assert (pruned.choice.candidates, pruned.choice.kept) == (6, 2)


@pytest.mark.parametrize(("preset", "timesteps"), OF_SCENES.items())
def test_presets_of_longlive_2(preset: str, timesteps: tuple[float, ...]) -> None:
    spec = load_spec(preset)
    assert (spec.layers, spec.heads, spec.head_dim, spec.ffn_width) == (30, 24, 128, 14336)
    assert (spec.latent_channels, spec.fps, spec.frames_of(1), spec.frames_of(2)) == (48, 24, 29, 61)
    assert spec.schedule.of_chunk(0) == spec.schedule.later
    assert spec.schedule.later.timesteps == timesteps
    assert (spec.recache, spec.scene_frames, spec.scene_offset) == ("cut", 8, 8.0)
    full = plan_of(preset, "704p", "full")
    assert (full.frame_tokens, full.window_frames) == (880, 32)
    assert [role.name for role in full.layers[0][0].roles] == ["sink", "scene"]
    assert cached_frames(full, 5, "all") == [0, 8, 16, 24, 24, 24, 24, 24]
    assert len(full.phases) == 4


def test_the_counts_of_lingbot_world_2(tmp_path: Path) -> None:
    """A sink of 6 frames and chunks of 4, in a window of 18 that is no multiple of one."""
    path = tmp_path / "lingbot.toml"
    path.write_text(
        'base = "self-forcing"\nname = "lingbot"\n'
        "frames_per_chunk = 4\nattended_frames = 18\nsink_frames = 6\n"
    )
    spec = load_spec(str(path))
    plan = build_plan(spec, spec.geometry("480p"), load_policy("full"))
    assert cached_frames(plan, 5, "all") == [0, 4, 8, 12, 14, 14, 14, 14]
    assert (spec.chunks_to_fill, spec.frames_of(1), spec.frames_of(2)) == (5, 13, 29)
    for changes, message in [
        ("sink_frames = 15", "sink_frames is 15; expected 0 to 14"),
        ("attended_frames = 3", "attended_frames is 3; expected 4 or more"),
    ]:
        (tmp_path / "own.toml").write_text(f'base = "lingbot.toml"\nname = "own"\n{changes}\n')
        with pytest.raises(InputError, match=message):
            load_spec(str(tmp_path / "own.toml"))


def plan_of(preset: str, resolution: str, policy: str) -> CachePlan:
    """With two thirds of the heads static, or a third of each class of Dummy Forcing."""
    spec, chosen = load_spec(preset), load_policy(policy)
    labels = list(chosen.groups) if chosen.needs_headmap else ["none"]
    row = tuple(labels[head % len(labels)] for head in range(spec.heads))
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(identity, (row,) * spec.layers, Rule("every second"))
    return build_plan(spec, spec.geometry(resolution), chosen, headmap)


def cached_frames(plan: CachePlan, layer: int, label: str, chunks: int = 8) -> list[float]:
    """Cached frames that the heads of a group see, chunk by chunk."""
    group = next(group for group in plan.layers[layer] if group.label == label)
    return [sum(plan.tokens(group, r, c) for r in group.roles) / plan.frame_tokens for c in range(chunks)]


@pytest.mark.parametrize("resolution", GEOMETRIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_frames_each_head_sees(preset: str, resolution: str) -> None:
    """docs/method.md, for ar_start 1, and 2 for LongLive."""
    late = preset == "longlive"

    pruned = plan_of(preset, resolution, "forcing-kv")
    assert [group.label for group in pruned.layers[0]] == ["static"], "layer 0 is not split"
    assert cached_frames(pruned, 0, "static") == [0, 2, 2, 2, 2, 2, 2, 2]
    assert cached_frames(pruned, 5, "static") == [0, 2, 2, 2, 2, 2, 2, 2]
    assert cached_frames(pruned, 5, "dynamic") == (
        [0, 2, 2, 2, 3, 3, 3, 3] if late else [0, 2, 2, 3, 3, 3, 3, 3]
    )
    assert pruned.choice is not None
    assert (pruned.choice.layer, pruned.choice.kept) == (1, 6)
    assert pruned.choice.split.kept_tokens == {"480p": 260, "720p": 600, "1080p": 1360}[resolution]

    full = plan_of(preset, resolution, "full")
    assert cached_frames(full, 5, "all") == (
        [0, 3, 6, 9, 9, 9, 9, 9] if late else [0, 3, 6, 9, 12, 15, 18, 18]
    )
    sinks = [
        full.tokens(group, role, 7) for group in full.layers[0] for role in group.roles if role.takes_rows
    ]
    assert sinks == ([3 * full.frame_tokens] if late else [])

    assert cached_frames(plan_of(preset, resolution, "window"), 5, "all") == [0, 3, 6, 9, 9, 9, 9, 9]

    dummy = plan_of(preset, resolution, "dummy-forcing")
    before = [0, 3, 4] if late else [0, 3]  # all heads see the first frame and the newest three
    for label, after in (("sink", 1), ("neighbour", 3), ("dummy", 1)):
        assert cached_frames(dummy, 5, label) == [*before, *[after] * (8 - len(before))]

    krea = plan_of(preset, resolution, "forcing-kv-krea")
    history = [0, 3, 6] if late else [0, 3]  # all of it
    for label, after in (("static", 1), ("dynamic", 3)):
        assert cached_frames(krea, 0, label) == [*history, *[after] * (8 - len(history))]


@pytest.mark.parametrize("policy", policy_names())
def test_bytes_grow_with_the_tokens(policy: str) -> None:
    sizes = {name: plan_of("krea-14b", name, policy).kv_bytes("bfloat16") for name in GEOMETRIES}
    each = [sizes[name] / tokens for name, (_, _, tokens) in GEOMETRIES.items()]
    # Patches that are merged stand over the edge of 45 rows.
    assert max(each) == pytest.approx(min(each), rel=1e-3 if policy == "pyramid" else 0)
    if policy == "full":
        assert [round(size / 2**30) for size in sizes.values()] == [25, 58, 131]


def test_a_spec_may_be_based_on_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text('base = "longlive"\nname = "two"\nlayers = 2\n[schedule]\ncontext_timestep = 50.0\n')
    base, spec = load_spec("longlive"), load_spec(str(path))
    schedule = dataclasses.replace(base.schedule, context_timestep=50.0)
    assert spec == dataclasses.replace(base, name="two", layers=2, schedule=schedule)
    above = tmp_path / "above.toml"
    above.write_text(f'base = "{path}"\nname = "above"\n')
    assert load_spec(str(above)) == dataclasses.replace(spec, name="above")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "nosuch"', "there is no model 'nosuch'"),
        ("base = 3", "has the base 3; expected a name"),
        ('base = "SELF"', "is based on itself"),
        ('base = "longlive"\ncolour = "red"', "unknown field 'colour'"),
        ('base = "longlive"\n[decoder]\nkind = "jpeg"', "decoder: kind is 'jpeg'; expected 'pixels' or"),
        ("base = ", "is not TOML"),
    ],
)
def test_a_spoilt_base_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text.replace("SELF", str(path)))
    with pytest.raises(InputError, match=message):
        load_spec(str(path))


def test_the_variant_of_the_decision_shows_frame_wise_models_as_many_frames(tmp_path: Path) -> None:
    """docs/decisions/0038: 5 and 6 frames with the chunk, as forcing-kv has in chunks of three."""
    page = Path(__file__).parents[2] / "docs" / "decisions" / "0038-chunks-of-any-length.md"
    (block,) = re.findall("^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "wide.toml").write_text(block)
    plan = plan_of("one-forcing", "480p", str(tmp_path / "wide.toml"))
    assert cached_frames(plan, 0, "static") == [0, 1, 2, 3, 4, 4, 4, 4]
    assert cached_frames(plan, 5, "dynamic") == [0, 1, 2, 3, 4, 5, 5, 5]
