"""Manifests that say what does not follow: sizes, dtypes, names of files, digests. None is a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.open_bundles import open_bundles
from tests.conftest import Ran
from tests.hostile.bundles import refused, remade, write
from tests.runtime.conftest import small_bundle

Edit = Callable[[dict[str, Any]], object]
PROMPT = "b a d"


def record(graph: str, kind: str, name: str, **changes: object) -> Edit:
    return lambda data: data["graphs"][graph][kind][name].update(changes)


def of_graph(graph: str, **changes: object) -> Edit:
    return lambda data: data["graphs"][graph].update(changes)


def renamed(old: str, new: str, data: dict[str, Any]) -> None:
    data["files"][new] = data["files"].pop(old)
    for graph in data["graphs"].values():
        for key in ("file", "weights"):
            graph[key] = new if graph[key] == old else graph[key]


SHAPES = [
    [4608],
    [1, 1, 3, 32, "x"],
    [None] * 5,
    [-1] * 5,
    [1.5] * 5,
    [True] * 5,
    [],
    [10**30],
    [[1]],
    ["a;b"],
]
DTYPES = ["O", "S3", "m8", "../x", "", "float64", "object", "<f4", "complex64", "float32 "]
ENDS = [
    ("prompt", "inputs", "text"),
    ("prompt", "outputs", "cross.0.keys"),
    ("step", "inputs", "latents"),
    ("step", "inputs", "cosines"),
    ("step", "inputs", "cache.0.static.sink.keys"),
    ("step", "inputs", "clean"),
    ("step", "outputs", "next_latents"),
    ("step", "outputs", "next.cache.0.static.sink.keys"),
    ("decode", "inputs", "latents"),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: f"{end[0]} {end[2]}")
def test_dtypes_and_shapes_that_do_not_follow_from_the_plan_are_refused(
    end: tuple[str, str, str], tmp_path: Path
) -> None:
    bundle, path = small_bundle("forcing-kv"), tmp_path / "b"
    whole = json.loads((bundle / "manifest.json").read_text())
    remade(bundle, path)
    for changes in [*({"shape": shape} for shape in SHAPES), *({"dtype": dtype} for dtype in DTYPES)]:
        data = json.loads(json.dumps(whole))
        record(*end, **changes)(data)
        (path / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=rf"its {end[1][:-1]} {end[2]} of {end[0]} is .* follows from"):
            Bundle.open(path)


@pytest.mark.parametrize("shape", [[0], [1.0], ["n"], [None], [True], [], [1 << 40], [1] * 9])
def test_caches_of_a_decoder_have_whole_sizes(shape: list[object], tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for kind, name in (("inputs", "feature.0"), ("outputs", "next.feature.0")):
            data["graphs"]["decode"][kind][name]["shape"] = shape

    refused(remade(small_bundle("taehv"), tmp_path / "b", change), "carries 'feature.0' as 'float32'")


NAMES: dict[str, tuple[Edit, str]] = {
    "one file by two names": (
        lambda d: d["files"].update({"./step.onnx": d["files"]["step.onnx"]}),
        "'./step.onnx'",
    ),
    "one file by four hundred": (
        lambda d: d["files"].update({"./" * n + "step.onnx": d["files"]["step.onnx"] for n in range(1, 400)}),
        "names the file",
    ),
    "two slashes": (lambda d: d["files"].update({"a//b": d["files"]["step.onnx"]}), "names the file 'a//b'"),
    "a name that differs in case": (
        lambda d: d["files"].update({"STEP.onnx": d["files"]["step.onnx"]}),
        "are one on some",
    ),
    "a name of escapes": (
        lambda d: d["files"].update({"\x1b[2J": d["files"]["step.onnx"]}),
        "names the file",
    ),
    "a stream": (lambda d: d["files"].update({"step.onnx:x": d["files"]["step.onnx"]}), "names the file"),
    "a file that nothing uses": (
        lambda d: d["files"].update({"extra.bin": d["files"]["step.onnx"]}),
        "which nothing in",
    ),
    "ONNX Runtime's own format": (lambda d: renamed("decode.onnx", "decode.ort", d), "ends in .onnx"),
    "weights of another kind": (
        lambda d: renamed("weights.safetensors", "weights.bin", d),
        "ends in .safetensors",
    ),
    "a graph in a folder": (lambda d: renamed("step.onnx", "graphs/step.onnx", d), "without folders"),
    "one file for two graphs": (of_graph("step", file="prompt.onnx"), "for 2 things"),
    "a fourth graph": (
        lambda d: d["graphs"].update(more=d["graphs"]["step"]),
        "for 2 things|has a graph 'more'",
    ),
    "no weights": (of_graph("prompt", weights=None), "takes weights from the file 'weights.safetensors'"),
}
SIZES: dict[str, tuple[Edit, str]] = {
    "negative weights": (of_graph("step", weight_bytes=-(10**15)), "weight_bytes of 'step' is"),
    "negative activations": (of_graph("decode", activation_bytes=-1), "activation_bytes of 'decode' is"),
    "no weights said": (lambda d: d["graphs"]["step"].pop("weight_bytes"), "weight_bytes = None"),
    "no activations said": (lambda d: d["graphs"]["step"].pop("activation_bytes"), "activation_bytes = None"),
    "fewer weights than there are": (of_graph("step", weight_bytes=1), "the manifest says weight_bytes = 1"),
    "fewer activations than are needed": (of_graph("step", activation_bytes=1), "activation_bytes = 1"),
    "weights beyond all machines": (of_graph("step", weight_bytes=1 << 60), "weight_bytes of 'step' is"),
    "a difference that is no number": (lambda d: d["verification"].update(step=float("nan")), "finite"),
    "a difference without end": (lambda d: d["verification"].update(step=float("inf")), "finite"),
    "an input more": (
        lambda d: d["graphs"]["step"]["inputs"].update(x={"dtype": "float32", "shape": [1]}),
        "not known",
    ),
    "an output less": (lambda d: d["graphs"]["decode"]["outputs"].pop("frames"), "not of the size"),
}


@pytest.mark.parametrize("case", NAMES | SIZES)
def test_a_manifest_that_export_would_not_write_is_refused(case: str, tmp_path: Path) -> None:
    edit, message = (NAMES | SIZES)[case]
    refused(remade(small_bundle("forcing-kv"), tmp_path / "b", edit), message)


def test_weights_in_a_file_that_no_digest_covers_are_refused(tmp_path: Path) -> None:
    """Replaced later, the bundle's digest would be the same, and the video another."""

    def change(data: dict[str, Any]) -> None:
        data["graphs"]["prompt"]["weights"] = "extra.safetensors"

    refused(remade(small_bundle("full"), tmp_path / "b", change), "has no digest of extra.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "step.onnx", "weights.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    bundle = remade(small_bundle("full"), tmp_path / "b")
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    refused(bundle, "is missing|is not a bundle")


def test_a_graph_that_is_changed_after_the_bundle_was_opened_is_not_loaded(tmp_path: Path) -> None:
    """ONNX Runtime gets the bytes that were looked through, whatever the file is by then."""
    bundle = remade(small_bundle("full"), tmp_path / "b")
    opened = Bundle.open(bundle)
    for graph in ("prompt", "step", "decode"):
        write(bundle, f"{graph}.onnx", b"another graph")
    with Session.open(opened) as session, Session.open(small_bundle("full")) as whole:
        made = [next(one.generate(PROMPT, seed=1, chunks=1)).frames for one in (session, whole)]
    np.testing.assert_array_equal(*made)
    refused(bundle, "cannot be read as an ONNX graph")


def test_the_digest_that_someone_said_is_asked_for(tmp_path: Path, run: Callable[..., Ran]) -> None:
    bundle = small_bundle("full")
    digest, changed = Bundle.open(bundle).digest, remade(bundle, tmp_path / "b")
    assert Bundle.open(bundle, expect=digest.upper()).digest == digest
    Session.open(bundle, expect_digest=digest).close()
    with pytest.raises(InputError, match=rf"full|has the digest [0-9a-f]{{64}}; expected {digest}"):
        Bundle.open(changed, expect=digest)
    with pytest.raises(InputError, match="has the digest"):
        Session.open(Bundle.open(changed), expect_digest=digest)
    for wrong in ("", digest[:12], "sha256:" + digest, "g" * 64):
        with pytest.raises(
            InputError, match=r"the expected digest is .*; expected the 64 digits of a SHA-256"
        ):
            Bundle.open(bundle, expect=wrong)
    shown = run("inspect", bundle, "--expect-digest", digest)
    assert (shown.code, digest in shown.out) == (0, True), shown.err
    assert json.loads(run("inspect", bundle, "--json").out)["digest"] == digest
    video = ("--prompt", PROMPT, "--seconds", "0.1", "--out", tmp_path / "a.rgb")
    for command in (
        ("inspect", changed),
        ("generate", "--bundle", changed, *video),
        ("bench", "--bundle", changed),
    ):
        ran = run(*command, "--expect-digest", digest)
        assert (ran.code, f"expected {digest}" in " ".join(ran.err.split())) == (2, True), ran.err
    assert not (tmp_path / "a.rgb").exists()


def test_several_bundles_take_a_digest_each(tmp_path: Path, run: Callable[..., Ran]) -> None:
    paths = [small_bundle("full"), small_bundle("window")]
    digests = [Bundle.open(path).digest for path in paths]
    assert [one.digest for one in open_bundles(paths, digests)] == digests
    with pytest.raises(InputError, match="has the digest"):
        open_bundles(paths, digests[::-1])
    ran = run("bench", "--bundle", paths[0], "--bundle", paths[1], "--expect-digest", digests[0])
    assert (ran.code, "--expect-digest is given 1 times, and there are 2 bundles" in ran.err) == (2, True), (
        ran.err
    )
    for command in (("bench", "--model", "demo"), ("evaluate", "--video", "a.mp4")):
        ran = run(*command, "--expect-digest", digests[0])
        assert (ran.code, "--expect-digest is for bundles" in ran.err) == (2, True), ran.err
