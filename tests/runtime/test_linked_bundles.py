"""Bundles whose files are links: those of a hub's cache make the same video, no others are followed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.headmaps.files import inside
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends.linked_graphs import graph_and_folder, relocated
from forcingkv.runtime.protobuf import coded, varint
from tests.conftest import Ran

PROMPT = "b a d"


def in_hub_cache(bundle: Path, hub: Path, below: str = "", repository: str = "models--me--bundle") -> Path:
    """The files of a bundle as a hub's client lays them out: `blobs/SHA` and links from a snapshot."""
    snapshot = hub / repository / "snapshots" / "0abc" / below
    blobs = hub / repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for file in bundle.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cached(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    return in_hub_cache(bundles("taehv"), tmp_path)


def frames(bundle: Path) -> list[np.ndarray[Any, Any]]:
    with Session.open(bundle) as session:
        return [chunk.frames for chunk in session.generate(PROMPT, seed=3, chunks=3)]


@pytest.mark.parametrize("below", ["", "bundles/taehv"])
def test_a_bundle_in_the_cache_of_a_hub_makes_the_same_video(
    below: str, bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    plain, linked = bundles("taehv"), in_hub_cache(bundles("taehv"), tmp_path, below)
    assert Bundle.open(linked).digest == Bundle.open(plain).digest
    for a, b in zip(frames(plain), frames(linked), strict=True):
        np.testing.assert_array_equal(a, b)
    elsewhere = tmp_path / "by another name"
    elsewhere.symlink_to(linked)
    with Session.open(elsewhere) as session:
        assert session.plan.policy.name == "forcing-kv"


def test_onnx_runtime_maps_the_file_that_the_links_lead_to(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given no path with a link in it (1.24 refuses those), and no content of the weights (a copy)."""
    given: list[tuple[object, str]] = []
    session = ort.InferenceSession

    def load(model: Any, options: Any, **rest: Any) -> Any:
        key = "session.model_external_initializers_file_folder_path"
        given.append((model, options.get_session_config_entry(key)))
        return session(model, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", load)
    Session.open(cached).close()
    blobs = cached.parents[1] / "blobs"
    assert [folder for _, folder in given] == [str(blobs.resolve())] * 3
    for graph, weights in zip((given[0], given[1], given[2]), ("weights", "weights", "decoder"), strict=True):
        assert isinstance(graph[0], bytes)
        locations = {
            entry.value
            for tensor in onnx.ModelProto.FromString(graph[0]).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations == {(cached / f"{weights}.safetensors").resolve().name}


def test_a_plain_graph_is_loaded_by_its_path_or_as_the_bytes_that_were_read(
    bundles: Callable[[str], Path],
) -> None:
    step, weights = bundles("full") / "step.onnx", bundles("full") / "weights.safetensors"
    assert graph_and_folder(step, weights) == (str(step), None)
    assert graph_and_folder(step, None) == (str(step), None)
    assert graph_and_folder(step, weights, b"read") == (b"read", step.parent.resolve())


def test_nothing_in_a_graph_changes_but_where_its_weights_lie(bundles: Callable[[str], Path]) -> None:
    for name, weights in (("step", "weights"), ("prompt", "weights"), ("decode", "decoder")):
        path = bundles("taehv") / f"{name}.onnx"
        long, model = "f" * 300, onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = long if entry.key == "location" else entry.value
        content, file = path.read_bytes(), f"{weights}.safetensors"
        assert onnx.ModelProto.FromString(relocated(content, name, file, long)) == model
        assert relocated(content, name, file, file) == content


def test_the_commands_open_a_bundle_in_the_cache_of_a_hub(
    cached: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    shown = run("inspect", "--json", cached)
    assert (shown.code, json.loads(shown.out)["schema"]) == (0, "forcingkv.bundle/1")
    made = run(
        "generate", "--bundle", cached, "--prompt", PROMPT, "--seconds", "0.5", "--out", tmp_path / "a.rgb"
    )
    assert made.code == 0, made.err
    assert (tmp_path / "a.rgb").stat().st_size > 0


def test_a_link_to_another_file_of_the_folder_is_followed(
    bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    linked = tmp_path / "b"
    shutil.copytree(bundles("full"), linked)
    (linked / "large").mkdir()
    (linked / "weights.safetensors").rename(linked / "large" / "w")
    (linked / "weights.safetensors").symlink_to("large/w")
    for a, b in zip(frames(bundles("full")), frames(linked), strict=True):
        np.testing.assert_array_equal(a, b)


def link(target: Callable[[Path], Path], name: str = "weights.safetensors") -> Callable[[Path], None]:
    """Put a link in the place of a file of a snapshot, to a copy of that file at another place."""

    def apply(snapshot: Path) -> None:
        place = target(snapshot)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / name, place)
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(place)

    return apply


def through_blobs(snapshot: Path) -> None:
    """A link into the blobs that is itself a link out of them."""
    blob = (snapshot / "weights.safetensors").resolve()
    outside = snapshot.parents[2] / "private"
    blob.rename(outside)
    blob.symlink_to(outside)


def circle(snapshot: Path) -> None:
    (snapshot / "step.onnx").unlink()
    (snapshot / "step.onnx").symlink_to("step.onnx")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            link(lambda s: s.parents[2] / "private"),
            r"'weights.safetensors', which is not inside the folder: it",
        ),
        (
            link(lambda s: s.parents[2] / "other" / "blobs" / "x"),
            r"a link to .*x; expected .* to one in .*blobs",
        ),
        (link(lambda s: s.parents[1] / "refs" / "x"), "which is not inside"),
        (link(lambda s: s.parents[0] / "0abd" / "x"), "which is not inside"),
        (link(lambda s: s.parents[2] / "private", "manifest.json"), "'manifest.json', which is not inside"),
        (link(lambda s: s.parents[2] / "private", "headmap.json"), "'headmap.json', which is not inside"),
        (link(lambda s: s.parents[2] / "private", "step.onnx"), "'step.onnx', which is not inside"),
        (through_blobs, r"a link to .*private; expected a file in the folder.*cp --remove-destination"),
        (circle, r"'step.onnx', which no file can be called|step.onnx is missing"),
        (lambda s: (s / "step.onnx").resolve().unlink(), "step.onnx is missing: it is a link to .*blobs"),
        (lambda s: (s / "step.onnx").resolve().write_bytes(b"other"), "step.onnx has 5 bytes"),
    ],
)
def test_no_other_link_is_followed_though_the_content_be_right(
    cached: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(cached)
    with pytest.raises(InputError, match=message):
        Session.open(cached)


def test_a_folder_that_is_no_snapshot_has_no_blobs(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot" / "b"
    shutil.copytree(bundles("full"), folder)
    link(lambda s: tmp_path / "blobs" / "x")(folder)
    with pytest.raises(
        InputError, match=r"a link to .*; expected a file in the folder\. Put the file itself"
    ):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../../x", "a\\b", "a\0b", "x" * 300, "a\ud800"])
def test_names_that_are_no_names_of_a_file_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which is not inside the folder; expected relative|no file can be"):
        inside(tmp_path, name)


def test_a_graph_that_names_another_file_is_refused(cached: Path) -> None:
    """Such as another blob: of the folder that it is told of, ONNX Runtime would read any file."""
    path = cached / "step.onnx"
    secret = cached.parents[1] / "blobs" / "secret"
    secret.write_bytes((cached / "weights.safetensors").read_bytes())
    model = onnx.load(path, load_external_data=False)
    external = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in external.external_data if entry.key == "location").value = "secret"
    path.resolve().write_bytes(model.SerializeToString())
    manifest = cached / "manifest.json"
    data = json.loads(manifest.read_text())
    content = path.read_bytes()
    data["files"]["step.onnx"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest.write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"takes weights from the file 'secret'; expected 'weights.safetensors'"
    ):
        Session.open(cached)
    with pytest.raises(InputError, match="expected no file: its manifest names none"):
        graph_and_folder(path, None)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_graph_or_are_refused(content: bytes) -> None:
    refused = None
    try:
        there = relocated(content, "any.onnx", "w", "w")
    except InputError as error:
        refused = str(error)
    if refused is None:
        assert there == content
    else:
        assert "cannot be read as an ONNX graph" in refused or "takes weights from" in refused


def test_protobuf_numbers_are_read_as_they_are_written() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**63 - 1):
        written = coded(number)
        assert varint(written + b"x", 0) == (number, len(written))
