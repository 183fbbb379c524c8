"""`forcingkv encode`: prompts are checked first, what was encoded is kept, what is cut is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from forcingkv.models.text_encoder import PromptEncoder
from forcingkv.models.umt5 import Umt5Files
from forcingkv.runtime import memory
from forcingkv.runtime.text import read_embeds
from tests.conftest import Ran
from tests.models.test_text_encoder import LENGTH, SPEC, WIDTH, diffusers_folder, wan_folder

PROMPTS = ["a red kite", "a kite", "red dune", "a dune", "kite"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a spec, an encoder and prompts."""
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    wan_folder(tmp_path / "encoder")
    return tmp_path


def words(place: Path, out: str = "embeds.safetensors") -> list[str]:
    given = {"model": "spec.toml", "text-encoder": "encoder", "prompts": "prompts.txt", "out": out}
    return ["encode", *(word for name, file in given.items() for word in (f"--{name}", str(place / file)))]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(files: Umt5Files) -> Any:
        raise AssertionError("the encoder is loaded although the prompts are wrong")

    monkeypatch.setattr(Umt5Files, "load", load)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("&nbsp;", "prompts.txt, line 3: the prompt is empty once it is cleaned; expected some words"),
        ("\ufeff", "prompts.txt, line 3: the prompt is empty once it is cleaned"),
        ("\u200b\u202e \u2060", "prompts.txt, line 3: the prompt is empty once it is cleaned"),
        ("\x0b\x1b[0m", "prompts.txt, line 3: the prompt is empty once it is cleaned"),
        ("\x00", "prompts.txt, line 3 has the character U+0000, which is not text"),
    ],
)
def test_a_line_that_cannot_be_encoded_is_named_before_the_encoder_is_loaded(
    line: str, message: str, place: Path, run: Callable[..., Ran]
) -> None:
    (place / "prompts.txt").write_text(f"a red kite\na kite\n{line}\n", encoding="utf-8")
    ran = run(*words(place))
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not list(place.glob("*embeds*"))


@pytest.mark.usefixtures("never_loaded")
def test_half_characters_of_a_jsonl_are_refused(place: Path, run: Callable[..., Ran]) -> None:
    (place / "prompts.jsonl").write_text('{"prompts": ["a kite"]}\n{"prompts": ["a \\ud83d kite"]}\n')
    ran = run(*words(place), "--prompts", place / "prompts.jsonl")
    assert (ran.code, "prompts.jsonl, line 2: the prompt has half a character" in ran.err) == (2, True), (
        ran.err
    )


@pytest.mark.usefixtures("never_loaded")
def test_an_encoder_that_does_not_fit_into_memory_is_refused(
    place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 20_000)
    ran = run(*words(place))
    assert (ran.code, "memory: the text encoder needs about" in ran.err) == (2, True), ran.err
    assert "Encode on a machine with more memory" in ran.err


@pytest.mark.usefixtures("never_loaded")
def test_a_place_that_cannot_be_written_is_refused(place: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(place, "."))
    assert (ran.code, "is a folder; expected the name of a file" in ran.err) == (2, True), ran.err


@pytest.mark.usefixtures("never_loaded")
def test_a_file_of_something_else_is_not_replaced(place: Path, run: Callable[..., Ran]) -> None:
    os.mkfifo(place / "pipe")
    for name in ("prompts.txt", "encoder/models_t5_umt5-xxl-enc-bf16.pth", "pipe"):
        before = (place / name).read_bytes() if name != "pipe" else b""
        ran = run(*words(place, name))
        message = "is a pipe or a device" if name == "pipe" else f"{name} is there, and would be replaced"
        assert (ran.code, message in ran.err) == (2, True), ran.err
        assert name == "pipe" or (place / name).read_bytes() == before
    assert (place / "pipe").is_fifo()


def test_a_link_is_written_through(place: Path, run: Callable[..., Ran]) -> None:
    (place / "embeds.safetensors").symlink_to("elsewhere.safetensors")
    for _ in range(2):
        assert run(*words(place)).code == 0
    assert (place / "embeds.safetensors").is_symlink()
    assert len(read_embeds(place / "elsewhere.safetensors").prompts) == 5


def test_what_is_cut_and_what_is_cleaned_away_is_said(place: Path, run: Callable[..., Ran]) -> None:
    long = "a red kite " * 400
    (place / "prompts.txt").write_text(f"\na kite\n{long}\na\x0bred dune\n", encoding="utf-8")
    ran = run(*words(place), "--json")
    assert ran.code == 0, ran.err
    assert f"prompts.txt, line 3: 1,201 tokens, the last {1201 - LENGTH:,} are not used" in ran.err
    assert "line 4: control characters (U+000B) are cleaned away: the encoder sees 'ared dune'" in ran.err
    said = json.loads(ran.out)
    assert said["tokens"] == [3, LENGTH, 3]
    assert [(note["line"], note["tokens"], note["unused"]) for note in said["notes"]] == [
        (3, 1201, 1201 - LENGTH),
        (4, 3, 0),
    ]
    embeds = read_embeds(place / "embeds.safetensors")
    assert embeds.tokens == (3, 1201, 3)
    assert [embeds.cut(prompt) for prompt in ("a kite", long)] == [0, 1201 - LENGTH]


