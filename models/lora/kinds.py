"""What each kind of LoRA adds to the weights of a module: checked shapes, then a difference in float32.

| kind | difference of a weight W (out, in) | sources |
|---|---|---|
| LoRA | scale * up @ down | Hu et al., arXiv 2106.09685 |
| LoHa | scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element | Hyeon-Woo et al., arXiv 2108.06098 |
| LoKr | scale * kron(w1, w2), each whole or a product a @ b | Yeh et al., arXiv 2309.14859 |
| DoRA | m * (W + D) / norm(W + D) - W, where D is one of the above | Liu et al., arXiv 2402.09353 |
| difference | `diff` as it is; of a bias `diff_b`; of a modulation `diff_m` | |

A convolution is the matrix (out, in * kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from forcingkv.models.lora.keys import Parts
from forcingkv.models.lora.scales import WHOLE, Scale, Scales
from forcingkv.models.tensor_files import FLOATS, Shapes, TensorFiles

Shape = tuple[int, ...]

_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}

LORA, LOHA, LOKR, DORA, DIFFERENCE = "LoRA", "LoHa", "LoKr", "DoRA", "difference"


@dataclass(frozen=True)
class Change:
    """What a file adds to one tensor of the model."""

    target: str
    """The tensor's Wan name."""
    kind: str
    added: Callable[[Tensor], Tensor]
    """The tensor, in float32 or float64 -> what is added to it at strength 1, in its shape and dtype."""
    rank: int | None = None
    scale: Scale | None = None


class MisfitError(Exception):
    """A part that does not fit the model or the other parts, in words that name it."""


def changes(parts: Parts, files: TensorFiles, shapes: Shapes, scales: Scales) -> Iterator[Change]:
    """What the tensors of a module add to the model's.

    Raises MisfitError where parts are missing or no floating-point numbers, or their shapes do not make that
    of the weight, and InputError as `Scales.of` does.
    """
    kinds = {part: files.dtypes[name] for part, name in parts.names.items()}
    floats = [part for part, kind in kinds.items() if part != "alpha" or " " in kind or kind == "bool"]
    wrong = [part for part in floats if kinds[part] not in FLOATS]
    if wrong:
        told = (f"{parts.names[part]} is stored as {kinds[part]}" for part in wrong)
        raise MisfitError(f"{'; '.join(told)}, which is no dtype of weights here")
    there = set(parts.names)
    weight = _weight(parts, shapes)
    reader = _Reader(parts, files, weight)
    used = {"alpha", "diff", "diff_b"} & there
    products = [
        (kind, members)
        for kind, members in ((LORA, {"down", "up"}), (LOHA, _LOHA), (LOKR, _lokr(there)))
        if there & (members | ({"up_bias"} if kind == LORA else set()))
    ]
    if len(products) > 1:
        raise MisfitError(f"{weight.name} is given as {' and as '.join(kind for kind, _ in products)}")
    if products:
        kind, members = products[0]
        if not members <= there:
            raise MisfitError(f"{weight.name} has only {', '.join(sorted(parts.names.values()))}")
        used |= members | ({"magnitude", "up_bias"} & there)
        yield from _product(kind, reader, parts, scales)
    if used != there or used == {"alpha"}:
        left = sorted(parts.names[part] for part in there - used or there)
        raise MisfitError(f"{weight.name} has only {', '.join(left)}")
    if "diff" in there:
        yield from _whole(reader, "diff", weight)
    if "diff_b" in there:
        yield from _whole(reader, "diff_b", _bias(parts, shapes))


@dataclass(frozen=True)
class _Target:
    """The tensors of a module that a change is of, as one: rows below rows."""

    name: str
    tensors: tuple[str, ...]
    shape: Shape

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])


def _weight(parts: Parts, shapes: Shapes) -> _Target:
    layers = parts.module.layers
    # A parameter that is no layer's (a modulation) goes by its own name.
    names = tuple(f"{layer}.weight" if f"{layer}.weight" in shapes else layer for layer in layers)
    return _joined(f"{parts.module.name}.weight" if len(layers) > 1 else names[0], names, shapes)


def _bias(parts: Parts, shapes: Shapes) -> _Target:
    names = tuple(f"{layer}.bias" for layer in parts.module.layers)
    absent = [name for name in names if name not in shapes]
    if absent:
        raise MisfitError(f"the model has no {', '.join(absent)}")
    return _joined(f"{parts.module.name}.bias", names, shapes)


def _joined(name: str, tensors: tuple[str, ...], shapes: Shapes) -> _Target:
    rows = sum(shapes[tensor][0] for tensor in tensors)
    return _Target(name, tensors, (rows, *shapes[tensors[0]][1:]))


