"""The TensorRT backend on a GPU and engines that are stood in: the numbers, and what leads to them."""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from forcingkv.export import export_bundle
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Chunk, Session
from forcingkv.runtime.backends import Lane, LaneOptions
from forcingkv.runtime.backends import onnxruntime as onnx_backend
from forcingkv.runtime.backends import tensorrt_engines as engines_module
from forcingkv.runtime.backends.tensorrt import open_lane
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.engines import device_sm
from forcingkv.runtime.flavour import FLAVOURS, Flavour, require
from forcingkv.runtime.kv.policies import load_policy
from tests.runtime.engine_world import World
from tests.runtime.fake_streams import FakeCudaError
from tests.runtime.lane_driver import Driver
from tests.runtime.lanes import Ahead
from tests.runtime.videos import OTHER, PROMPT, assert_same, open_with, python, video_of

Bundles = Callable[[str], Path]
CHUNKS = 5
"""All three phases, and the last of them on both sides of the cache."""


@pytest.fixture
def world(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


@pytest.fixture
def lane(world: World) -> Iterator[Lane]:
    lane = world.lane()
    yield lane
    lane.close()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_lane_computes_what_onnx_runtime_does(world: World, cuda_graphs: bool) -> None:
    opened = Bundle.open(world.bundle.path)
    reference = onnx_backend.open_lane(opened, LaneOptions(threads=1))
    lane = world.lane(cuda_graphs=cuda_graphs)
    drivers = [Driver(reference, opened), Driver(lane, world.bundle)]
    for _ in range(2):  # two videos: in the second every pass comes again
        for driver in drivers:
            driver.start()
        for number in range(CHUNKS):
            expected, found = (driver.chunk(number) for driver in drivers)
            np.testing.assert_array_equal(found.latents, expected.latents)
            np.testing.assert_array_equal(found.frames, expected.frames)
            assert found.cache.keys() == expected.cache.keys()
            for name, array in expected.cache.items():
                np.testing.assert_array_equal(found.cache[name], array, err_msg=name)
    del driver, drivers
    lane.close()
    assert world.left == {}
    launched = world.cuda.calls.count("Graph.launch")
    assert (launched > 0) == cuda_graphs


def test_each_phase_runs_in_its_context_and_each_graph_in_its_stream(world: World) -> None:
    lane = world.lane()
    driver = Driver(lane, world.bundle)
    driver.start()
    for number in range(CHUNKS):
        driver.chunk(number)
    phases = [phase for graph, phase, _, _ in world.tensorrt.executed if graph == "step"]
    passes = 1 + len(world.bundle.plan.spec.schedule.later)
    chunks = [world.bundle.plan.phases.index(world.bundle.plan.phase(number)) for number in range(CHUNKS)]
    assert phases == [phase for phase in chunks for _ in range(passes)]
    assert set(phases) == {0, 1, 2}
    streams = {graph: {s for g, _, s, _ in world.tensorrt.executed if g == graph} for graph in GRAPHS}
    assert streams["prompt"] == streams["step"]
    assert streams["step"].isdisjoint(streams["decode"])
    assert len(world.tensorrt.users) == 2, "one block of activation memory for each stream"
    changed, last = 0, dict[tuple[str, int], dict[str, int]]()
    for graph, phase, _, addresses in world.tensorrt.executed:
        before = last.get((graph, phase), {})
        changed += sum(before.get(name) != address for name, address in addresses.items())
        last[graph, phase] = addresses
    assert world.cuda.calls.count("IExecutionContext.set_tensor_address") == changed, "those that are others"
    contexts = len(world.bundle.plan.phases) + 2
    assert world.cuda.calls.count("IExecutionContext.set_optimization_profile_async") == contexts
    lane.close()


def test_a_pass_is_captured_when_it_comes_again_and_replayed_after(world: World) -> None:
    lane = world.lane(cuda_graphs=True)
    latents = lane.tensor((1, 3, 3, 8, 12), "float32")
    frames = lane.tensor((3, 8, 12, 3), "uint8")
    decode = lane.bind("decode", 0, {"latents": latents}, {"frames": frames})
    shown = []
    for value in (-1.0, 0.0, 1.0, 0.5):
        latents.write(np.full(latents.shape, value, np.float32), lane.side)
        decode.run()
        shown.append(frames.fetch(lane.side))
    assert [int(fetch.array().mean()) for fetch in shown] == [0, 128, 255, 191]
    done = [entry[0] for entry in world.cuda.trace if entry[0] != "copy"]
    assert done == ["execute", "execute", "launch", "launch", "launch"], "plain, captured, then as a whole"
    assert world.cuda.calls.count("Stream.create_graph_builder") == 1
    lane.close()
    assert world.left == {}


@pytest.mark.parametrize("name", ["forcing-kv", "taehv"])
def test_sessions_on_engines_make_the_videos_of_those_on_onnx_runtime(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    world = World(bundles(name), monkeypatch)
    reference, _ = open_with(bundles(name), Ahead)  # as early with its chunks as a lane on a GPU
    with reference as session:
        expected = video_of(session)
        switched = switch_and_save(session, tmp_path / "onnxruntime")
    for cuda_graphs in (False, True):
        world.reset()
        with Session.open(
            world.bundle, backend="tensorrt-rtx", preflight=False, cuda_graphs=cuda_graphs
        ) as session:
            with session.sibling(preflight=False) as sibling:
                assert world.cuda.live["engine"] == 3, "siblings share the weights"
                assert_same(video_of(session), expected)
                assert_same(video_of(sibling), expected)
            assert_same(switch_and_save(session, tmp_path / "engines"), switched)
            # The same bundle and numbers: a state goes from one backend to the other.
            assert_same(session.restore(tmp_path / "onnxruntime"), switched[-2:])
        assert world.left == {}


def switch_and_save(session: Session, folder: Path) -> list[Chunk]:
    """A video that follows another prompt from its fourth chunk, is saved before its sixth, and goes on."""
    video = session.generate(PROMPT, seed=7, chunks=7)
    chunks = [next(video) for _ in range(3)]
    video.switch(OTHER)
    chunks += [next(video) for _ in range(2)]
    video.save(folder)
    return [*chunks, *session.restore(folder)]


def test_another_thread_may_use_a_lane(world: World) -> None:
    lane, found = world.lane(), list[Any]()

    def work() -> None:
        driver = Driver(lane, world.bundle)
        driver.start()
        found.append(driver.chunk(0).frames)
        lane.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].shape == (3, 8, 12, 3)
    assert world.left == {}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_views_that_tensorrt_would_not_take_go_through_scratch_memory(
    world: World, cuda_graphs: bool
) -> None:
    lane = world.lane(cuda_graphs=cuda_graphs)
    latents = lane.tensor((2, 3, 3, 8, 12), "float32")
    frames = lane.tensor((9, 8, 12, 3), "uint8")
    inputs, outputs = {"latents": latents.rows(1, 2)}, {"frames": frames.rows(3, 6)}
    assert cast(Any, inputs["latents"]).address % 256 != 0
    assert cast(Any, outputs["frames"]).address % 256 != 0
    decode = lane.bind("decode", 0, inputs, outputs)
    for value, shown in ((1, 255), (-1, 0), (0, 128)):
        frames.write(np.full(frames.shape, 7, np.uint8), lane.side)
        values = np.stack([np.full(latents.shape[1:], v, np.float32) for v in (0.5, value)])
        latents.write(values, lane.side)
        decode.run()
        found = frames.fetch(lane.side).array()
        assert [int(frame.mean()) for frame in found] == [7] * 3 + [shown] * 3 + [7] * 3


def test_outputs_that_nobody_takes_go_to_one_buffer_each(world: World) -> None:
    """Large enough for every phase: the fakes refuse memory that is too small, or that is used twice."""
    lane, plan, record = world.lane(), world.bundle.plan, world.bundle.manifest.graphs["step"]
    varied = {name for phase in plan.phases for name in plan.phase_shapes(phase)}
    inputs = {n: lane.tensor(r.shape, r.dtype) for n, r in record.inputs.items() if n not in varied}
    out = lane.tensor(record.outputs["next_latents"].shape, "float32")
    for place in (1, 2, 0):
        shapes = plan.phase_shapes(plan.phases[place])
        held = {n: lane.tensor(shape, record.inputs[n].dtype) for n, shape in shapes.items()}
        for tensor in (*inputs.values(), *held.values()):
            tensor.clear(lane.main)
        before = world.cuda.live["device"]
        bound = lane.bind("step", place, inputs | held, {"next_latents": out})
        bound.run()
        assert np.isfinite(out.fetch(lane.main).array()).all()
        made = world.cuda.live["device"] - before
        assert made == (len(record.outputs) - 1 if place == 1 else 0)


def test_what_does_not_fit_a_graph_is_refused(lane: Lane) -> None:
    latents, frames = lane.tensor((1, 3, 3, 8, 12), "float32"), lane.tensor((3, 8, 12, 3), "uint8")
    good = {"latents": latents}
    lane.bind("decode", 0, good, {})
    for inputs, outputs in (
        ({}, {"frames": frames}),
        ({**good, "more": latents}, {"frames": frames}),
        (good, {"pixels": frames}),
    ):
        with pytest.raises(ValueError, match=r"decode takes \['latents'\] and gives \['frames'\]; "):
            lane.bind("decode", 0, inputs, outputs)
    for wrong in (lane.tensor((3, 8, 12, 3), "int32"), lane.tensor((3, 8, 12, 4), "uint8")):
        with pytest.raises(ValueError, match=r"frames of decode in phase 0 is uint8 \(3, 8, 12, 3\)"):
            lane.bind("decode", 0, good, {"frames": wrong})


LOAD_KERNELS = engines_module.load_kernels
"""Before a test puts a fake in its place."""


def test_a_bundle_without_engines_or_a_machine_without_a_gpu_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_module, "load_kernels", LOAD_KERNELS)
    bare = Bundle(world.bundle.path, replace(world.bundle.manifest, engines=()), world.bundle.headmap)
    with pytest.raises(InputError, match="has no engine of the graph prompt"):
        open_lane(bare, LaneOptions("tensorrt-rtx"))
    said = "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"

    def no_device(number: int) -> None:
        raise FakeCudaError(said)

    world.cuda.Device = no_device  # type: ignore[assignment]
    with pytest.raises(InputError, match=rf"no GPU was found \({said}\).* --target onnx.*--gpus all"):
        open_lane(world.bundle, LaneOptions("tensorrt-rtx"))


