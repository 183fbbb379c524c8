"""Bundles that a stranger made: every digest fits, and something is not what export writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from forcingkv.headmaps import InputError
from forcingkv.headmaps.files import record_file
from forcingkv.runtime import Bundle, Session

Change = Callable[[onnx.ModelProto], object]


def remade(bundle: Path, out: Path, manifest: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A copy (of hard links) whose manifest is changed, then its digests computed anew."""
    out.mkdir()
    for file in bundle.iterdir():
        if file.name != "manifest.json":
            os.link(file, out / file.name)
    data = json.loads((bundle / "manifest.json").read_text())
    if manifest:
        manifest(data)
    (out / "manifest.json").write_text(json.dumps(data))
    return out


def write(bundle: Path, name: str, content: bytes) -> None:
    """Put other content into a file of a copy, and its digest into the manifest."""
    path = bundle / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    data = json.loads((bundle / "manifest.json").read_text())
    record = record_file(path)
    data["files"][name] = {"sha256": record.sha256, "bytes": record.bytes}
    (bundle / "manifest.json").write_text(json.dumps(data))


def with_graph(bundle: Path, out: Path, name: str, change: Change | bytes) -> Path:
    """A copy with another graph: bytes, or the one there was, changed."""
    remade(bundle, out)
    if isinstance(change, bytes):
        content = change
    else:
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        change(model)
        content = model.SerializeToString()
    write(out, f"{name}.onnx", content)
    return out


def refused(bundle: Path, message: str) -> None:
    """A bundle is refused in a sentence that names it, and ONNX Runtime is given none of its graphs."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("ONNX Runtime was given a graph of a bundle that is refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "InferenceSession", load)
        for opened in (Bundle.open, Session.open):
            with pytest.raises(InputError, match=message) as error:
                opened(bundle)  # type: ignore[operator]
            assert str(bundle) in str(error.value)
            assert len(str(error.value)) < 1000
