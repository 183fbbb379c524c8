"""The knobs of [retain] in policy files and manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.runtime.policies import Policy, Retain, load_policy

POLICY = """
name = "tried"
summary = "a policy to try"

[groups.dynamic]
sink_frames = 1
recent_frames = 1
retained = true

[retain]
segments = 6
ratio = 0.33
score_layer = 1
"""


def read(tmp_path: Path, more: str = "") -> Policy:
    file = tmp_path / "tried.toml"
    file.write_text(POLICY + more)
    return load_policy(str(file))


def test_a_file_without_the_knobs_has_their_defaults(tmp_path: Path) -> None:
    assert read(tmp_path).retain == Retain(6, 0.33, 1, "least-similar", True, 0)


def test_a_manifest_of_before_the_knobs_opens() -> None:
    policy = load_policy("forcing-kv")
    data = to_data(policy)
    for knob in ("choose", "shared", "seed"):
        del data["retain"][knob]
    assert from_data(Policy, data, "manifest") == policy


def test_a_file_says_how_to_choose(tmp_path: Path) -> None:
    policy = read(tmp_path, 'choose = "random"\nshared = false\nseed = 3\n')
    assert policy.retain == Retain(6, 0.33, 1, "random", False, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('choose = "best"', "retain: choose is 'best'; expected 'least-similar' or 'uniform' or 'random'"),
        ("seed = -1", "seed is -1; expected 0 or more"),
        ("shared = 1", "retain: shared is 1; expected a value of type bool"),
    ],
)
def test_a_wrong_knob_is_named(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, more)


def test_more_than_all_segments_cannot_be_kept(tmp_path: Path) -> None:
    file = tmp_path / "tried.toml"
    file.write_text(POLICY.replace("0.33", "1.2"))
    with pytest.raises(InputError, match=r"retain.ratio is 1.2; expected at most 1"):
        load_policy(str(file))
