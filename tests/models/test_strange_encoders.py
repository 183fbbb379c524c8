"""Text encoders and tokenizers of strangers: no code of theirs runs, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.text_encoder import load_prompt_encoder
from tests.models.test_text_encoder import diffusers_folder, wan_folder

RUNS = "import pathlib\npathlib.Path('owned').write_text('owned')\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoilt, and the working folder, in which code of a stranger would leave a file."""

    def asked(*_: object) -> str:
        raise AssertionError("somebody is asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "encoder")
    return tmp_path / "encoder"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(place: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_prompt_encoder(place)
    assert not Path("owned").exists()


def test_what_a_token_is_described_by_is_not_printed(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library prints the names of entries that it does not know, commands to the terminal too."""
    path = place / "tokenizer" / "tokenizer.json"
    strange = {"id": 0, "content": "<pad>", "\x1b[2J": True}
    others = json.loads(path.read_text())["added_tokens"][1:]
    for token in (strange, {"id": 0, "\x9b2J": "<pad>"}):
        edit(path, added_tokens=[token, *others])
        refused(place, r"describes a token by .*2J")
    config = place / "tokenizer" / "tokenizer_config.json"
    edit(path, added_tokens=others)
    edit(config, added_tokens_decoder={"0": strange})
    refused(place, r"tokenizer_config\.json describes a token by")
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_tokenizer_whose_library_gives_up_is_refused(place: Path) -> None:
    """A panic of the tokenizers library is no Exception."""
    path = place / "tokenizer" / "tokenizer.json"
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    edit(
        path,
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [],
            "special_tokens": {"other": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
    )
    refused(place, r"cannot be read by transformers' AutoTokenizer \(no entry found for key\)")


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_tokenizer_is_not_run(known: bool, place: Path) -> None:
    """As `auto_map` asks for. With a class that transformers has, that is taken; else it is refused."""
    folder = place / "tokenizer"
    (folder / "own.py").write_text(f"{RUNS}class Own: pass\n")
    own = {} if known else {"tokenizer_class": "Own"}
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, **own)
    if known:
        assert load_prompt_encoder(place).encode("a red kite", 12).shape == (4, 24)
        assert not Path("owned").exists()
    else:
        refused(place, "cannot be read by transformers' AutoTokenizer")


def test_code_beside_an_encoder_is_not_run(place: Path) -> None:
    folder = place / "text_encoder"
    (folder / "own.py").write_text(RUNS)
    edit(folder / "config.json", auto_map={"AutoModel": "own.Own"}, architectures=["Own"])
    load_prompt_encoder(place)
    assert not Path("owned").exists()


class Owned:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (RUNS,)


def test_pickled_objects_are_not_made(place: Path, tmp_path: Path) -> None:
    """In a `.bin` of transformers, and in Wan's file."""
    (place / "text_encoder" / "model.safetensors").unlink()
    (place / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Owned()}))
    refused(place, "cannot be read|is refused")
    torch.save({"a": Owned()}, place / "text_encoder" / "pytorch_model.bin")
    refused(place, "it holds a pickled object that is not a tensor")
    wan = wan_folder(tmp_path / "wan")
    torch.save({"a": Owned()}, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    refused(wan, "it holds a pickled object that is not a tensor")


@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "merges_file"])
def test_a_tokenizer_takes_its_own_files(name: str, place: Path, tmp_path: Path) -> None:
    edit(place / "tokenizer" / "tokenizer_config.json", **{name: str(tmp_path / "secret")})
    refused(place, f"names a file as its {name}")
    edit(place / "tokenizer" / "tokenizer_config.json", **{name: None})
    load_prompt_encoder(place)


SPOILT: dict[str, Callable[[Path], object]] = {
    "is not JSON": lambda place: (place / "text_encoder/config.json").write_text("[" * 100_000),
    "would have 1000000000 layers": lambda place: edit(place / "text_encoder/config.json", num_layers=10**9),
    "does not describe a UMT5": lambda place: edit(place / "text_encoder/config.json", d_model="x"),
    "does not describe a UMT5 ": lambda place: edit(place / "text_encoder/config.json", dropout_rate=-999.0),
    "cannot be run as its configuration": lambda place: edit(
        place / "text_encoder/config.json", relative_attention_max_distance=0
    ),
    "more than 64 deep": lambda place: (place / "tokenizer/tokenizer.json").write_text("[" * 100_000),
    "AutoTokenizer": lambda place: edit(place / "tokenizer/tokenizer.json", post_processor={"type": "x"}),
    "AutoTokenizer ": lambda place: edit(place / "tokenizer/tokenizer_config.json", model_max_length={}),
    "AutoTokenizer  *": lambda place: (place / "tokenizer/tokenizer_config.json").write_text("[]"),
}


@pytest.mark.parametrize("message", SPOILT)
def test_what_is_spoilt_is_refused(message: str, place: Path) -> None:
    SPOILT[message](place)
    with pytest.raises(InputError, match=message.rstrip(" *")):
        load_prompt_encoder(place).encode("a red kite", 12)
