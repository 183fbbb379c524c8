"""Text embeddings ahead of time: what was written is what the model gets, padded; faults are named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from forcingkv.headmaps import InputError
from forcingkv.runtime import text
from forcingkv.runtime.text import SCHEMA, Embeds, embeds_metadata, read_embeds, write_embeds
from tests.conftest import small_spec

SPEC = small_spec()  # text_length 5, text_width 10
MADE = {"encoder": "umt5-xxl", "text_length": 5}


def embeddings(count: int, tokens: int = 3, width: int = SPEC.text_width) -> list[npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((tokens, width), np.float32) for _ in range(count)]


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 5)), min_size=1, max_size=4))
def test_reading_gives_back_what_was_written(given: list[tuple[str, int]]) -> None:
    prompts = [prompt for prompt, _ in given]
    arrays = [embeddings(1, tokens)[0] + place for place, (_, tokens) in enumerate(given)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeds.safetensors"
        write_embeds(path, prompts, arrays, MADE)
        embeds = read_embeds(path)
        stored = load_file(path)
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata()
    assert embeds.prompts == tuple(prompts)
    assert (metadata["encoder"], metadata["text_length"]) == ("umt5-xxl", "5")
    for place, array in enumerate(arrays):
        np.testing.assert_array_equal(embeds.arrays[place], array, strict=True)
        np.testing.assert_array_equal(stored[f"embeds.{place}"], array, strict=True)


def test_an_embedding_is_padded_with_zeros_to_what_the_model_takes(tmp_path: Path) -> None:
    first, second = embeddings(2)
    write_embeds(tmp_path / "e", ["a cat", "a dog\n"], [first, second], MADE)
    embeds = read_embeds(tmp_path / "e")
    text = embeds.get(" a dog", SPEC)
    assert (text.shape, text.dtype) == ((1, 5, 10), np.float32)
    np.testing.assert_array_equal(text[0, :3], second)
    assert not text[0, 3:].any()
    write_embeds(tmp_path / "one", ["a cat"], [first], MADE)
    np.testing.assert_array_equal(read_embeds(tmp_path / "one").get(None, SPEC), embeds.get("a cat", SPEC))


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    (array,) = embeddings(1)
    metadata = {"schema": SCHEMA, "prompts": '["a"]'}
    save_file({"embeds.0": array.astype(np.float16)}, tmp_path / "e", metadata)
    read = read_embeds(tmp_path / "e").get("a", SPEC)
    np.testing.assert_array_equal(read[0, :3], array.astype(np.float16).astype(np.float32), strict=True)


def test_prompts_and_models_that_do_not_fit() -> None:
    prompts = ("a cat", *(f"{place} " + "long " * 20 for place in range(7)))
    embeds = Embeds(prompts, tuple(embeddings(8)), where="e.safetensors")
    with pytest.raises(InputError) as raised:
        embeds.get("a dog", SPEC)
    message = str(raised.value)
    assert "e.safetensors has no embedding of 'a dog'; expected one of 'a cat', '0 long long" in message
    assert "...' and 3 more. Make the file with: forcingkv encode" in message
    assert len(message) < 400
    with pytest.raises(InputError, match=r"has 8 prompts, and none was asked for; expected one of 'a cat'"):
        embeds.get(None, SPEC)
    with pytest.raises(InputError, match="has embeddings of width 10; expected 12, as small takes"):
        embeds.get("a cat", small_spec(text_width=12))
    with pytest.raises(InputError, match="has 3 tokens for 'a cat'; expected at most 2, as small takes"):
        embeds.get("a cat", small_spec(text_length=2))


@pytest.mark.parametrize(
    ("prompts", "arrays", "message"),
    [
        ([], [], "0 embeddings for 0 prompts"),
        (["a", "b"], embeddings(1), "1 embeddings for 2 prompts; expected one for each"),
        (["a"], [np.zeros((1, 3, 10))], "the embedding of 'a' has 3 dimensions"),
        (["a", "b"], [np.zeros((3, 10)), np.zeros((3, 9))], "the embedding of 'b' has the width 9"),
        (["a"], [np.full((3, 10), np.nan)], "the embedding of 'a' has values that are not finite"),
    ],
)
def test_faulty_embeddings_are_not_written(
    prompts: list[str], arrays: list[npt.NDArray[Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_embeds(tmp_path / "e", prompts, arrays, MADE)
    assert list(tmp_path.iterdir()) == []


ZEROS = np.zeros((3, 10), np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"embeds.0": ZEROS}, None, "has the schema None; expected 'forcingkv.embeds/1'"),
        ({"embeds.0": ZEROS}, {"schema": "forcingkv.embeds/2"}, "has the schema 'forcingkv.embeds/2'"),
        ({"embeds.0": ZEROS}, {"schema": SCHEMA}, "its metadata has no list of prompts"),
        ({"embeds.0": ZEROS}, {"schema": SCHEMA, "prompts": "[1]"}, "its metadata has no list of prompts"),
        ({"embeds.0": ZEROS}, {"schema": SCHEMA, "prompts": '["a", "b"]'}, "has 1 tensors for 2 prompts"),
        ({"embeds.1": ZEROS}, {"schema": SCHEMA, "prompts": '["a"]'}, "expected embeds.0 to embeds.0"),
        (
            {"embeds.0": ZEROS.astype(np.int64)},
            {"schema": SCHEMA, "prompts": '["a"]'},
            "embeds.0 is I64; expected F32, F16 or BF16",
        ),
        (
            {"embeds.0": ZEROS[0]},
            {"schema": SCHEMA, "prompts": '["a"]'},
            "of 'a' has 1 dimensions",
        ),
        ({"embeds.0": ZEROS + np.float32(np.inf)}, {"schema": SCHEMA, "prompts": '["a"]'}, "not finite"),
    ],
)
def test_a_faulty_file_is_refused(
    tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "e.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(InputError) as raised:
        read_embeds(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_are_cut_short_or_absent_are_refused(tmp_path: Path) -> None:
    write_embeds(tmp_path / "e", ["a"], embeddings(1), MADE)
    (tmp_path / "short").write_bytes((tmp_path / "e").read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        read_embeds(tmp_path / "short")
    with pytest.raises(InputError, match="cannot be read"):
        read_embeds(tmp_path / "absent")
    (tmp_path / "text").write_text(json.dumps({"prompts": ["a"]}))
    with pytest.raises(InputError, match="header"):
        read_embeds(tmp_path / "text")


WRITTEN = [
    "a red kite",
    "Caf\u00e9 &amp; bar",
    "it\u2019s  a \u201ckite\u201d",
    "l\u2019\u00e9t\u00e9",
    "\uff52\uff45\uff44",
]
CLEANED = ["a red kite", "Caf\u00e9 & bar", 'it\'s a "kite"', "l'\u00e9t\u00e9", "red"]


@pytest.fixture(params=["as encode writes it", "as it was written before"])
def embeds(request: pytest.FixtureRequest, tmp_path: Path) -> Embeds:
    """A file whose prompts are as people type them; files of before do not hold the cleaned ones."""
    cleaned = CLEANED if "encode" in request.param else []
    metadata = embeds_metadata(WRITTEN, cleaned, [], {})
    arrays = embeddings(len(WRITTEN))
    save_file({f"embeds.{place}": array for place, array in enumerate(arrays)}, tmp_path / "e", metadata)
    return read_embeds(tmp_path / "e")


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("a  red\tkite ", 0),
        ("a red&nbsp;kite", 0),
        ("Cafe\u0301 & bar", 1),
        ("Caf\u00e9 &amp;amp; bar", 1),
        ('it\u2019s a "kite"', 2),
        ("it's a &ldquo;kite&rdquo;", 2),
        ("l\u2019\u00e9t\u00e9", 3),
    ],
)
@pytest.mark.parametrize("ftfy", ["with ftfy", "without"])
def test_a_prompt_is_found_by_what_the_encoder_sees(
    prompt: str, place: int, ftfy: str, embeds: Embeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ftfy == "without":
        monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    np.testing.assert_array_equal(embeds.get(prompt, SPEC)[0, :3], embeds.arrays[place])


@pytest.mark.parametrize(("prompt", "place"), [("l'\u00e9t\u00e9", 3), ("red", 4)])
def test_with_ftfy_all_that_cleaning_makes_the_same_is_found(prompt: str, place: int, embeds: Embeds) -> None:
    np.testing.assert_array_equal(embeds.get(prompt, SPEC)[0, :3], embeds.arrays[place])


def test_a_prompt_that_is_not_there_names_the_nearest() -> None:
    prompts = [
        f"a {color} kite over {what}" for color in ("red", "blue") for what in ("dunes", "the sea", "Rome")
    ]
    embeds = Embeds(tuple(prompts), tuple(embeddings(6)), where="e.safetensors")
    with pytest.raises(InputError) as raised:
        embeds.get("a blue kite over the see", SPEC)
    message = str(raised.value)
    assert "no embedding of 'a blue kite over the see'; expected one of 'a blue kite over the sea'" in message
    assert "Nearest: 'a blue kite over the sea', " in message
    with pytest.raises(InputError) as raised:
        embeds.get("nothing of the kind", SPEC)
    assert "Nearest" not in str(raised.value)
    # Half of a broken character is not a quote: these are two prompts, and one is not there.
    russian = Embeds(("\u00d0\u2018",), tuple(embeddings(1)), cleaned=("\u0411",))
    with pytest.raises(InputError, match="no embedding of"):
        russian.get("\u00d0\u2019", SPEC)
    np.testing.assert_array_equal(russian.get("\u0411", SPEC)[0, :3], russian.arrays[0])


def test_what_is_cut_is_known(tmp_path: Path) -> None:
    metadata = embeds_metadata(["long", "short"], [], [9, 3], {})
    save_file({"embeds.0": ZEROS, "embeds.1": ZEROS}, tmp_path / "e", metadata)
    embeds = read_embeds(tmp_path / "e")
    assert [embeds.cut(prompt) for prompt in ("long", "short")] == [6, 0]
    for name, faulty in (("tokens", '["9", 3]'), ("cleaned", "[1, 2]"), ("tokens", "{}")):
        save_file({"embeds.0": ZEROS, "embeds.1": ZEROS}, tmp_path / "e", {**metadata, name: faulty})
        with pytest.raises(InputError, match="faulty list of cleaned prompts or tokens"):
            read_embeds(tmp_path / "e")
    save_file({"embeds.0": ZEROS, "embeds.1": ZEROS}, tmp_path / "e", {**metadata, "tokens": "[3]"})
    with pytest.raises(InputError, match="has 1 counts of tokens for 2 prompts; expected one for each"):
        read_embeds(tmp_path / "e")


def test_of_several_embeddings_that_differ_none_is_taken(tmp_path: Path) -> None:
    one, other = embeddings(2)
    write_embeds(tmp_path / "e", ["a cat", "a  cat", "a dog", "a dog"], [one, other, one, one], MADE)
    embeds = read_embeds(tmp_path / "e")
    assert [embeds.place(prompt) for prompt in ("a cat", "a  cat", "a dog")] == [0, 1, 2]
    with pytest.raises(
        InputError, match="has several embeddings of 'a cat', which differ; expected one for each"
    ):
        embeds.place("a   cat")
    with pytest.raises(InputError, match="has several embeddings of 'a cat', which differ"):
        Embeds(("a cat", "a cat"), (one, other)).place("a cat")


def test_more_tokens_than_the_prompt_has_are_refused() -> None:
    with pytest.raises(InputError, match="the embedding of 'a cat' has 3 tokens, and its prompt 2"):
        Embeds(("a cat",), (embeddings(1)[0],), tokens=(2,))
