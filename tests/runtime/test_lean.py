"""Who may import whom: the runtime stands alone, and nobody imports analyze."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from forcingkv.runtime.policies import load_policy
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import shared_bundle

ROOT = Path(__file__).parents[2]
BLOCKED = (
    "torch",
    "polars",
    "sklearn",
    "seaborn",
    "onnx",
    "onnxscript",
    "scipy",
    "safetensors",
    "diffusers",
    "transformers",
    "matplotlib",
    "typer",
    "rich",
    "av",
)

RUN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
from forcingkv.runtime import Session
with Session.open({bundle!r}) as session:
    shapes = [chunk.frames.shape for chunk in session.generate("a b c", seed=1, chunks=4)]
print(shapes)
"""


def test_the_runtime_runs_a_bundle_with_nothing_but_numpy_and_onnxruntime() -> None:
    spec = small_spec()
    headmap = headmap_of(spec, [[0], [1, 2], [], [0, 1, 2]])
    weights = random_model(spec).state_dict()
    bundle = shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap)
    code = RUN.format(blocked=set(BLOCKED), bundle=str(bundle))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(3, 8, 12, 3)] * 4)


MAY_IMPORT = {
    "headmaps": set(),
    "runtime": {"headmaps"},
    "models": {"headmaps", "runtime"},
    "analyze": {"headmaps", "runtime", "models"},
    "export": {"headmaps", "runtime", "models"},
    "measure": {"headmaps", "runtime", "models", "export"},
}


def imported(file: Path) -> set[str]:
    """Folders of forcingkv that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("forcingkv.")}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_whom_they_may(folder: str) -> None:
    strangers = {
        str(file.relative_to(ROOT)): sorted(imported(file) - MAY_IMPORT[folder] - {folder})
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {file: names for file, names in strangers.items() if names} == {}


def test_every_folder_is_linked_into_the_package() -> None:
    for folder in MAY_IMPORT:
        link = ROOT / "src" / "forcingkv" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_importing_the_runtime_loads_no_backend() -> None:
    code = "import sys, forcingkv.runtime; print('onnxruntime' in sys.modules, 'av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