def test_prompts_that_clean_to_the_same_are_encoded_once(place: Path, run: Callable[..., Ran]) -> None:
    (place / "prompts.txt").write_text("a  red kite\na red&nbsp;kite\na kite\n")
    assert json.loads(run(*words(place), "--json").out)["prompts"] == 2
    embeds = read_embeds(place / "embeds.safetensors")
    assert (embeds.prompts, embeds.cleaned) == (("a  red kite", "a kite"), ("a red kite", "a kite"))
    assert embeds.place("a red&nbsp;kite") == 0


def test_every_layout_writes_the_same_embeddings(place: Path, run: Callable[..., Ran]) -> None:
    diffusers_folder(place / "diffusers")
    assert run(*words(place)).code == 0
    assert run(*words(place, "other.safetensors"), "--text-encoder", place / "diffusers").code == 0
    one, other = (read_embeds(place / f"{name}.safetensors") for name in ("embeds", "other"))
    assert one.arrays[0].shape == (4, WIDTH)
    for found, expected in zip(one.arrays, other.arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stops", [1, 4])
def test_after_ctrl_c_the_same_command_goes_on(
    stops: int, place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words(place, "whole.safetensors")).code == 0
    real, calls, until = PromptEncoder.encode_tokens, [], [stops]

    def stopping(encoder: PromptEncoder, ids: Any) -> Any:
        if len(calls) == until[0]:
            raise KeyboardInterrupt
        calls.append(ids)
        return real(encoder, ids)

    monkeypatch.setattr(PromptEncoder, "encode_tokens", stopping)
    ran = run(*words(place))
    assert (ran.code, f"stopped after {stops} of 5 prompts: the same command goes on" in ran.err) == (
        130,
        True,
    )
    assert not (place / "embeds.safetensors").exists()
    until[0] = 100
    ran = run(*words(place), "--json")
    assert (ran.code, json.loads(ran.out)["went_on_after"]) == (0, stops), ran.err
    assert len(calls) == len(PROMPTS), "nothing is encoded twice"
    assert (place / "embeds.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
    assert not list(place.glob(".*forcingkv"))


def test_an_error_in_mid_way_loses_nothing(
    place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a prompt whose numbers overflow: its line is named, the others stay."""
    with monkeypatch.context() as patch:
        patch.setattr(np, "isfinite", lambda array: np.full(array.shape, len(array) != 3))
        ran = run(*words(place))
    assert (ran.code, "prompts.txt, line 2 gives an embedding that is not finite" in ran.err) == (2, True), (
        ran.err
    )
    assert json.loads(run(*words(place), "--json").out)["went_on_after"] == 1


def test_other_prompts_or_another_encoder_begin_anew(
    place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = place / ".embeds.safetensors.growing.forcingkv"
    assert run(*words(place, "whole.safetensors")).code == 0
    left.write_bytes((place / "whole.safetensors").read_bytes()[:-10])
    assert json.loads(run(*words(place), "--json").out)["went_on_after"] == 4
    left.write_bytes((place / "whole.safetensors").read_bytes()[:-10])
    real = transformers.UMT5EncoderModel.load_state_dict

    def tuned(model: Any, state: dict[str, Any], **options: Any) -> Any:
        changed = {
            name: tensor + 1 if name.endswith("final_layer_norm.weight") else tensor
            for name, tensor in state.items()
        }
        return real(model, changed, **options)

    monkeypatch.setattr(transformers.UMT5EncoderModel, "load_state_dict", tuned)
    ran = run(*words(place), "--json")
    assert json.loads(ran.out)["went_on_after"] == 0
    assert "what was left unfinished is of another command: begun anew" in ran.err


KILLED = """
import os, signal, sys
from forcingkv.models.text_encoder import PromptEncoder
real, calls = PromptEncoder.encode_tokens, []
def killing(encoder, ids):
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(ids)
    return real(encoder, ids)
PromptEncoder.encode_tokens = killing
sys.argv = ["forcingkv", *sys.argv[1:]]
from forcingkv.__main__ import main
main()
"""


@pytest.mark.long
def test_killed_and_started_again_gives_the_same_file(place: Path, run: Callable[..., Ran]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words(place)], capture_output=True, env=dict(os.environ), check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (place / "embeds.safetensors").exists()
    ran = run(*words(place), "--json")
    assert json.loads(ran.out)["went_on_after"] == 3
    assert run(*words(place, "whole.safetensors")).code == 0
    assert (place / "embeds.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
