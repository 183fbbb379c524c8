"""Who may import whom: the runtime stands alone, and nobody imports analyze."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from forcingkv.runtime.kv.policies import load_policy
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


def test_the_runtime_runs_a_bundle_with_nothing_but_numpy_psutil_and_onnxruntime() -> None:
    spec = small_spec()
    headmap = headmap_of(spec, [[0], [1, 2], [], [0, 1, 2]])
    weights = random_model(spec).state_dict()
    bundle = shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap)
    code = RUN.format(blocked=set(BLOCKED), bundle=str(bundle))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(3, 8, 12, 3)] * 4)


FREE = {"plotting", "resampling"}
"""Modules that everybody may import: they import nothing of forcingkv."""
MAY_IMPORT = {
    "headmaps": set(),
    "runtime": {"headmaps", "prune.launcher", "prune.launchers", "prune.plugin"},
    "prune": {"headmaps", "runtime"},
    "models": {"headmaps", "runtime", "prune.reference"},
    "analyze": {"headmaps", "runtime", "models"},
    "export": {"headmaps", "runtime", "prune", "models"},
    "measure": {"headmaps", "runtime", "models", "export"},
    "serve": {"headmaps", "runtime"},
    "hosts": {"headmaps", "runtime", "commands"},
}
"""Folder -> the folders, and the single modules of `prune`, that its files may import."""
ALSO = {"runtime/backends/torch_*.py": {"models"}}
"""Files -> what they may import besides: the backend torch runs the model itself, where it is asked for."""


def imported(file: Path) -> set[str]:
    """What a file imports of forcingkv, anywhere in it: folders, and modules of `prune`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        parts = [name.split(".")[1:] for name in names if name.startswith("forcingkv.")]
        found |= {".".join(part[:2]) if part[0] == "prune" else part[0] for part in parts}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder} | FREE
    also = {file: names for pattern, names in ALSO.items() for file in ROOT.glob(pattern)}
    others = {
        str(file.relative_to(ROOT)): sorted(
            name
            for name in imported(file)
            if not {name, name.split(".")[0]} & (allowed | also.get(file, set()))
        )
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {file: names for file, names in others.items() if names} == {}


def test_what_the_runtime_loads_of_prune_loads_no_torch_triton_or_onnx() -> None:
    heavy = ("torch", "triton", "onnx", "onnxscript", "onnxruntime")
    code = (
        "import sys, forcingkv.prune.launcher, forcingkv.prune.plugin, forcingkv.runtime.backends.tensorrt\n"
    )
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_runtime_loads_prune_only_for_engines() -> None:
    code = "import sys, forcingkv.runtime; print([name for name in sys.modules if 'prune' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_is_linked_into_the_package() -> None:
    for folder in MAY_IMPORT:
        link = ROOT / "src" / "forcingkv" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_importing_the_runtime_loads_no_backend() -> None:
    code = "import sys, forcingkv.runtime; print('onnxruntime' in sys.modules, 'av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
