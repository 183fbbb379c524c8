"""A job refuses what it cannot record."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.analyze import Job
from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import random_weights
from tests.conftest import mixed_map, small_spec


def test_a_policy_whose_layers_choose_for_themselves_is_refused(tmp_path: Path) -> None:
    spec = small_spec()
    policy = tmp_path / "own.toml"
    policy.write_text('base = "forcing-kv"\nname = "own"\n[retain]\nshared = false\n', encoding="utf-8")
    job = Job(spec, random_weights(spec), [], policy=str(policy), headmap=mixed_map(spec))
    with pytest.raises(InputError, match=r"policy own: its layers choose .*; expected retain.shared = true"):
        job.plan()