def test_without_cuda_core_the_extra_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingExtraError, match="needs cuda-core"):
        world.lane()


def test_importing_the_backend_loads_neither_tensorrt_nor_cuda() -> None:
    code = (
        "import sys, forcingkv.runtime.backends.tensorrt;"
        "print([m for m in sys.modules if m.startswith(('tensorrt', 'cuda'))])"
    )
    assert python(code).strip() == "[]"


def flavours_here() -> list[Flavour]:
    """Those that are installed and serve this machine's GPU."""
    sm, found = device_sm(), list[Flavour]()
    for name, flavour in FLAVOURS.items():
        with suppress(MissingExtraError):
            if require(name) and sm is not None and (not flavour.sms or sm in flavour.sms):
                found.append(flavour)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not flavours_here(), reason="needs a GPU, and a TensorRT that serves it")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_gpu_makes_the_video_that_onnx_runtime_does(tmp_path: Path, cuda_graphs: bool) -> None:
    """bfloat16 against float32: the latents of the first chunk are near each other, and the same twice."""
    flavour, spec = flavours_here()[0], load_spec("demo")
    headmap = read_headmap(Path(__file__).parents[2] / "headmaps" / "maps" / "demo.json")
    weights, policy = load_weights(spec), load_policy("forcing-kv")
    sms = (device_sm(),) if flavour.sms else ()
    export_bundle(spec, weights, policy, tmp_path / "onnx", headmap=headmap)
    export_bundle(spec, weights, policy, tmp_path / "engines", headmap=headmap, target=flavour.name, sms=sms)
    prompt = "a 3 moving left and a 7 moving up"
    with Session.open(tmp_path / "onnx") as session:
        expected = next(session.generate(prompt, seed=1, chunks=1))
    # Should TensorRT wait for a thread that wants Python's lock, the stacks say where (docs/decisions/0034).
    faulthandler.dump_traceback_later(120)
    try:
        with Session.open(tmp_path / "engines", backend=flavour.name, cuda_graphs=cuda_graphs) as session:
            videos = [list(session.generate(prompt, seed=1, chunks=CHUNKS)) for _ in range(2)]
            with session.sibling() as sibling, ThreadPoolExecutor(2) as pool:
                both = [
                    pool.submit(list, s.generate(prompt, seed=1, chunks=CHUNKS)) for s in (session, sibling)
                ]
                videos += [future.result() for future in both]
    finally:
        faulthandler.cancel_dump_traceback_later()
    difference = videos[0][0].latents - expected.latents
    assert np.sqrt((difference**2).mean()) < 0.1 * np.sqrt((expected.latents**2).mean())
    for first, *others in zip(*videos, strict=True):
        for other in others:
            np.testing.assert_array_equal(first.frames, other.frames)
