"""What the plugins of `prune_plugin` do: shapes, workspace and launches of the two pruning operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from forcingkv.runtime.flavour import trt
from forcingkv.runtime.kernels import KernelLauncher, check_candidates, workspace_bytes

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """DynamicPrune: score the segments, choose the least similar, collect them.

    The fields are the node's attributes. Inputs: transition keys and values, new keys and values (batch,
    heads, tokens, head_dim). Outputs: retained keys and values, indices.
    """

    frame_tokens: int
    segments: int
    kept: int

    name: ClassVar[str] = "DynamicPrune"
    outputs: ClassVar[int] = 3
    indices_place: ClassVar[int] = 6
    """Place of the indices among inputs and outputs."""

    def __post_init__(self) -> None:
        if min(self.frame_tokens, self.segments, self.kept) < 1 or self.frame_tokens % self.segments:
            raise ValueError(f"no segments of equal size: {self}")

    @property
    def segment_tokens(self) -> int:
        """Tokens of a segment."""
        return self.frame_tokens // self.segments

    def candidate_tokens(self, transition: Shape, new: Shape) -> int:
        """Tokens of all frames but the last: those that have one a frame later to be compared to."""
        return transition[2] + new[2] - self.frame_tokens

    def output_shapes(self, inputs: list[trt.DimsExprs], build: trt.IExprBuilder) -> list[trt.DimsExprs]:
        """Shapes of the outputs."""
        tokens = build.constant(self.kept * self.segment_tokens)
        retained = [_with_tokens(inputs, tokens) for _ in range(2)]
        return [*retained, trt.DimsExprs([build.constant(self.kept)])]

    def workspace_bytes(self, inputs: list[Shape]) -> int:
        """Bytes for the cosines."""
        return workspace_bytes(self.candidate_tokens(inputs[0], inputs[2]))

    def check(self, inputs: list[Shape]) -> None:
        """Raises ValueError if frames are not whole, or their segments too few or too many to choose from."""
        for name, shape in zip(("transition", "new"), (inputs[0], inputs[2]), strict=True):
            if shape[2] % self.frame_tokens:
                raise ValueError(f"{name} keys hold {shape[2]} tokens, no multiple of {self.frame_tokens}")
        candidates = self.candidate_tokens(inputs[0], inputs[2]) // self.segment_tokens
        if candidates < self.kept:
            raise ValueError(f"{self.kept} segments are to be kept, of {candidates}")
        check_candidates(candidates)

    def run(
        self, launcher: KernelLauncher, shapes: list[Shape], pointers: list[int], workspace: int, stream: int
    ) -> None:
        """Launch the kernels; `pointers` are those of the inputs, then of the outputs."""
        keys, values, new_keys, new_values, retained_keys, retained_values, indices = pointers
        batch, heads, new_tokens, _ = shapes[2]
        tokens = {"transition_tokens": shapes[0][2], "new_tokens": new_tokens}
        launcher.score(
            keys,
            new_keys,
            workspace,
            indices,
            heads=heads,
            **tokens,
            frame_tokens=self.frame_tokens,
            segment_tokens=self.segment_tokens,
            kept=self.kept,
            stream=stream,
        )
        launcher.collect(
            keys,
            values,
            new_keys,
            new_values,
            indices,
            retained_keys,
            retained_values,
            batch=batch,
            heads=heads,
            **tokens,
            segment_tokens=self.segment_tokens,
            kept=self.kept,
            stream=stream,
        )


@dataclass(frozen=True)
class Follow:
    """DynamicPruneFollow: collect the segments that the scoring layer chose.

    The field is the node's attribute. Inputs: those of `Score`, and the indices. Outputs: retained keys
    and values.
    """

    segment_tokens: int

    name: ClassVar[str] = "DynamicPruneFollow"
    outputs: ClassVar[int] = 2
    indices_place: ClassVar[int] = 4

    def output_shapes(self, inputs: list[trt.DimsExprs], build: trt.IExprBuilder) -> list[trt.DimsExprs]:
        """Shapes of the outputs."""
        size = build.constant(self.segment_tokens)
        tokens = build.operation(trt.DimensionOperation.PROD, inputs[4][0], size)
        return [_with_tokens(inputs, tokens) for _ in range(2)]

    def workspace_bytes(self, inputs: list[Shape]) -> int:
        """None."""
        return 0

    def check(self, inputs: list[Shape]) -> None:
        """Raises ValueError if keys do not hold whole segments."""
        for name, shape in zip(("transition", "new"), (inputs[0], inputs[2]), strict=True):
            if shape[2] % self.segment_tokens:
                raise ValueError(f"{name} keys hold {shape[2]} tokens, no multiple of {self.segment_tokens}")

    def run(
        self, launcher: KernelLauncher, shapes: list[Shape], pointers: list[int], workspace: int, stream: int
    ) -> None:
        """Launch the kernel; `pointers` are those of the inputs, then of the outputs."""
        keys, values, new_keys, new_values, indices, retained_keys, retained_values = pointers
        batch, heads, new_tokens, _ = shapes[2]
        launcher.collect(
            keys,
            values,
            new_keys,
            new_values,
            indices,
            retained_keys,
            retained_values,
            batch=batch,
            heads=heads,
            transition_tokens=shapes[0][2],
            new_tokens=new_tokens,
            segment_tokens=self.segment_tokens,
            kept=shapes[4][0],
            stream=stream,
        )


Operator: TypeAlias = Score | Follow
OPERATORS: tuple[type[Operator], ...] = (Score, Follow)


def _with_tokens(inputs: list[trt.DimsExprs], tokens: trt.IDimensionExpr) -> trt.DimsExprs:
    """The shape of the new keys, with another number of tokens."""
    return trt.DimsExprs([inputs[2][0], inputs[2][1], tokens, inputs[2][3]])
