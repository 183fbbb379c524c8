"""Policy files: groups that list their roles, what is refused, and how old files are shown the new form."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.runtime.kv.bank import Bank
from forcingkv.runtime.kv.early import Early, Opening
from forcingkv.runtime.kv.ema import Ema
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import ALL, Policy, load_policy, policy_names
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.kv.tokens import Tokens
from tests.conftest import roles, small_spec

POLICY = """
name = "tried"
summary = "a policy to try"

[groups]
dynamic = [
    { role = "sink", frames = 1 },
    { role = "retained", segments = 6, ratio = 0.33, score_layer = 1 },
    { role = "recent", frames = 1 },
]
"""


def read(tmp_path: Path, text: str = POLICY) -> Policy:
    file = tmp_path / "tried.toml"
    file.write_text(text)
    return load_policy(str(file))


def test_a_group_lists_its_roles_in_the_order_of_attention(tmp_path: Path) -> None:
    assert read(tmp_path).groups == {"dynamic": (Sink(1), Retained(6, 0.33, 1), Recent(1))}


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    found = read(tmp_path, POLICY.replace("score_layer = 1", 'choose = "random", shared = false, seed = 3'))
    assert found.groups["dynamic"][1] == Retained(6, 0.33, 0, "random", shared=False, seed=3)
    plain = read(tmp_path, 'name = "a"\nsummary = ""\n[groups]\nall = [{ role = "recent" }]\n')
    assert plain.groups == {"all": (Recent(None),)}


@pytest.mark.parametrize("name", policy_names())
def test_a_policy_survives_a_manifest(name: str) -> None:
    policy = load_policy(name)
    assert from_data(Policy, to_data(policy), "manifest") == policy


def test_the_shipped_policies_are_those_of_the_methods() -> None:
    forcing = load_policy("forcing-kv")
    assert forcing.groups == {"static": roles(1, 1), "dynamic": roles(1, 1, Retained(6, 0.33, 1))}
    for name, newest in (("dummy-forcing", 3), ("dummy-forcing-6", 6)):
        assert load_policy(name).groups == {
            "sink": (Sink(1), Early(newest)),
            "neighbour": (Opening(1), Recent(newest)),
            "dummy": (Opening(1), Early(newest - 1), Recent(1)),
        }
    for name, sink in (("forcing-kv-krea", ()), ("forcing-kv-krea-sink", (Sink(1),))):
        static, dynamic = ((*sink, Early(None), Recent(newest)) for newest in (1, 3))
        assert load_policy(name).groups == {"static": static, "dynamic": dynamic}
    assert load_policy("full").groups == {"all": roles(None, None)}
    older = Strided(1, 15, dtype="int4")
    assert load_policy("full-int4").groups == {"all": (Sink(dtype="int8"), older, Recent(3))}
    for label, fewer in load_policy("forcing-kv-int8").groups.items():
        assert fewer == tuple(replace(role, dtype="int8") for role in forcing.groups[label])
    assert load_policy("window").groups == {"all": roles(3, 6)}
    long, short = 0.01, 0.1
    assert load_policy("memrope").groups == {"all": (Sink(3), Ema((long, short)), Recent(4))}
    token_by_token = Ema((0.001,), of="tokens", starts="first")
    assert load_policy("reward-forcing").groups == {"all": (token_by_token, Recent(3))}
    assert load_policy("memflow").groups == {"all": (Sink(3), Bank(3, every=9), Recent(6))}
    assert load_policy("distinct-frames").groups == {
        "static": (Recent(1),),
        "dynamic": (Bank(2), Recent(1)),
    }
    assert load_policy("deep-forcing").groups == {
        "all": (Sink(share=0.5), Tokens(2, "queries", together=True), Recent(1))
    }
    assert load_policy("triattention").groups == {"all": (Sink(3), Tokens(2, "statistics"), Recent(1))}
    assert load_policy("head-forcing").groups == {
        "local": (Recent(3),),
        "anchor": (Sink(3), Recent(1)),
        "memory": (Sink(3), Bank(4, every=3), Recent(3)),
    }
    assert load_policy("pyramid").groups == {
        "wave": (Sink(1), Strided(6, 4, cyclic=True), Recent(1)),
        "anchor": (Sink(3), Strided(6, 4), Recent(1)),
        "veil": (Sink(3), Merged(4, 2, 4), Recent(1)),
    }


def test_a_sink_may_have_a_share_of_the_window(tmp_path: Path) -> None:
    """Rounded down, of what a model attends to; a manifest of a sink without one is as it was."""
    text = POLICY.replace("frames = 1", "share = 0.5", 1)
    (sink, *_) = read(tmp_path, text).groups["dynamic"]
    assert sink == Sink(share=0.5)
    for attended, frames in ((21, 10), (12, 6), (3, 1)):
        assert sink.opening_frames(small_spec(attended_frames=attended)) == frames
    assert sink.fitted(small_spec(attended_frames=21), 0, ()) == Sink(10)
    assert "share" not in to_data(Sink(3))
    with pytest.raises(InputError, match="has both frames and a share; expected one of the two"):
        Sink(3, 0.5)
    with pytest.raises(InputError, match=r"share is 1\.5; expected 0 to 1"):
        Sink(share=1.5)


def test_the_policy_that_was_dummy_forcing_before_is_still_read(tmp_path: Path) -> None:
    """A file of its own, or a bundle's manifest: under its name, with its groups."""
    groups = (
        'sink = [{ role = "sink", frames = 1 }]\nneighbour = [{ role = "recent", frames = 1 }]\ndummy = []'
    )
    old = read(tmp_path, f'name = "dummy-forcing"\nsummary = ""\n[groups]\n{groups}\n')
    assert old.groups == {"sink": (Sink(1),), "neighbour": (Recent(1),), "dummy": ()}
    assert from_data(Policy, to_data(old), "manifest") == old != load_policy("dummy-forcing")


