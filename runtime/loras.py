"""What was merged into the weights of a bundle: the record of a LoRA, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA that was merged. Numbers are each named once, rising."""

    file: str
    """The file's name."""
    sha256: str
    """Of the file."""
    strength: float
    """What all that it adds is multiplied by."""
    modules: int
    """Layers of the model that it changes."""
    kinds: tuple[str, ...]
    """LoRA, DoRA, LoHa, LoKr; difference: of a whole tensor."""
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    """What products of matrices are multiplied by: alpha over rank, or over its root."""
    alpha_from: tuple[str, ...]
    """Where alphas stand: tensors of the file, its metadata, a configuration, the preset."""
    alpha_known: bool
    """Whether every alpha was said. Where not, it is taken as the rank."""

    @property
    def told(self) -> str:
        """A line for people."""
        parts = [f"{self.modules} module{'s' if self.modules != 1 else ''} ({', '.join(self.kinds)})"]
        if self.ranks:
            parts.append(f"rank {_numbers(self.ranks)}")
        if self.alphas:
            parts.append(f"alpha {_numbers(self.alphas)} ({'; '.join(self.alpha_from)})")
        elif self.scales:
            parts.append("; ".join(self.alpha_from))
        return f"{self.file}: {', '.join(parts)}, strength {self.strength:g}"


def _numbers(values: Sequence[float]) -> str:
    """All of a few numbers, else the least and the most."""
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]} to {shown[-1]}"
