"""A variant of a golden file beside what the product makes of it, chunk by chunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.faults import SessionError
from tests.golden.decoders import decoded
from tests.golden.encoders import encoded
from tests.golden.files import RULE, GoldenError, GoldenFile
from tests.golden.product import Made, Runner, run
from tests.golden.rivals import unequal_classes
from tests.golden.settings import Case, case_of

TOLERANCE = 1e-5
"""Relative, in every chunk: between the rounding of float32 and the weakest rule of a cache."""


@dataclass(frozen=True)
class Compared:
    """How a variant came out."""

    file: str
    variant: str
    difference: float | None = None
    """The largest of any chunk: norm(mine - reference) / norm(reference), of a decoder's call the largest
    absolute one; None: it was not run."""
    chunk: int | None = None
    """Where that is; of a decoder, the call."""
    by_chunk: list[float] = field(default_factory=list)
    unequal: str | None = None
    """The first whole number that is not the file's."""
    unsaid: str | None = None
    """Why it could not be run: what the product cannot be told, or what of the file is not understood."""
    unseen: str | None = None
    """What of the file was not compared."""
    tolerance: float = TOLERANCE
    """What the difference may be."""

    @property
    def holds(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance and self.unequal is None

    @property
    def line(self) -> str:
        """`file variant: max relative difference`, and what is wrong."""
        name = f"{self.file} {self.variant}".strip()
        if self.unsaid is not None:
            return f"{name}: not run: {self.unsaid}"
        line = f"{name}: {self.difference:.2e} (chunk {self.chunk})"
        if self.difference is None or not self.difference <= self.tolerance:
            first = next(n for n, one in enumerate(self.by_chunk) if not one <= self.tolerance)
            line += f" ABOVE {self.tolerance:g}, from chunk {first} on"
        if self.unequal:
            line += f"; {self.unequal}"
        return f"{line}; {self.unseen}" if self.unseen else line

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def compare(file: GoldenFile, variant: str, runner: Runner) -> Compared:
    """Run a variant and compare it."""
    try:
        if file.of_decoder:
            differences, tolerance = (decoded if variant == "decoded" else encoded)(file, variant, runner)
            worst = int(np.argmax(differences))
            return Compared(file.name, variant, differences[worst], worst, differences, tolerance=tolerance)
        if variant == RULE:
            wrong = unequal_classes(file)
            unequal = f"{wrong} heads have another class" if wrong else None
            return Compared(file.name, variant, 0.0, 0, [0.0], unequal)
        case = case_of(file, variant)
        return _compared(file, case, runner)
    except (GoldenError, InputError, SessionError) as error:
        return Compared(file.name, variant, unsaid=str(error).rstrip("."))


def _compared(file: GoldenFile, case: Case, runner: Runner) -> Compared:
    reference = file.tensor(file.of(case.variant, "latents"))
    if len(reference) != case.chunks:
        raise GoldenError(f"it has latents of {len(reference)} chunks, and its spec says {case.chunks}")
    made = list(run(file, case, runner))
    differences = [_difference(one.latents, ref) for one, ref in zip(made, reference, strict=True)]
    worst = int(np.argmax(differences))  # the first that is not a number, where one is
    unequal, unseen = _indices(file, case, made, runner)
    return Compared(file.name, case.variant, differences[worst], worst, differences, unequal, None, unseen)


def _difference(mine: Any, reference: Any) -> float:
    if mine.shape != reference.shape:
        raise GoldenError(f"a chunk has the shape {reference.shape}, and the product's {mine.shape}")
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(mine.astype(np.float64) - wide) / np.linalg.norm(wide))


def _indices(file: GoldenFile, case: Case, made: list[Made], runner: Runner) -> tuple[str | None, str | None]:
    """The first chunk whose retained segments are not the file's; and why they were not compared."""
    name = file.of(case.variant, "indices")
    if name not in file.names:
        return None, None
    if runner == "onnxruntime":
        return None, "indices not compared, which graphs do not show"
    for chunk, (one, wanted) in enumerate(zip(made, file.tensor(name).tolist(), strict=True)):
        chosen = one.indices or []
        if chosen + [-1] * (len(wanted) - len(chosen)) != wanted:
            return f"indices of chunk {chunk} are {chosen}, and {wanted} in the file", None
    return None, None