def test_a_policy_may_say_when_heads_are_split(tmp_path: Path) -> None:
    """It goes before the model; a manifest of a policy that does not say it is as it was."""
    late = read(tmp_path, POLICY.replace("[groups]", "ar_start = 4\n[groups]"))
    spec = small_spec(layers=2)
    plan = build_plan(spec, spec.geometry(), replace(late, groups={ALL: late.groups["dynamic"]}))
    assert (spec.ar_start, plan.spec.ar_start) == (1, 4)
    assert [chunk for chunk in range(9) if plan.chooses(chunk)][:1] == [5]
    assert "ar_start" not in to_data(read(tmp_path))
    with pytest.raises(InputError, match=r"policy tried: ar_start is -1; expected 0 to 10000"):
        read(tmp_path, POLICY.replace("[groups]", "ar_start = -1\n[groups]"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'role = "sink"',
            'role = "sunk"',
            r"has the role 'sunk'; expected one of sink, retained",
        ),
        (
            '{ role = "sink", frames = 1 }',
            "{ frames = 1 }",
            r"has the role None; expected one of",
        ),
        ("frames = 1 }", "frames = 1, size = 2 }", r"dynamic\[0\]: unknown field 'size'"),
        ("score_layer = 1", 'choose = "best"', r"choose is 'best'; expected 'least-similar' or 'uniform'"),
        ("score_layer = 1", 'dtype = "int2"', r"dtype is 'int2'; expected 'int8' or 'int4' or 'fp8'"),
        ("score_layer = 1", "dtype = 8", r"dtype is 8; expected 'int8' or 'int4' or 'fp8'"),
        ("score_layer = 1", "shared = 1", r"shared is 1; expected a value of type bool"),
        ("score_layer = 1", "seed = -1", r"seed is -1; expected 0 to 9223372036854775807"),
        ("0.33", "1.2", r"ratio is 1.2; expected 0 to 1"),
        ('"recent", frames = 1', '"recent", frames = -1', r"frames is -1; expected 0 to 10000"),
        (
            'role = "recent", frames = 1',
            'role = "sink"',
            r"dynamic has a role twice \(sink, retained, sink\)",
        ),
        (
            "[groups]",
            '[groups]\nstatic = [{ role = "retained", segments = 4, ratio = 0.5 }]',
            "different ways",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, POLICY.replace(old, new, 1))


OLD = """
name = "old"
summary = "as policies were written before"

[groups.static]
sink_frames = 1
recent_frames = 0

[groups.dynamic]
recent_frames = 2
retained = true

[retain]
segments = 6
ratio = 0.33
score_layer = 1
choose = "uniform"
shared = true
"""


def test_an_old_file_is_refused_and_shown_in_the_new_form(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="before each group listed its roles") as refused:
        read(tmp_path, OLD)
    shown = refused.value.form or ""
    groups = tomllib.loads(shown[shown.index("[groups]") :])
    found = from_data(Policy, {"name": "old", "summary": ""} | groups, "shown")
    assert found.groups == {
        "static": (Sink(1),),
        "dynamic": (Sink(None), Retained(6, 0.33, 1, "uniform"), Recent(2)),
    }


def test_so_is_an_old_file_that_is_based_on_a_shipped_policy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="before each group listed its roles") as refused:
        read(tmp_path, 'base = "forcing-kv"\nname = "own"\n[retain]\nratio = 0.5\n')
    shown = refused.value.form or ""
    found = from_data(
        Policy, {"name": "own", "summary": ""} | tomllib.loads(shown[shown.index("[groups]") :]), ""
    )
    assert found.groups["dynamic"] == (Sink(1), Retained(6, 0.5, 1), Recent(1))


def test_so_is_an_old_manifest() -> None:
    data = {"name": "old", "summary": "", "groups": {"all": {"sink_frames": 3, "recent_frames": 6}}}
    with pytest.raises(InputError, match=r'all = \[\{ role = "sink", frames = 3 \}, \{ role = "recent"'):
        from_data(Policy, data, "manifest.json: policy")
