"""What many tests share: the folder of real data, and small models with random weights."""

from __future__ import annotations

import atexit
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule, TextEncoder

if TYPE_CHECKING:  # the process that starts the workers loads this file too, and waits for no torch
    from forcingkv.models.wan import WanModel

DATA = Path(__file__).parents[2] / "shared" / "data"

if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker of its own
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # in processes that tests start
    tracer = logging.getLogger("torch.__trace")  # told about every node of a graph, which pytest would record
    tracer.handlers.clear()
    tracer.propagate = True
gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the million, few of them garbage
settings.register_profile("any machine", deadline=None)  # of a busy one, 200 ms are not the product's fault
settings.load_profile("any machine")


LONG = {
    *("test_demo_command.py", "test_readme.py", "test_runtime_guide.py", "test_workers.py"),
    *(
        "test_activations.py",
        "test_bake.py",
        "test_decode_strips.py",
        "test_cubins.py",
        "test_engine_builds.py",
        "test_fp8_bundles.py",
    ),
    *("test_ablation_driver.py", "test_model_commands.py", "test_sizes.py", "test_triton_kernels.py"),
    *("test_any_machine.py", "test_campaign.py", "test_recache_graph.py"),
}
"""Files with a test of seven seconds or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, or one worker would still be at it while the others are done."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    _look_no_more()
    atexit.register(gc.unfreeze)  # or nanobind says that what is left over at the end leaks


@pytest.fixture(scope="module", autouse=True)
def _what_a_module_imports_stays() -> Iterator[None]:
    yield
    _look_no_more()


def _look_no_more() -> None:
    """Collecting garbage takes half a second each time, if all that was imported is looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real head maps, videos and golden outputs, which is not in the repository."""
    if not DATA.is_dir():
        pytest.skip(f"nothing is compared with public implementations and videos: there is no folder {DATA}")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def _torch_keeps_its_tables() -> Iterator[None]:
    from tests.kept_traces import traces_are_kept
    from tests.quick_tracing import tables_are_kept

    with tables_are_kept(), traces_are_kept():
        yield


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """No graph of the test is one that was traced for another."""
    from tests.kept_traces import traced_anew

    with traced_anew():
        yield


@pytest.fixture(scope="session", autouse=True)
def _graphs_have_one_thread() -> Iterator[None]:
    """Unless a test chooses: more threads would wait on the other worker's core."""
    import onnxruntime as ort

    class OneThread(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(ort, "SessionOptions", OneThread)
        yield


WHITE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de00"
    "00000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
"""A PNG of one white pixel."""


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Pictures of a report stay white: drawing them takes most of the seconds that an analysis takes."""
    from matplotlib.figure import Figure

    from forcingkv.analyze.report import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_png", lambda *_: (WHITE, []))
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield


@pytest.fixture(scope="module")
def white_pictures() -> Iterator[None]:
    """`nothing_drawn`, for a module that does not look at pictures."""
    with nothing_drawn():
        yield


def small_spec(**changes: object) -> ModelSpec:
    """A spec small enough to run in milliseconds; every size differs from every other."""
    values: dict[str, object] = {
        "name": "small",
        "layers": 4,
        "heads": 3,
        "head_dim": 12,
        "ffn_width": 40,
        "latent_channels": 3,
        "patch": 2,
        "text_width": 10,
        "text_length": 5,
        "time_width": 16,
        "frames_per_chunk": 3,
        "attended_frames": 15,
        "ar_start": 1,
        "fps": 16.0,
        "width": 12,
        "height": 8,
        "schedule": Schedule((1000.0, 625.0)),
        "decoder": Decoder("pixels"),
        "text": TextEncoder("words", ("a", "b", "c", "d", "e")),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def random_model(spec: ModelSpec, seed: int = 0) -> WanModel:
    """Random weights large enough that every part of the model shows in its output."""
    import torch

    from forcingkv.models.wan import WanModel

    torch.manual_seed(seed)
    model = WanModel(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def headmap_of(spec: ModelSpec, static: list[list[int]]) -> HeadMap:
    """A map with those heads static in each layer and the others dynamic."""
    labels = tuple(
        tuple("static" if head in row else "dynamic" for head in range(spec.heads)) for row in static
    )
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), labels, Rule("given"))


def mixed_map(spec: ModelSpec) -> HeadMap:
    """Half of each layer's heads static."""
    return headmap_of(spec, [list(range(spec.heads // 2))] * spec.layers)


def roles(sink: int | None, recent: int | None, retained: Retained | None = None) -> tuple[Role, ...]:
    """The roles of a group, in the order of the shipped policies; 0 frames: not that role."""
    held: list[Role | None] = [
        None if sink == 0 else Sink(sink),
        retained,
        None if recent == 0 else Recent(recent),
    ]
    return tuple(role for role in held if role)


def retained_in(policy: Policy) -> Retained:
    """The role of retained segments in a policy that has one."""
    return next(role for roles in policy.groups.values() for role in roles if isinstance(role, Retained))


def choosing(policy: Policy, **changes: Any) -> Policy:
    """A policy with other parameters of its retained segments."""
    groups = {
        label: tuple(replace(role, **changes) if isinstance(role, Retained) else role for role in roles)
        for label, roles in policy.groups.items()
    }
    return replace(policy, groups=groups)


class Ran:
    """What a command did: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="session")
def _one_tree_of_commands() -> Iterator[None]:
    """typer makes the tree of commands anew for each that is run."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def run(
    _one_tree_of_commands: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Runs the command line with those words."""
    from forcingkv import __main__ as command_line

    def call(*words: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["forcingkv", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return call
