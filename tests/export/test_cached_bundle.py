"""Bundles in the cache: found by what they are made of, whole or made anew, and by one process at a time."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from forcingkv.export import cached_bundle as module
from forcingkv.export.cached_bundle import (
    CachedBundle,
    Recipe,
    cached_bundle,
    check_memory_to_run,
    origin_of,
    sizes_in_cache,
)
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import lock_of
from forcingkv.models.checkpoint import Weights, random_weights
from forcingkv.runtime import Session
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import headmap_of, small_spec

SPEC = small_spec(layers=2)
MAP = headmap_of(SPEC, [[0], [1]])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of bundles in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "forcingkv" / "bundles"


def recipe(spec: ModelSpec = SPEC, **changes: Any) -> Recipe:
    plan = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), MAP)
    return replace(Recipe(plan, MAP, None, "float32"), **changes)


def made(**options: Any) -> CachedBundle:
    return cached_bundle(recipe(), random_weights(SPEC), **options)


def test_it_is_baked_once_and_found_again(place: Path) -> None:
    first = made()
    assert first.baking is not None
    assert [first.bundle.path] == list(place.iterdir())
    assert first.bundle.path.name == f"small-{first.bundle.manifest.origin[:16]}"  # type: ignore[index]
    assert not first.bundle.manifest.has_graphs
    again = made()
    assert again.baking is None
    assert again.bundle.digest == first.bundle.digest
    files = list(first.bundle.path.iterdir())
    assert sizes_in_cache() == {first.bundle.path.name: sum(file.stat().st_size for file in files)}
    with Session.open(again.bundle) as session:
        (chunk,) = session.generate("a b", seed=3, chunks=1)
        assert chunk.frames.shape == (3, 8, 12, 3)
        stored = load_file(again.bundle.path / "weights.safetensors").values()
        assert session.footprint["weights"] == sum(array.nbytes for array in stored)


def other_map() -> Recipe:
    heads = headmap_of(SPEC, [[1], [1]])
    return recipe(plan=build_plan(SPEC, SPEC.geometry(), load_policy("forcing-kv"), heads), headmap=heads)


OTHERS: dict[str, Callable[[], tuple[Recipe, Weights]]] = {
    "seed": lambda: (recipe(), random_weights(SPEC, 1)),
    "dtype": lambda: (recipe(stored="bfloat16"), random_weights(SPEC)),
    "headmap": lambda: (other_map(), random_weights(SPEC)),
    "policy": lambda: (
        recipe(plan=build_plan(SPEC, SPEC.geometry(), load_policy("full")), headmap=None),
        random_weights(SPEC),
    ),
    "resolution": lambda: (
        recipe(plan=build_plan(SPEC, SPEC.geometry("24x8"), load_policy("forcing-kv"), MAP)),
        random_weights(SPEC),
    ),
    "crop": lambda: (
        recipe(plan=build_plan(SPEC, SPEC.geometry("22x8"), load_policy("forcing-kv"), MAP)),
        random_weights(SPEC),
    ),
    "schedule": lambda: (recipe(replace(SPEC, fps=8.0)), random_weights(SPEC)),
    "decoder": lambda: (recipe(decoder=torch.nn.Linear(2, 2)), random_weights(SPEC)),
    "decoder's values": lambda: (recipe(decoder=torch.nn.Linear(2, 2)), random_weights(SPEC)),
    "file": lambda: (recipe(), of_file("aa")),
    "other file": lambda: (recipe(), of_file("bb")),
    "entry of the file": lambda: (recipe(), of_file("aa", taken=["x.pt: the entry generator"])),
}


def of_file(digest: str, taken: list[str] | None = None) -> Weights:
    drawn = random_weights(SPEC)
    return Weights(drawn.shapes, drawn.__getitem__, lambda: digest, taken=taken or ())


def test_whatever_decides_a_bundle_decides_its_name() -> None:
    torch.manual_seed(0)
    origins = {name: origin_of(*make()) for name, make in OTHERS.items()}
    origins["itself"] = origin_of(recipe(), random_weights(SPEC))
    assert len(set(origins.values())) == len(origins), origins
    assert origin_of(recipe(), random_weights(SPEC)) == origins["itself"]


def test_other_code_or_another_torch_bakes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = origin_of(recipe(), random_weights(SPEC))
    for name, value in {"_code": lambda: "other", "SCHEMA": "forcingkv.bundle/2"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert origin_of(recipe(), random_weights(SPEC)) != before
    monkeypatch.setattr(torch, "__version__", "9")
    assert origin_of(recipe(), random_weights(SPEC)) != before


def test_weights_that_nobody_can_name_are_refused() -> None:
    drawn = random_weights(SPEC)
    with pytest.raises(ValueError, match="neither a digest nor a seed"):
        origin_of(recipe(), Weights(drawn.shapes, drawn.__getitem__))


def cut(path: Path) -> None:
    weights = path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def swap_two_bytes(path: Path) -> None:
    weights = path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def cut_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def another_bundle(path: Path) -> None:
    """One that is whole, under the name of this one."""
    other = cached_bundle(recipe(), random_weights(SPEC, 7)).bundle.path
    shutil.rmtree(path)
    other.rename(path)


def somebody_s_files(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "diary.txt").write_text("dear")


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("dear")


def a_link(path: Path) -> None:
    """To a bundle that is not in the cache, which is nobody's to replace."""
    other = cached_bundle(recipe(), random_weights(SPEC, 7)).bundle.path
    mine = path.parents[2] / "mine"
    other.rename(mine)
    shutil.rmtree(path)
    path.symlink_to(mine)


