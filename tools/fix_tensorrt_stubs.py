"""Make the installed `tensorrt-stubs` parse, so that mypy checks the TensorRT code against them.

The published stubs (all versions up to 10.13) are generated from docstrings and have five lines that are not
Python: parameters named `in`, and a parameter without a default after one with. Nothing else is changed.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

STUBS = Path(sysconfig.get_paths()["purelib"]) / "tensorrt_bindings" / "tensorrt.pyi"


def fixed(text: str) -> str:
    """The text of the stubs as valid Python."""
    text = re.sub(r"(def \w+\(self[^)]*?, )in: ", r"\1inputs: ", text)
    return re.sub(r"(def add_scale_nd\(.*)channel_axis: int\)", r"\1channel_axis: int = ...)", text)


if __name__ == "__main__":
    stubs = fixed(STUBS.read_text(encoding="utf-8"))
    ast.parse(stubs)
    STUBS.write_text(stubs, encoding="utf-8")
