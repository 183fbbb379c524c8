"""What strangers write as JSON and TOML: every reader of files refuses it in a sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError, read_headmap
from forcingkv.headmaps.reading import DEEPEST, MOST_DIGITS, MOST_DOTS, is_json, parse_json, parse_toml
from forcingkv.measure.nominal import nominal_map
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec, shipped_file
from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle import read_data
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.prompts import read_prompts
from forcingkv.runtime.snapshot import Snapshot
from forcingkv.runtime.spec import PublicWeights
from forcingkv.runtime.tensors import read_header
from forcingkv.runtime.text import read_embeds
from forcingkv.runtime.video import open_writer

DEEP = "has tables within tables"
JSON_TEXTS = {
    "deep lists": ("[" * 100_000, DEEP),
    "deep tables": ('{"a":' * 100_000, DEEP),
    "deep enough": ("[" * 70 + "]" * 70, DEEP),
    "400 digits": ('{"a": %s}' % ("9" * 400), "more than 100 digits"),
    "5,000 digits": ('{"a": -%s}' % ("9" * 5000), "more than 100 digits"),
    "1e400": ('{"a": 1e400}', "1e400 is not a finite number"),
    "NaN": ('{"a": NaN}', "NaN is not a finite number"),
    "-Infinity": ('{"a": -Infinity}', "-Infinity is not a finite number"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
    "too many": ("[" + "[]," * (1 << 20) + "0]", "too many values"),
    "not text": (b'{"a": "\xff"}', "is not JSON"),
    "nothing": ("", "is not JSON"),
}


def content(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize("name", JSON_TEXTS)
def test_json_of_strangers_is_refused(name: str) -> None:
    text, why = JSON_TEXTS[name]
    with pytest.raises(InputError, match=f"the file is not JSON.*{why.removeprefix('has ')}|the file {why}"):
        parse_json(content(text), "the file")


TOML_TEXTS = {
    "deep lists": ("a = " + "[" * 3000, DEEP),
    "deep tables": ("a = " + "{a = " * 3000, DEEP),
    "400 digits": (f"a = {'9' * 400}", "more than 100 digits"),
    "hexadecimal": (f"a = 0x{'f' * 4000}", "more than 100 digits"),
    "5,000 digits": (f"a = {'9' * 5000}", "is not TOML"),
    "dots": ("a." * 60_000 + "b = 1", "more than 200 dots"),
    "twice": ("a = 1\na = 2", "is not TOML"),
    "too long": ("#" * 200_000, "more than 131072 bytes"),
    "not text": (b"a = '\xff'", "is not TOML"),
}


@pytest.mark.parametrize("name", TOML_TEXTS)
def test_toml_of_strangers_is_refused(name: str, tmp_path: Path) -> None:
    text, why = TOML_TEXTS[name]
    (tmp_path / "own.toml").write_bytes(content(text))
    for read in (load_spec, load_policy):
        with pytest.raises(InputError, match=f"own.toml is not TOML.*{why.removeprefix('has ')}|{why}"):
            read(str(tmp_path / "own.toml"))


def packed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def metadata(text: str) -> bytes:
    said = {"schema": "forcingkv.embeds/1", "prompts": text}
    return packed(json.dumps({"__metadata__": said}).encode())


READERS: dict[str, tuple[str, Callable[[bytes], bytes], Callable[[Path], object]]] = {
    "a manifest": ("manifest.json", bytes, lambda path: Bundle.open(path.parent)),
    "a head map": ("a.json", bytes, HeadMap.read),
    "a head map of any kind": ("a.json", bytes, read_headmap),
    "a state": ("state.json", bytes, lambda path: read_data(Snapshot, path)),
    "a header of tensors": ("a.safetensors", packed, read_header),
    "prompts in a header": (
        "a.safetensors",
        lambda text: metadata(text.decode(errors="surrogateescape")),
        read_embeds,
    ),
    "lines of prompts": ("a.jsonl", lambda text: text or b"{}", read_prompts),
    "the record of pictures": ("frames.json", bytes, lambda path: open_writer(path.parent, fps=16)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", JSON_TEXTS)
def test_every_reader_refuses_it(name: str, reader: str, tmp_path: Path) -> None:
    file, packs, read = READERS[reader]
    text, _ = JSON_TEXTS[name]
    (tmp_path / file).write_bytes(packs(content(text)))
    started = time.perf_counter()
    with pytest.raises(InputError):
        read(tmp_path / file)
    assert time.perf_counter() - started < 5


def test_so_do_readers_that_need_torch(tmp_path: Path) -> None:
    from forcingkv.analyze.recording import Recording
    from forcingkv.analyze.storage import Storage
    from forcingkv.models.lora.scales import _config
    from forcingkv.models.scales import _misread
    from forcingkv.models.tensor_files import shard_places

    for name, (text, _) in JSON_TEXTS.items():
        for file in (
            "x.safetensors.index.json",
            "adapter_config.json",
            "versions.json",
            "sample-0000.parquet",
        ):
            (tmp_path / file).write_bytes(content(text))
        said = content(text).decode(errors="replace") if name != "not text" else "["
        readers: list[Callable[[], object]] = [
            lambda: shard_places(tmp_path / "x.safetensors.index.json"),
            lambda: _config(tmp_path / "adapter_model.safetensors", {}),
            lambda said=said: _config(tmp_path / "a.safetensors", {"lora_adapter_metadata": said}),  # type: ignore[misc]
            lambda said=said: Recording.from_text(said, "a file"),  # type: ignore[misc]
            lambda: Storage(tmp_path).check_versions(),
        ]
        for read in readers:
            with pytest.raises(InputError):
                read()
        assert _misread(content(text))


def test_what_our_own_files_hold_is_read() -> None:
    nested: Any = 1
    for _ in range(DEEPEST):
        nested = [nested]
    data = [1, -1.5, "x", None, True, 10**MOST_DIGITS // 10, {"c": {}}]
    assert parse_json(json.dumps(data), "it") == data
    assert parse_json(json.dumps(nested), "it") == nested
    with pytest.raises(InputError, match=DEEP.removeprefix("has ")):
        parse_json(json.dumps([nested]), "it")
    assert parse_toml("a" + ".b" * 60 + " = 1.5\n# " + "." * (MOST_DOTS - 2), "it")["a"]["b"]["b"]
    assert parse_toml(b"\xef\xbb\xbfa = inf", "it") == {"a": float("inf")}


def test_a_mark_of_byte_order_is_taken_only_where_it_may_be() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "it", marked=True) == {"a": 1}
    with pytest.raises(InputError, match="BOM"):
        parse_json(b'\xef\xbb\xbf{"a": 1}', "it")


@settings(max_examples=40)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**90), 10**90)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_all_that_json_can_say_comes_back(data: Any) -> None:
    assert parse_json(json.dumps(data), "it") == data
    assert is_json(json.dumps(data))


def test_a_base_is_a_preset_or_lies_beside(tmp_path: Path) -> None:
    """What a stranger's spec names is not read from anywhere else, and its fields are not shown."""
    own, beside, far = tmp_path / "a" / "own.toml", tmp_path / "a" / "b.toml", tmp_path / "secret.toml"
    own.parent.mkdir()
    far.write_text('password = "hunter2"\n')
    beside.write_text('base = "self-forcing"\nname = "beside"\n')
    own.write_text('base = "b.toml"\nlayers = 3\n')
    spec = load_spec(str(own))  # whatever the working folder is
    assert (spec.name, spec.layers) == ("beside", 3)
    (own.parent / "link.toml").symlink_to(far)
    for base in ("../secret.toml", str(far), "link.toml"):
        own.write_text(f'base = "{base}"\n')
        with pytest.raises(InputError) as refused:
            load_spec(str(own))
        assert "password" not in str(refused.value)
        assert "folder" in str(refused.value)
    for number in range(20):
        (own.parent / f"{number}.toml").write_text(f'base = "{number + 1}.toml"\n')
    with pytest.raises(InputError, match="more than 16 bases"):
        load_spec(str(own.parent / "0.toml"))


