"""Which LoRAs a user asks for: the file, and how strong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there
from forcingkv.models.tensor_files import TORCH_FILES

SUFFIXES = (".safetensors", *TORCH_FILES)
SHOWN = 20
"""How many files a message names."""
EXPECTED = "FILE, FOLDER or FILE:STRENGTH"
USUAL = ("adapter_model", "pytorch_lora_weights")
"""What PEFT and diffusers call the file in a folder."""


@dataclass(frozen=True)
class Lora:
    """A LoRA that a user asks for. Raises InputError for a strength that is not finite."""

    path: Path
    """A file, or a folder with one; or, until it is fetched, a place on the hub (`hub.FORM`)."""
    strength: float = 1.0
    """What all that it adds is multiplied by: 0 adds nothing, less takes it away."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise _wrong_strength(str(self.strength), self.path)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read FILE or FILE:STRENGTH, where FILE may be a place on the hub.

        What exists by the whole text is that file, whatever it is called; else a number behind the last colon
        is the strength. Raises InputError where both could be meant, or the strength is not a finite number.
        """
        if not text:
            raise InputError("names nothing", where="--lora", expected="FILE or FILE:STRENGTH")
        head, colon, tail = text.rpartition(":")
        try:
            strength = None if "_" in tail else float(tail)  # 2_1 is a name, and 21 to Python
        except ValueError:
            strength = None
        if there(text) or not head:
            if strength is not None and head and there(head):
                raise InputError(
                    f"there are both {text!r} and {head!r}",
                    where="--lora",
                    hint=f"{text}:1 is the one; {head}:{strength:.6f} is the other, at that strength.",
                )
            return cls(Path(text))
        if strength is not None:
            return cls(Path(head), strength)
        if colon and there(head):
            raise _wrong_strength(tail, Path(head))
        return cls(Path(text))  # of Windows, with the letter of a drive; on the hub; or there is no such file


LoraLike: TypeAlias = str | Path | Lora


def asked(loras: LoraLike | Sequence[LoraLike] | None) -> list[Lora]:
    """The LoRAs of an argument: one or several, as text (see `Lora.parse`), as paths or as they are."""
    if loras is None:
        return []
    several = [loras] if isinstance(loras, str | Path | Lora) else loras
    return [
        Lora.parse(one) if isinstance(one, str) else one if isinstance(one, Lora) else Lora(one)
        for one in several
    ]


def tensor_file(path: Path) -> Path:
    """The file of a LoRA: itself, or the one of a folder.

    Raises InputError where there is none, or several that none of `USUAL` is among.
    """
    if there(path) and path.is_file():
        return path
    if not there(path) or not path.is_dir():
        what = "cannot be read: there is no such file or folder"
        raise InputError(what, where=f"--lora {path}", expected=EXPECTED)
    files = [file.name for file in path.iterdir() if file.name.lower().endswith(SUFFIXES) and file.is_file()]
    return path / usual_file(files, str(path))


def usual_file(names: Sequence[str], where: str) -> str:
    """Which of the files of tensors in a place is a LoRA's.

    Raises InputError where there is none, or several that none of `USUAL` is among.
    """
    files = sorted(names)
    usual = [file for stem in USUAL for file in files if PurePosixPath(file).stem == stem]
    if usual or len(files) == 1:
        return (usual or files)[0]
    named = f": {', '.join(files[:SHOWN])}{', ...' if len(files) > SHOWN else ''}" if files else ""
    what = f"holds {len(files)} files of tensors{named}"
    expected = f"one, or {' or '.join(f'{stem}.safetensors' for stem in USUAL)}"
    raise InputError(what, where=where, expected=expected, hint="Name the file.")


def _wrong_strength(given: str, path: Path) -> InputError:
    expected = "a finite number, such as 0.8"
    return InputError(f"has the strength {given!r}", where=f"--lora {path}", expected=expected)
