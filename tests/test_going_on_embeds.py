"""`generate --restore` of a video whose prompts are embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import TextEncoder
from forcingkv.runtime.text import write_embeds
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.test_going_on import Run, about, content


def test_a_prompt_of_embeddings_is_known_by_its_digest(tmp_path: Path, run: Run) -> None:
    """Its words stand in the file of embeddings; another embedding of the same words is another prompt."""
    spec = small_spec(text=TextEncoder("umt5"), layers=1)
    bundle = shared_bundle(spec, random_model(spec).state_dict(), load_policy("window"), verify=False)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((4, 10)).astype(np.float32) for _ in range(3)]
    write_embeds(tmp_path / "e", ["a kite", "a boat"], arrays[:2], {})
    write_embeds(tmp_path / "f", ["a kite", "a boat"], arrays[1:], {})
    of = ["--prompt", "a  kite", "--embeds", tmp_path / "e", "--switch", "0.9:a boat"]
    made = ["generate", "--bundle", bundle, "--save", tmp_path / "s", "--save-every", 4, "--out"]
    assert run(*made, tmp_path / "a.mp4", *of, "--seconds", 1.3).code == 0
    wanted = content(tmp_path / "a.mp4")
    assert about(tmp_path / "a.mp4")["forcingkv.prompt"] == "a kite"
    going = [*made, tmp_path / "a.mp4", "--restore", tmp_path / "s"]
    for more in (of, [], of[:4]):
        ran = run(*going, *more)
        assert ran.code == 0, ran.err
        assert content(tmp_path / "a.mp4") == wanted
    for more, message in (
        (["--prompt", "a boat", "--embeds", tmp_path / "e"], "--prompt is 'a boat', and the saved video has"),
        (["--prompt", "a kite", "--embeds", tmp_path / "f"], "--prompt is 'a kite', and the saved video has"),
        (["--embeds", tmp_path / "f", "--switch", "0.9:a boat"], "--switch: asks for 'a boat' from chunk 5"),
    ):
        ran = run(*going, *more)
        assert (ran.code, message in ran.err) == (2, True), ran.err
    assert content(tmp_path / "a.mp4") == wanted