@pytest.mark.parametrize("name", ["../secret.pt", "/etc/passwd", "a/../../b.pt", "", "a\\b", "a\0"])
def test_a_spec_names_files_of_its_repository_alone(name: str) -> None:
    """In whatever folder the weights are looked for."""
    for field in ("file", "lora"):
        with pytest.raises(InputError, match=r"source names the file .* not inside the folder"):
            PublicWeights(**{"hub": "a/b", "file": "c.pt", field: name})
    assert PublicWeights("a/b", "models/c.pt", lora="models/lora.pt").file == "models/c.pt"


@pytest.mark.parametrize("name", ["x" * 300, "../presets", "/{place}", "..", ".", "a\0b"])
def test_the_name_of_a_model_leads_to_no_other_file(name: str, tmp_path: Path) -> None:
    """Weights, prompts and maps that ship are found by the model's name, which a stranger may choose."""
    for file in ("weights.safetensors", "prompts.txt", "spec.json"):
        (tmp_path / file).write_text("secret")
    own = name.format(place=tmp_path)
    spec = replace(load_spec("demo"), name=own)
    assert shipped_file(own, "weights.safetensors") is shipped_file(own, "prompts.txt") is None
    with pytest.raises(InputError, match="no weights ship with"):
        load_weights(spec)
    with pytest.raises(InputError, match=r"no head map of .* is published"):
        nominal_map(spec, load_policy("forcing-kv"))