@pytest.mark.parametrize(
    ("harm", "asides"),
    [
        (cut, 0),
        (swap_two_bytes, 0),
        (cut_manifest, 1),
        (another_bundle, 1),
        (somebody_s_files, 1),
        (a_file, 1),
        (a_link, 1),
    ],
)
def test_what_is_damaged_or_not_ours_is_baked_anew(
    harm: Callable[[Path], None], asides: int, place: Path
) -> None:
    first = made().bundle
    content = (first.path / "weights.safetensors").read_bytes()
    harm(first.path)
    before = {file: file.read_bytes() for file in place.parents[1].rglob("*") if file.is_file()}
    notes: list[str] = []
    again = made(note=notes.append)
    assert again.baking is not None
    assert notes[0].startswith(f"{first.path} is baked anew: ")
    assert (again.bundle.path, again.bundle.digest) == (first.path, first.digest)
    assert (first.path / "weights.safetensors").read_bytes() == content
    aside = [one for one in place.iterdir() if ".set-aside-" in one.name]
    assert len(aside) == asides
    assert (notes[1:] == [f"what was there is now {aside[0]}"]) if asides else not notes[1:]
    # Nothing of anybody's is lost: it is where it was, or aside.
    kept = [file.read_bytes() for file in place.parents[1].rglob("*") if file.is_file()]
    if asides:
        assert all(text in kept for text in before.values())
    assert made().baking is None


def test_of_two_at_once_one_bakes_and_the_other_waits_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bakes: list[int] = []
    real = module.export_bundle

    def slow(*args: Any, **options: Any) -> Any:
        bakes.append(1)
        time.sleep(0.3)  # the other has come to the lock by then
        return real(*args, **options)

    monkeypatch.setattr(module, "export_bundle", slow)
    found: list[CachedBundle] = []
    notes: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(made(note=notes.append))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bakes) == 1
    assert sorted(one.baking is None for one in found) == [False, True]
    assert len({one.bundle.digest for one in found}) == 1
    assert notes == [f"another process bakes {found[0].bundle.path}: waiting for it"]


def test_one_that_was_killed_leaves_a_lock_that_holds_nobody(place: Path) -> None:
    path = made().bundle.path
    shutil.rmtree(path)
    lock_of(place, f"{path.name}-baking").touch()
    assert made().baking is not None


def test_a_failed_bake_leaves_nothing_that_would_be_used(place: Path) -> None:
    drawn = random_weights(SPEC)

    def read(name: str) -> torch.Tensor:
        if name.startswith("blocks.1"):
            raise InputError("is cut short", where="model.pt")
        return drawn[name]

    weights = Weights(drawn.shapes, read, lambda: "aa")
    for _ in range(2):
        with pytest.raises(InputError, match=r"model\.pt is cut short"):
            cached_bundle(recipe(), weights)
        assert not [one for one in place.iterdir() if one.is_dir()]


def test_weights_that_change_while_they_are_read_are_refused(place: Path) -> None:
    drawn, digests = random_weights(SPEC), iter(["aa", "bb", "bb", "bb"])
    weights = Weights(drawn.shapes, drawn.__getitem__, lambda: next(digests))
    with pytest.raises(InputError, match="baking small: the files of the weights were changed while"):
        cached_bundle(recipe(), weights)
    assert not [one for one in place.iterdir() if one.is_dir()]
    assert cached_bundle(recipe(), weights).baking is not None


def test_a_full_disk_says_where_the_cache_may_lie_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        InputError, match=r"has 0\.0 GB free.* set XDG_CACHE_HOME to a folder on another disk"
    ):
        made()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        made()


def test_memory_is_counted_as_the_session_will_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sum, to the byte, before there is a bundle: one byte less is refused, and before baking."""
    with Session.open(made().bundle) as session:
        needed = sum(session.footprint.values())
    monkeypatch.setattr("forcingkv.runtime.preflight.available_bytes", lambda: needed)
    check_memory_to_run(recipe(), None)
    monkeypatch.setattr("forcingkv.runtime.preflight.available_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match="a session of forcing-kv at 12x8 needs about"):
        check_memory_to_run(recipe(), "cpu")