class _Reader:
    """The parts of a module by their words: shapes at once, contents in float32 when they are asked for."""

    def __init__(self, parts: Parts, files: TensorFiles, weight: _Target) -> None:
        self._names, self._files, self.weight = parts.names, files, weight

    def shape(self, part: str) -> Shape:
        return self._files.shapes[self._names[part]]

    def matrix(self, part: str) -> tuple[int, int]:
        """The shape of a part as a matrix (rows, all else)."""
        shape = self.shape(part)
        if len(shape) < 2:
            raise MisfitError(f"{self._names[part]} is {shape} instead of a matrix")
        return shape[0], math.prod(shape[1:])

    def has(self, part: str) -> bool:
        return part in self._names

    def name(self, part: str) -> str:
        return self._names[part]

    def read(self, part: str) -> Tensor:
        return self._files.read(self._names[part]).float()

    def read_matrix(self, part: str) -> Tensor:
        return self.read(part).flatten(1)

    def alpha(self) -> float | None:
        """The tensor `alpha` of the module, if there is one."""
        if not self.has("alpha"):
            return None
        name, shape = self._names["alpha"], self.shape("alpha")
        if math.prod(shape) != 1:
            raise MisfitError(f"{name} is {shape} instead of one number")
        alpha = float(self._files.read(name).reshape(()).item())
        if not math.isfinite(alpha):
            raise MisfitError(f"{name} is {alpha} instead of a finite number")
        return alpha


def _product(kind: str, reader: _Reader, parts: Parts, scales: Scales) -> Iterator[Change]:
    """A product of matrices, what makes a DoRA of it, and the bias of `up`."""
    rank, product, makes = {LORA: _lora_product, LOHA: _loha_product, LOKR: _lokr_product}[kind](reader)
    weight = reader.weight
    if makes != weight.matrix:
        told = ", ".join(f"{part} {reader.shape(part)}" for part in sorted(parts.names) if part != "alpha")
        raise MisfitError(f"{told} do not make {weight.name} {weight.shape}")
    scale = _scale(kind, rank, reader, parts, scales)

    def added(tensor: Tensor) -> Tensor:
        return product().mul_(scale.factor).reshape(weight.shape).to(tensor.dtype)

    if reader.has("magnitude"):
        yield _decomposed(reader, added, rank, scale)
    else:
        yield from _rows(kind, weight, added, rank, scale)
    if reader.has("up_bias"):
        bias = _bias_of(weight)
        if len(weight.tensors) > 1 or reader.shape("up_bias") != (weight.shape[0],):
            raise MisfitError(
                f"{reader.name('up_bias')} is {reader.shape('up_bias')}, not the bias of {weight.name}"
            )
        yield Change(bias, kind, lambda tensor: (scale.factor * reader.read("up_bias")).to(tensor.dtype))


def _bias_of(weight: _Target) -> str:
    return weight.tensors[0].removesuffix(".weight") + ".bias"


def _rows(
    kind: str, target: _Target, added: Callable[[Tensor], Tensor], rank: int | None, scale: Scale | None
) -> Iterator[Change]:
    """A change of each of the tensors that are joined: its rows of what is added to all."""
    height = target.shape[0] // len(target.tensors)
    for number, name in enumerate(target.tensors):
        rows = partial(_rows_of, added, slice(number * height, (number + 1) * height))
        yield Change(name, kind, added if len(target.tensors) == 1 else rows, rank, scale)


def _rows_of(added: Callable[[Tensor], Tensor], rows: slice, tensor: Tensor) -> Tensor:
    return added(tensor)[rows]


def _scale(kind: str, rank: int | None, reader: _Reader, parts: Parts, scales: Scales) -> Scale:
    alpha = reader.alpha()
    if rank is not None:
        return scales.of(parts.written, rank, alpha)
    # LoKr with two whole matrices has no rank. PEFT divides by the rank it was asked for, musubi by the
    # longer side of w2; LyCORIS and ComfyUI do not scale, whatever alpha says.
    configured = scales.config.scale(parts.written, None) if scales.config else None
    if configured:
        return configured
    if scales.by_musubi and alpha is not None:
        return Scale(alpha / max(reader.shape("lokr_w2")), alpha, "musubi's rule")
    return Scale(1.0, None, WHOLE)


def _lora_product(reader: _Reader) -> tuple[int, Callable[[], Tensor], tuple[int, int]]:
    (rank, columns), (rows, inner) = reader.matrix("down"), reader.matrix("up")
    if rank < 1 or inner != rank:
        down, up = reader.shape("down"), reader.shape("up")
        raise MisfitError(f"A {down} and B {up} do not make {reader.weight.name} {reader.weight.shape}")
    return rank, lambda: reader.read_matrix("up") @ reader.read_matrix("down"), (rows, columns)


