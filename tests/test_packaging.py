"""What an install has: every package with its folder, and complete in each way of installing it.

The folders stand at the root and are linked into src/forcingkv for type checkers. An install must not need
the links: a ZIP archive and a checkout on Windows have small text files in their place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forcingkv"
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
PATTERNS: list[str] = SETTINGS["package-data"]["*"]
PAPERS = {".md", ".png", ".csv"}
"""Files for readers of the repository, which no install needs."""

FOUND = """
import functools, json, sys
from pathlib import Path

@functools.cache
def spec(name):  # as importlib finds it, without running the packages above
    above = name.rpartition(".")[0]
    path = spec(above).submodule_search_locations if above else None
    return next(found for finder in sys.meta_path if (found := finder.find_spec(name, path)))

modules, data = json.loads(sys.stdin.read())
found = [spec(name).origin for name in modules]
found += [str(Path(spec(package).origin).parent / file) for package, file in data]
print(json.dumps([str(Path(path).resolve()) for path in found if Path(path).is_file()]))
"""


def folders() -> dict[str, Path]:
    """The package and its parts that stand at the root, by import name."""
    linked = [link for link in sorted(SOURCE.iterdir()) if link.is_symlink()]
    return {"forcingkv": SOURCE} | {f"forcingkv.{link.name}": ROOT / link.name for link in linked}


def packages() -> dict[str, Path]:
    """Every package there is, by import name."""
    found = {}
    for name, folder in folders().items():
        for init in folder.rglob("__init__.py"):
            inside = init.parent.relative_to(folder)
            if inside.parts[:1] not in {(link.rpartition(".")[2],) for link in folders()}:
                found[".".join([name, *inside.parts])] = init.parent
    return found


def package_files() -> set[str]:
    """What an install should hold, relative to `forcingkv/`: modules, and files that match the patterns."""
    found = set()
    for name, folder in packages().items():
        place = Path(*name.split(".")[1:])
        found |= {str(place / file.name) for file in folder.glob("*.py")}
        for pattern in PATTERNS:
            found |= {str(place / file.relative_to(folder)) for file in folder.glob(pattern)}
    return found


def test_every_folder_at_the_root_with_code_of_the_package_is_linked() -> None:
    """Folders that are no package: they are run from the root, and not installed."""
    others = {"tests", "benchmarks", "studies", "examples", "tools", "src", "docs", "build", "dist"}
    packaged = {init.parent.name for init in ROOT.glob("*/__init__.py")} - others
    assert {name.rpartition(".")[2] for name in folders()} - {"forcingkv"} == packaged


def test_pyproject_names_every_package_and_its_folder() -> None:
    wanted = sorted(packages())
    assert SETTINGS["packages"] == wanted, "packages = " + json.dumps(wanted, indent=4)
    places = {name: str(folder.relative_to(ROOT)) for name, folder in folders().items()}
    assert SETTINGS["package-dir"] == places


def test_every_file_of_a_package_is_installed() -> None:
    left_out = []
    for folder in folders().values():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if not path.is_file() or "__pycache__" in inside.parts or path.suffix in {".py", *PAPERS}:
                continue
            ways = {str(inside.relative_to(above)) for above in inside.parents}
            if not any(fnmatch(way, pattern) for way in ways for pattern in PATTERNS):
                left_out.append(str(path.relative_to(ROOT)))
    assert left_out == [], "give package-data a pattern for them"


def run(*words: object, cwd: Path | None = None, given: str = "") -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=clean, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


PIP = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")


def copy(folder: Path, links: bool) -> Path:
    """The files of the working tree as in a checkout; without links there are files in their place."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and links:
            target.symlink_to(os.readlink(source))
        elif source.is_symlink():
            target.write_text(os.readlink(source), encoding="utf-8")
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    return folder


def wheel(tree: Path, out: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", *PIP, "--wheel-dir", out, tree)
    return next(out.glob("*.whl"))


def sdist(tree: Path, out: Path) -> Path:
    out.mkdir()
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    return next(out.glob("*.tar.gz"))


def held(wheel: Path) -> set[str]:
    """The files of a wheel below `forcingkv/`."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name.removeprefix("forcingkv/") for name in archive.namelist() if name.startswith("forcingkv/")
        }


WAYS: dict[str, Callable[[Path], Path]] = {
    "wheel of a clone": lambda tmp: wheel(copy(tmp / "tree", links=True), tmp / "out"),
    "wheel of a tree without links": lambda tmp: wheel(copy(tmp / "tree", links=False), tmp / "out"),
    "wheel of an sdist": lambda tmp: wheel(sdist(copy(tmp / "tree", links=True), tmp / "sdist"), tmp / "out"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if "sdist" in way else pytest.mark.long) for way in WAYS]
)
def test_an_install_is_complete(way: str, tmp_path: Path) -> None:
    assert held(WAYS[way](tmp_path)) == package_files()


@pytest.mark.slow
@pytest.mark.parametrize(
    "links",
    [pytest.param(True, id="with links", marks=pytest.mark.long), pytest.param(False, id="without links")],
)
def test_an_editable_install_finds_every_module_and_file(links: bool, tmp_path: Path) -> None:
    tree = copy(tmp_path / "tree", links)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # The packages of this interpreter, setuptools and pip among them, but not what .pth files there add.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(python, "-m", "pip", "install", *PIP, "--ignore-installed", "--editable", tree)
    modules, data = [], []
    for file in sorted(package_files()):
        place = Path("forcingkv", file)
        if place.suffix == ".py":
            modules.append(".".join(place.with_suffix("").parts).removesuffix(".__init__"))
        else:
            package = next(above for above in place.parents if ".".join(above.parts) in packages())
            data.append((".".join(package.parts), str(place.relative_to(package))))
    found = json.loads(run(python, "-c", FOUND, given=json.dumps([modules, data])))
    assert len(found) == len(package_files())
    assert [path for path in found if tree.resolve() not in Path(path).parents] == []
