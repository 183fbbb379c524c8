"""Presets: the figures of docs/method.md, the policies at every geometry, and users' own files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy, policy_names
from forcingkv.runtime.shipped import shipped_names

PRESETS = ["causal-forcing", "krea-14b", "longlive", "raven", "raven-cmgrpo", "self-forcing"]
GEOMETRIES = {"480p": (60, 104, 1560), "720p": (90, 160, 3600), "1080p": (136, 240, 8160)}


def test_the_presets_are_there() -> None:
    assert shipped_names("forcingkv.models.presets") == sorted([*PRESETS, "demo"])


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


def plan_of(preset: str, resolution: str, policy: str) -> CachePlan:
    """With two thirds of the heads static, or a third of each class of Dummy Forcing."""
    spec, chosen = load_spec(preset), load_policy(policy)
    labels = list(chosen.groups) if chosen.needs_headmap else ["none"]
    row = tuple(labels[head % len(labels)] for head in range(spec.heads))
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(identity, (row,) * spec.layers, Rule("every second"))
    return build_plan(spec, spec.geometry(resolution), chosen, headmap)


def cached_frames(plan: CachePlan, layer: int, label: str) -> list[float]:
    """Cached frames that the heads of a group see, chunk by chunk."""
    group = next(group for group in plan.layers[layer] if group.label == label)
    return [sum(plan.tokens(group, r, c) for r in group.roles) / plan.frame_tokens for c in range(8)]


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
    assert cached_frames(dummy, 5, "sink") == [0, 1, 1, 1, 1, 1, 1, 1]
    assert cached_frames(dummy, 5, "neighbour") == [0, 1, 1, 1, 1, 1, 1, 1]
    assert cached_frames(dummy, 5, "dummy") == [0] * 8


@pytest.mark.parametrize("policy", policy_names())
def test_bytes_grow_with_the_tokens(policy: str) -> None:
    sizes = {name: plan_of("krea-14b", name, policy).kv_bytes("bfloat16") for name in GEOMETRIES}
    assert len({sizes[name] / tokens for name, (_, _, tokens) in GEOMETRIES.items()}) == 1
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