def _loha_product(reader: _Reader) -> tuple[int, Callable[[], Tensor], tuple[int, int]]:
    shapes = [(reader.matrix(f"hada_w{n}_a"), reader.matrix(f"hada_w{n}_b")) for n in (1, 2)]
    makes = {(a[0], b[1]) for a, b in shapes}
    ranks = {rank for a, b in shapes for rank in (a[1], b[0])}
    if len(ranks) > 1 or len(makes) > 1 or 0 in ranks:
        told = ", ".join(f"{part} {reader.shape(part)}" for part in sorted(_LOHA))
        raise MisfitError(f"{told} do not make {reader.weight.name} {reader.weight.shape}")

    def product() -> Tensor:
        one, two = (reader.read_matrix(f"hada_w{n}_a") @ reader.read_matrix(f"hada_w{n}_b") for n in (1, 2))
        return one * two

    return ranks.pop(), product, makes.pop()


def _lokr(there: set[str]) -> set[str]:
    """The parts of LoKr: either matrix may be whole or a product. Those of a form that is begun."""
    members: set[str] = set()
    for whole in ("lokr_w1", "lokr_w2"):
        pair = {f"{whole}_a", f"{whole}_b"}
        members |= pair if pair & there else {whole}
    return members


def _lokr_product(reader: _Reader) -> tuple[int | None, Callable[[], Tensor], tuple[int, int]]:
    sides: list[tuple[int, int]] = []
    ranks = set()
    for whole in ("lokr_w1", "lokr_w2"):
        if reader.has(whole):
            sides.append(reader.matrix(whole))
            continue
        (rows, rank), (inner, columns) = reader.matrix(f"{whole}_a"), reader.matrix(f"{whole}_b")
        if rank != inner or rank < 1:
            raise MisfitError(
                f"{reader.name(f'{whole}_a')} and {reader.name(f'{whole}_b')} have no rank in common"
            )
        sides.append((rows, columns))
        ranks.add(rank)
    if len(ranks) > 1:
        raise MisfitError(f"the matrices of LoKr of {reader.weight.name} have the ranks {sorted(ranks)}")

    def side(whole: str) -> Tensor:
        if reader.has(whole):
            return reader.read_matrix(whole)
        return reader.read_matrix(f"{whole}_a") @ reader.read_matrix(f"{whole}_b")

    makes = sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    return (ranks.pop() if ranks else None), lambda: torch.kron(side("lokr_w1"), side("lokr_w2")), makes


def _decomposed(reader: _Reader, added: Callable[[Tensor], Tensor], rank: int | None, scale: Scale) -> Change:
    """DoRA: rows of the changed weight (columns, in old files of LyCORIS) are given a length."""
    weight, shape = reader.weight, reader.shape("magnitude")
    if len(weight.tensors) > 1:
        raise MisfitError(
            f"{weight.name} is of joined layers, and {reader.name('magnitude')} is not merged into those"
        )
    out, columns = weight.shape[0], weight.shape[1]
    # One number for each row; or (1, in, ...): one for each column of the matrix.
    of_rows = shape[0] == out and math.prod(shape) == out and (len(shape) > 1 or _of_peft(reader))
    of_columns = len(shape) > 1 and shape[:2] == (1, columns) and math.prod(shape) == columns
    if not of_rows and not of_columns:
        raise MisfitError(f"{reader.name('magnitude')} is {shape} instead of ({out}, 1) or (1, {columns})")
    others = tuple(dim for dim in range(len(weight.shape)) if dim != (0 if of_rows else 1))

    def rescaled(tensor: Tensor) -> Tensor:
        changed = tensor + added(tensor)
        length: Tensor = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        wanted = reader.read("magnitude").to(tensor.dtype).reshape(length.shape)
        return wanted * changed / length - tensor

    return Change(weight.tensors[0], DORA, rescaled, rank, scale)


def _of_peft(reader: _Reader) -> bool:
    """Whether magnitudes are PEFT's, which are always of rows."""
    return "lora_magnitude_vector" in reader.name("magnitude")


def _whole(reader: _Reader, part: str, target: _Target) -> Iterator[Change]:
    if reader.shape(part) != target.shape:
        raise MisfitError(f"{reader.name(part)} is {reader.shape(part)} instead of {target.shape}")
    yield from _rows(DIFFERENCE, target, lambda tensor: reader.read(part).to(tensor.dtype), None, None)
