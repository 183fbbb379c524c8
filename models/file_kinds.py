"""What a file of tensors is by its content, whatever it is called, and what else may lie in its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from forcingkv.headmaps.errors import InputError, first_line

Format = Literal["safetensors", "torch"]

CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
AGAIN = "Fetch it again."

_OTHERS = (
    (rb"GGUF", "is a GGUF file, which is not read", "Take the weights as .safetensors or .pt."),
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull"),
    (rb"\s*<", "is a web page, not a file of tensors", AGAIN),
    (rb"\x93NUMPY", "is an array of numpy, which says no names", "Save tensors with their names."),
    (rb"\s*[\[{]", "is JSON, not a file of tensors", "Name the file or the folder with the weights."),
)
"""How files begin that are no tensors; what they are, and what to do."""

LONGEST_HEADER = 100_000_000
"""Bytes that safetensors allows a header."""


def format_of(path: Path) -> Format:
    """Which format a file has, by how it begins; by its suffix, where that says nothing.

    Raises InputError for a file that cannot be read, and for one that is something else, saying what.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise InputError(what, where=str(path), expected="a .safetensors, .pt or .pth file") from error
    if not head:
        raise InputError("cannot be read: it is empty", where=str(path), hint=AGAIN)
    if path.suffix.lower() == ".distcp":
        what = "is a part of a distributed checkpoint, which is not read"
        raise InputError(what, where=str(path), hint=f"Make one file of its folder: {CONVERT}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80\x02\x8a")):  # since torch 1.6, and before
        if path.suffix.lower() == ".safetensors":  # torch believes the suffix
            what = "is called .safetensors and is a file that torch wrote"
            raise InputError(what, where=str(path), hint="Rename it: .pt")
        return "torch"
    if path.name.lower().endswith(".bin.index.json"):
        what = "is an index of shards that torch wrote, which are not read"
        raise InputError(what, where=str(path), hint="Save the model again, as .safetensors.")
    for begins, what, hint in _OTHERS:
        if re.match(begins, head):
            raise InputError(what, where=str(path), hint=hint)
    return "safetensors" if path.suffix.lower() == ".safetensors" else "torch"


def torch_fault(error: Exception, path: Path) -> InputError:
    """What is wrong with a torch file that cannot be opened."""
    said = str(error)
    held = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)\b.* not an allowed", said)
    hint = "Save its state dict alone, best as .safetensors."
    if held:
        what = f"is refused: it holds a pickled object that is not a tensor ({held[1] or held[2]})"
        expected = "tensors only (torch.load with weights_only=True)"
        return InputError(what, where=str(path), expected=expected, hint=hint)
    if "TorchScript" in said:
        return InputError("is a TorchScript program", where=str(path), expected="tensors", hint=hint)
    if "reading zip archive" in said or isinstance(error, EOFError):
        return InputError("cannot be read: it is cut short or damaged", where=str(path), hint=AGAIN)
    told = "" if "weights_only" in said else f" ({first_line(error)})"
    expected = "a whole .pt, .pth or .safetensors file"
    return InputError(f"cannot be read as a torch file{told}", where=str(path), expected=expected, hint=hint)
