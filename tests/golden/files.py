"""Reading golden files: safetensors with a `spec` in JSON, and which of them are of later work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

FORMAT = 2
OTHER_RULES = {
    "pyramid forcing": "each query frame reads a history of its own, and its keys at times of its own, sink"
    " frames of chunk 0 among them; tests/runtime/test_pyramid.py compares which frames are read",
}
"""What a policy's kind begins with whose latents come of rules that no role can follow."""

RULE = "rule"
"""A variant of its own: what the class rule of Dummy Forcing makes of scores."""
DECODED = ("decoded", "encoded", "encoded_first_frame")
"""Tensors of a decoder's file that are compared."""


class GoldenError(Exception):
    """A file cannot be run: a sentence that names what of it is not understood."""


class GoldenFile:
    """A golden file that lies open.

    Attributes:
        path: where it lies.
        spec: what its metadata says.
        names: of its tensors.
    """

    def __init__(self, path: Path) -> None:
        """Open it. Raises GoldenError for one that is no safetensors file with a spec."""
        self.path = path
        try:
            self._file: Any = safe_open(path, "np")
        except (SafetensorError, OSError) as error:
            raise GoldenError(f"{path} cannot be read as safetensors: {error}") from error
        self.names = frozenset(self._file.keys())
        try:
            self.spec: dict[str, Any] = json.loads((self._file.metadata() or {})["spec"])
        except (KeyError, ValueError) as error:
            raise GoldenError(f"{path} has no `spec` in JSON in its metadata") from error

    @property
    def name(self) -> str:
        return self.path.stem

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Raises GoldenError where there is none of that name, or its dtype is not numpy's."""
        if name not in self.names:
            raise GoldenError(f"there is no tensor {name}")
        try:
            tensor: npt.NDArray[Any] = self._file.get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise GoldenError(f"the tensor {name} cannot be read: {error}") from error
        return tensor

    @cached_property
    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """The model, by Wan name."""
        prefix = "model."
        found = {
            name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)
        }
        if not found:
            raise GoldenError("there are no tensors model.*")
        return found

    @property
    def of_decoder(self) -> bool:
        """Whether it is of a decoder, and not of a model."""
        return "decoded" in self.names and not any(name.startswith("model.") for name in self.names)

    @cached_property
    def variants(self) -> Mapping[str, Any]:
        """What `spec` says of each variant; one without a name where there are no variants. Of a decoder's
        file what is compared in it."""
        if self.of_decoder:
            return {name: {} for name in DECODED if name in self.names}
        variants = self.spec.get("variants")
        if variants is None and "latents" in self.names:
            return {"": {}}
        if not isinstance(variants, Mapping) or not variants:
            raise GoldenError("its spec has no variants")
        if f"{RULE}.scores" in self.names:
            variants = {**variants, RULE: {}}
        unsaid = sorted(
            name.removesuffix(".latents")
            for name in self.names
            if name.endswith(".latents") and name.removesuffix(".latents") not in variants
        )
        if unsaid:
            raise GoldenError(f"it has latents of variants that its spec does not have: {', '.join(unsaid)}")
        return variants

    def of(self, variant: str, what: str) -> str:
        """Name of a variant's tensor."""
        return f"{variant}.{what}" if variant else what

    @property
    def kind(self) -> str:
        """What it says of its policy."""
        return str((self.spec.get("policy") or {}).get("kind", ""))

    @property
    def later(self) -> str | None:
        """What the product has not that the file is about, or why another test has it; None: it is run."""
        if "format" not in self.spec:
            return "the older format, of single passes: tests/models/test_golden.py has it"
        if self.spec["format"] != FORMAT:
            raise GoldenError(f"its format is {self.spec['format']!r}, and only {FORMAT} is known")
        if self.of_decoder:
            return None
        for begins, why in OTHER_RULES.items():
            if self.kind.casefold().startswith(begins.casefold()):
                return f"other rules: {why}"
        return None
