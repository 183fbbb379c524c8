"""Before memory is taken: a bundle that does not fit is refused, with what would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, preflight, session
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.bundle import GRAPHS
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.footprint import DEVICE_RESERVE, kv_parts
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.preflight import Fit, bytes_of_other, check_memory, needed_memory, what_fits
from tests.runtime.lanes import ONNX, On
from tests.runtime.videos import PROMPT

Bundles = Callable[[str], Path]
RESOLUTIONS = {"tiny": (4, 4), "wide": (24, 16), "low": (12, 4), "own": (12, 8)}


@pytest.fixture
def bundle(on: On, bundles: Bundles) -> Bundle:
    """The full policy at 12x8, of a model with resolutions above and below."""
    return with_resolutions(on, bundles)


def with_resolutions(on: On, bundles: Bundles) -> Bundle:
    opened = on.of(Bundle.open(bundles("full")))
    model = replace(opened.manifest.model, resolutions=RESOLUTIONS)
    return Bundle(opened.path, replace(opened.manifest, model=model), opened.headmap)


def have(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: size)


def fits_instead(bundle: Bundle, parts: dict[str, int], available: int) -> list[Fit]:
    return what_fits(bundle.plan, available, lambda *other: bytes_of_other(bundle, parts, *other))


def test_what_is_enough_is_enough(
    on: On, bundles: Bundles, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(needed_memory(bundle, on.options).values())
    have(monkeypatch, needed)
    check_memory(bundle, on.options)
    with on.open(bundles("full")) as opened:
        assert next(opened.generate(PROMPT, seed=1)).index == 0
    have(monkeypatch, needed - 1)
    with pytest.raises(InputError):
        check_memory(bundle, on.options)


def test_a_refusal_says_what_is_needed_and_what_fits(
    on: On, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = needed_memory(bundle, on.options)
    have(monkeypatch, sum(parts.values()) - 1)
    with pytest.raises(InputError) as raised:
        check_memory(bundle, on.options)
    told = str(raised.value)
    assert "a session of full at 12x8 needs" in told
    assert "are available" in told
    for name, size in parts.items():
        assert (f"{name} " in told) == bool(size)
    assert "deep-forcing at own (" in told.partition("What fits: ")[2]
    assert told.count(" at own (") == 3, "no more than three, the nearest first"
    assert raised.value.where == str(bundle.path)


def test_nothing_is_loaded_before_it_fits(on: On, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(session, "open_backend", lambda *given, **_: opened.append(given))
    have(monkeypatch, 1000)
    with pytest.raises(InputError, match=r"1\.00 kB are available\. No policy or resolution"):
        on.open(bundles("full"))
    assert opened == []


def test_the_check_can_be_left_out(on: On, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 0)
    with on.open(bundles("full"), preflight=False) as opened:
        with pytest.raises(InputError, match="a session of full"):
            opened.sibling()
        with opened.sibling(preflight=False) as sibling:
            assert next(sibling.generate(PROMPT, seed=1)).index == 0


def test_a_sibling_needs_no_weights(on: On, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"weights": 10**12, "frames": 100}
    monkeypatch.setattr(preflight, "needed_memory", lambda *_: dict(parts))
    have(monkeypatch, 100)
    check_memory(bundle, on.options, weights=False)
    with pytest.raises(InputError, match="weights 1000 GB, frames 100 B"):
        check_memory(bundle, on.options)


@pytest.mark.parametrize("share", [0.95, 0.6, 0.4, 0.2, 0.1])
def test_what_is_suggested_fits_and_the_nearest_comes_first(on: On, bundle: Bundle, share: float) -> None:
    parts = needed_memory(bundle, on.options)
    available = int(sum(parts.values()) * share)
    fits = fits_instead(bundle, parts, available)
    spec = bundle.plan.spec
    tokens = [spec.geometry(fit.resolution).frame_tokens for fit in fits]
    assert tokens == sorted(tokens, reverse=True), "the resolution stays as near as it can"
    assert all(count <= bundle.plan.frame_tokens for count in tokens), "none is larger"
    assert len({(fit.policy, fit.resolution) for fit in fits}) == len(fits)
    for fit in fits:
        assert fit.bytes <= available
        policy = load_policy(fit.policy)
        if not policy.needs_headmap:
            plan = build_plan(spec, spec.geometry(fit.resolution), policy)
            assert sum(kv_parts(plan, "float32", joined=on.name == "torch").values()) < fit.bytes
    assert "full" not in {fit.policy for fit in fits if fit.resolution == "own"}


def test_the_bundles_own_head_map_is_counted_with(on: On, bundles: Bundles) -> None:
    """Its own policy is suggested with the map it has; the others with the one that takes most."""
    opened = on.of(Bundle.open(bundles("forcing-kv")))
    parts = needed_memory(opened, on.options)
    fits = {fit.policy: fit.bytes for fit in fits_instead(opened, parts, 10**12)}
    assert fits["forcing-kv"] == sum(parts.values())
    without = Bundle(opened.path, opened.manifest, None)
    without.__dict__["plan"] = opened.plan
    largest = {fit.policy: fit.bytes for fit in fits_instead(without, parts, 10**12)}
    assert largest["forcing-kv"] > fits["forcing-kv"]


def engine(graph: str, sm: int) -> EngineRecord:
    return EngineRecord(
        graph=graph,
        flavour="tensorrt-rtx",
        version="1.7.1",
        sm=sm,
        file=f"{graph}.engine",
        layers=9,
        plugin_layers=0,
        needs_plugin=False,
        phases=1,
        weight_bytes=2_000_000,
        activation_bytes=700_000,
        scratch_bytes=1,
        seconds=1.0,
        peak_bytes=1,
    )


def test_engines_are_counted_against_the_gpus_memory(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_resolutions(ONNX, bundles)
    engines = tuple(engine(graph, sm) for sm in (89, 120) for graph in GRAPHS)
    built = Bundle(bundle.path, replace(bundle.manifest, engines=engines), None)
    monkeypatch.setattr(preflight, "choose", lambda flavour: None)
    monkeypatch.setattr(preflight, "trt", SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setattr(preflight, "device_sm", lambda number: {0: 89, 1: 120}[number])
    monkeypatch.setattr(
        preflight, "device_free_bytes", lambda number: {0: 6_000_000, 1: 5_000_000 + DEVICE_RESERVE}[number]
    )
    have(monkeypatch, 10**15)
    with pytest.raises(
        InputError,
        match=r"weights 6\.00 MB, activations 1\.40 MB.* cuda 700 MB\).* 6\.00 MB are .* on the GPU cuda:0",
    ):
        check_memory(built, LaneOptions("tensorrt-rtx"))
    check_memory(built, LaneOptions("tensorrt-rtx"), weights=False)  # nor what CUDA takes once
    with pytest.raises(InputError, match=r" 705 MB are available on the GPU cuda:1"):
        check_memory(built, LaneOptions("tensorrt-rtx", device="cuda:1"))
    needed = needed_memory(built, LaneOptions("tensorrt-rtx"))
    assert needed["cuda"] == DEVICE_RESERVE == 700_000_000
    assert "cuda" not in needed_memory(built, LaneOptions("onnxruntime"))
    monkeypatch.setattr(preflight, "device_free_bytes", lambda number: sum(needed.values()))
    check_memory(built, LaneOptions("tensorrt-rtx"))
    monkeypatch.setattr(preflight, "device_free_bytes", lambda number: sum(needed.values()) - 1)
    with pytest.raises(InputError, match="needs about"):
        check_memory(built, LaneOptions("tensorrt-rtx"))
    monkeypatch.setattr(preflight, "device_sm", lambda number: 75)
    with pytest.raises(InputError, match="sm_75"):
        check_memory(built, LaneOptions("tensorrt-rtx"))
