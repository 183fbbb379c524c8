"""The plugins in a real TensorRT: which nodes they take, what they build to, and what they launch.

TensorRT runs in a child process: its parser ends it where a library has the name that the wheel gives it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
from onnx import TensorProto, helper

from forcingkv.headmaps.errors import InputError
from forcingkv.prune import onnx_operators, plugin
from forcingkv.prune.launcher import KernelLauncher, LaunchSizes
from forcingkv.prune.plugin import (
    OPERATORS,
    DynamicPrune,
    DynamicPruneFollow,
    UnevenPrune,
    UnevenPruneFollow,
    check,
    launch,
)
from forcingkv.runtime.kv.segments import Split

ROOT = Path(__file__).parents[2]
HEADS, WIDTH, FRAME, SEGMENTS, KEPT = 2, 16, 12, 6, 6
NEW, SIZE = 3 * FRAME, FRAME // SEGMENTS

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


class Recorder:
    """A launcher that notes what it is asked to launch."""

    dtype, width, digest = "bfloat16", WIDTH, b"kernels"

    def __init__(self, *, uneven: bool = False) -> None:
        self.uneven = uneven
        self.calls: list[tuple[str, list[int], dict[str, int], int]] = []

    def score(self, *given: Any) -> None:
        *pointers, sizes, stream = given
        self.calls.append(("score", pointers, asdict(sizes), stream))

    def collect(self, pointers: list[int], sizes: LaunchSizes, stream: int) -> None:
        self.calls.append(("collect", pointers, asdict(sizes), stream))


@pytest.mark.parametrize("transition", [0, FRAME])
def test_scoring_launches_scores_then_collects(transition: int) -> None:
    recorder = Recorder()
    keys, new = (2, HEADS, transition, WIDTH), (2, HEADS, NEW, WIDTH)
    sizes = DynamicPrune(FRAME, SEGMENTS, KEPT).sizes([keys, keys, new, new])
    assert sizes == LaunchSizes(2, HEADS, transition, NEW, SIZE, KEPT, FRAME)
    check(sizes)
    launch(cast(KernelLauncher, recorder), sizes, [1, 2, 3, 4], [5, 6, 7], 8, 9)
    assert recorder.calls == [
        ("score", [1, 3, 8, 7], asdict(sizes), 9),
        ("collect", [1, 2, 3, 4, 7, 5, 6], asdict(sizes), 9),
    ]
    assert sizes.workspace_bytes == 4 * (transition + 2 * FRAME)


@pytest.mark.parametrize("transition", [0, FRAME])
def test_following_only_collects(transition: int) -> None:
    recorder = Recorder()
    keys, new = (1, HEADS, transition, WIDTH), (1, HEADS, NEW, WIDTH)
    sizes = DynamicPruneFollow(SIZE).sizes([keys, keys, new, new, (KEPT,)])
    assert sizes == LaunchSizes(1, HEADS, transition, NEW, SIZE, KEPT)
    check(sizes)
    launch(cast(KernelLauncher, recorder), sizes, [1, 2, 3, 4, 5], [6, 7], 0, 9)
    assert recorder.calls == [("collect", [1, 2, 3, 4, 5, 6, 7], asdict(sizes), 9)]
    assert sizes.workspace_bytes == 0


def test_uneven_segments_are_launched_with_how_frames_are_split() -> None:
    """13 tokens in 6 segments: 2 of each are kept."""
    recorder, frame = Recorder(uneven=True), FRAME + 1
    keys, new = (1, HEADS, frame, WIDTH), (1, HEADS, 3 * frame, WIDTH)
    split = Split(frame, SEGMENTS)
    scoring = UnevenPrune(frame, SEGMENTS, KEPT).sizes([keys, keys, new, new])
    assert scoring == LaunchSizes(1, HEADS, frame, 3 * frame, 2, KEPT, frame, split)
    assert (scoring.candidates, scoring.workspace_bytes) == (18, 4 * 3 * frame)
    following = UnevenPruneFollow(frame, SEGMENTS).sizes([keys, keys, new, new, (KEPT,)])
    assert following == LaunchSizes(1, HEADS, frame, 3 * frame, 2, KEPT, uneven=split)
    assert following.workspace_bytes == 0
    for sizes in (scoring, following):
        check(sizes)
    launch(cast(KernelLauncher, recorder), scoring, [1, 2, 3, 4], [5, 6, 7], 8, 9)
    launch(cast(KernelLauncher, recorder), following, [1, 2, 3, 4, 7], [5, 6], 0, 9)
    assert [name for name, *_ in recorder.calls] == ["score", "collect", "collect"]

    part = (1, HEADS, frame + 1, WIDTH)
    for sizes in (
        UnevenPrune(frame, SEGMENTS, KEPT).sizes([keys, keys, part, part]),
        UnevenPruneFollow(frame, SEGMENTS).sizes([keys, keys, part, part, (KEPT,)]),
    ):
        with pytest.raises(ValueError, match="new keys hold 14 tokens, which is no multiple of 13"):
            check(sizes)
    for wrong in ((5, 6, 1), (5, 0, 1), (5, 2, 0)):
        with pytest.raises(ValueError, match="segments with a token each"):
            UnevenPrune(*wrong)
    with pytest.raises(ValueError, match="no 6 segments with a token each in 5"):
        UnevenPruneFollow(5, 6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no segments of equal size"):
        DynamicPrune(frame_tokens=FRAME, segments=5, kept=KEPT)
    one_frame, part, eleven = ((1, HEADS, tokens, WIDTH) for tokens in (FRAME, FRAME + 1, 11 * FRAME))
    with pytest.raises(ValueError, match="new keys hold 13 tokens, which is no multiple of 12"):
        check(DynamicPrune(FRAME, SEGMENTS, KEPT).sizes([one_frame, one_frame, part, part]))
    with pytest.raises(ValueError, match="7 segments are to be kept, and there are 6"):
        check(DynamicPrune(FRAME, SEGMENTS, 7).sizes([one_frame] * 4))
    with pytest.raises(InputError, match="has 66 segments to choose"):
        check(DynamicPrune(FRAME, SEGMENTS, KEPT).sizes([*[one_frame] * 2, *[eleven] * 2]))
    with pytest.raises(ValueError, match="transition keys hold 13 tokens, which is no multiple of 2"):
        check(DynamicPruneFollow(SIZE).sizes([part, part, one_frame, one_frame, (KEPT,)]))


def test_the_plugins_are_the_operators_that_export_writes() -> None:
    assert plugin.PLUGIN_NAMESPACE == onnx_operators.PLUGIN_NAMESPACE
    attributes = {f.name: set(f.attribute) - {"plugin_namespace"} for f in onnx_operators.prune_functions()}
    for kind in OPERATORS:
        assert attributes[kind.__name__] == {field.name for field in fields(kind)}


def model(segments: int = SEGMENTS, frame: int = FRAME) -> bytes:
    """A scoring and a following node with their bodies, the transition frame's length left open."""
    uneven, new = frame != FRAME, 3 * frame
    split = {"segment_tokens": SIZE} if not uneven else {"frame_tokens": frame, "segments": segments}
    kv = ["transition_keys", "transition_values", "new_keys", "new_values"]
    nodes = [
        helper.make_node(
            "UnevenPrune" if uneven else "DynamicPrune",
            kv,
            ["keys", "values", "indices"],
            domain=onnx_operators.DOMAIN,
            kept=KEPT,
            frame_tokens=frame,
            segments=segments,
            plugin_namespace=onnx_operators.PLUGIN_NAMESPACE,
        ),
        helper.make_node(
            "UnevenPruneFollow" if uneven else "DynamicPruneFollow",
            [*kv, "indices"],
            ["keys2", "values2"],
            domain=onnx_operators.DOMAIN,
            **split,
            plugin_namespace=onnx_operators.PLUGIN_NAMESPACE,
        ),
    ]
    lengths: dict[str, int | str] = {"transition": "cached", "new": new}
    bf16 = TensorProto.BFLOAT16
    inputs = [
        helper.make_tensor_value_info(name, bf16, [1, HEADS, lengths[name.split("_")[0]], WIDTH])
        for name in kv
    ]
    outputs = [
        helper.make_tensor_value_info(name, bf16, [1, HEADS, KEPT * SIZE, WIDTH])
        for name in ("keys", "values", "keys2", "values2")
    ]
    outputs.append(helper.make_tensor_value_info("indices", TensorProto.INT64, [KEPT]))
    opsets = [helper.make_opsetid("", onnx_operators.OPSET), helper.make_opsetid(onnx_operators.DOMAIN, 1)]
    graph = helper.make_graph(nodes, "prune", inputs, outputs)
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    made.functions.extend(onnx_operators.prune_functions())
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def child(folder: Path) -> dict[str, Any]:
    """What the child process reports."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("*.so.*"):
        for name in (library.name, library.name.split(".so")[0] + ".so"):
            (folder / name).symlink_to(library)
    models = [folder / name for name in ("good.onnx", "bad.onnx", "uneven.onnx")]
    models[0].write_bytes(model())
    models[1].write_bytes(model(segments=5))
    models[2].write_bytes(model(frame=FRAME + 1))
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "prune" / "plugin_child.py"), *map(str, models)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    told, last = done.stdout.splitlines()[-2:]
    assert last == "0 creators left", "the registry, which outlives Python, points to none of its objects"
    report: dict[str, Any] = json.loads(told)
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return child(tmp_path_factory.mktemp("first"))


PLUGINS = ["LayerType.PLUGIN_V3"] * 2


@needs_tensorrt
def test_a_node_is_the_plugin_where_registered_and_its_body_elsewhere(report: dict[str, Any]) -> None:
    for when in ("without", "at the end"):
        assert report[f"layers {when}"]
        assert "LayerType.PLUGIN_V3" not in report[f"layers {when}"]
    assert report["layers with"] == report["layers once more"] == PLUGINS
    assert report["layers with uneven segments"] == PLUGINS
    assert report["engine of uneven segments"][0] > 0
    assert report["error of uneven segments"] is None
    assert report["creators"] == 4
    assert report["creators at the end"] == 0


@needs_tensorrt
@pytest.mark.long
def test_engines_build_without_a_gpu_and_alike_in_two_processes(
    report: dict[str, Any], tmp_path: Path
) -> None:
    engines = report["engines"]
    assert engines["89"][1] != engines["120"][1]
    assert child(tmp_path)["engines"] == engines
    assert report["error of a good model"] is None


@needs_tensorrt
def test_the_parser_gives_attributes_of_64_bits_too(report: dict[str, Any]) -> None:
    """What quick plugins have: their `int` is INT64. The parser is the same in both flavours."""
    assert report["layers once more"] == PLUGINS
    assert report["error once more"] is None


@needs_tensorrt
def test_nodes_of_other_attributes_are_timed_apart(report: dict[str, Any]) -> None:
    two, three, again = report["timing ids"]
    assert two == again == "DynamicPruneFollow(segment_tokens=2)"
    assert three == "DynamicPruneFollow(segment_tokens=3)"


@needs_tensorrt
def test_what_a_callback_raises_is_not_lost(report: dict[str, Any]) -> None:
    assert report["layers of a bad model"] is None
    assert report["error of a bad model"].startswith("ValueError: no segments of equal size")
    assert report["the same error again"] is None
    for error in report["run without kernels"]:
        assert error.startswith("RuntimeError: DynamicPrune has no kernels for bfloat16 keys of width 16")


@needs_tensorrt
def test_kernels_of_the_other_kind_are_not_launched(report: dict[str, Any]) -> None:
    for error in report["run with kernels of the other kind"]:
        assert "UnevenPruneFollow has no kernels for bfloat16 keys of width 16" in error


@needs_tensorrt
def test_running_launches_the_kernels_on_tensorrts_pointers(report: dict[str, Any]) -> None:
    assert [name for name, *_ in report["calls"]] == ["score", "collect", "collect"]
    assert [pointers for _, pointers, *_ in report["calls"]] == [
        [1, 3, 8, 7],
        [1, 2, 3, 4, 7, 5, 6],
        [1, 2, 3, 4, 5, 6, 7],
    ]
    for _, _, sizes, stream in report["calls"]:
        assert sizes["transition_tokens"] == 0
        assert (sizes["heads"], sizes["new_tokens"], stream) == (HEADS, NEW, 9)
