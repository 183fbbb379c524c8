"""Weights of a model: read from a file, checked against the spec, or made at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec

__all__ = ["Weights", "build_model", "load_weights", "random_weights"]


class Weights(dict[str, Tensor]):
    """A state dict in Wan naming, with where it came from.

    Attributes:
        digest: SHA-256 of the file it was read from; None for random weights.
    """

    digest: str | None = None


def load_weights(spec: ModelSpec, checkpoint: Path | None = None) -> Weights:
    """Read a safetensors file (Wan naming, with or without the prefix `model.`).

    Without `checkpoint` the weights that ship with the model are read. Raises InputError listing
    every tensor that is missing, unexpected or wrongly shaped.
    """
    path = checkpoint or _shipped(spec)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot be read as safetensors ({error})",
            where=str(path),
            expected="a .safetensors file of the model's weights",
        ) from error
    weights = Weights((name.removeprefix("model."), tensor) for name, tensor in state.items())
    _check(spec, weights, str(path))
    with path.open("rb") as file:
        weights.digest = hashlib.file_digest(file, "sha256").hexdigest()
    return weights


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Weights drawn at random, for trying a pipeline out without a checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Weights(WanModel(spec).state_dict())


def build_model(spec: ModelSpec, weights: Mapping[str, Tensor]) -> WanModel:
    """The model with those weights, for inference."""
    with torch.device("meta"):
        model = WanModel(spec)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval().requires_grad_(False)


def _shipped(spec: ModelSpec) -> Path:
    path = Path(str(resources.files("forcingkv.models"))) / spec.name / "weights.safetensors"
    if not path.is_file():
        raise InputError(
            f"no weights ship with {spec.name}",
            where="checkpoint",
            mend="Give them with --checkpoint, or use --random-weights.",
        )
    return path


def _check(spec: ModelSpec, state: Mapping[str, Tensor], where: str) -> None:
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in WanModel(spec).state_dict().items()}
    faults = [f"missing {name}" for name in wanted.keys() - state.keys()]
    faults += [f"unexpected {name}" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:20]) + ("; ..." if len(faults) > 20 else "")
        raise InputError(f"does not fit the model {spec.name}: {len(faults)} tensors: {shown}", where=where)
