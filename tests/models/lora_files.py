"""LoRAs as trainers and programs write them: the same matrices in every layout, and what they come to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.models.lora import Lora
from tests.conftest import random_model, small_spec

State = dict[str, Tensor]

DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.k": "attn2.to_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
"""Wan's names of layers and those of diffusers, written down here once more: the test's own."""

MODULES = (
    "blocks.0.self_attn.q",
    "blocks.1.self_attn.o",
    "blocks.2.cross_attn.k",
    "blocks.3.ffn.0",
    "blocks.0.ffn.2",
    "text_embedding.0",
    "time_projection.1",
    "head.head",
)


@dataclass(frozen=True)
class Pair:
    """The matrices of a module: down (rank, in), up (out, rank); and its alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def product(self) -> Tensor:
        """What it adds at strength 1, in float64."""
        return self.alpha / self.rank * (self.up.double() @ self.down.double())


Pairs = Mapping[str, Pair]


@cache
def base() -> State:
    """The weights of the small model."""
    return {name: tensor.clone() for name, tensor in random_model(small_spec()).state_dict().items()}


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        save_file({name: tensor.to(dtype) for name, tensor in base().items()}, path)
    return path


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)


def pairs(
    ranks: Mapping[str, int] | int = 4,
    alphas: Mapping[str, float] | float = 4.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    modules: tuple[str, ...] = MODULES,
) -> dict[str, Pair]:
    """Matrices for those modules of the small model."""
    found = {}
    for number, module in enumerate(modules):
        rank = ranks if isinstance(ranks, int) else ranks[module]
        alpha = alphas if isinstance(alphas, float) else alphas[module]
        out, columns = base()[f"{module}.weight"].shape
        one = seed * 1000 + 2 * number
        down, up = drawn((rank, columns), one, dtype), drawn((out, rank), one + 1, dtype)
        found[module] = Pair(down, up, alpha)
    return found


def in_diffusers(module: str) -> str:
    """Diffusers' name of a module."""
    block, number, rest = module.split(".", 2) if module.startswith("blocks.") else ("", "", module)
    return f"{block}.{number}.{DIFFUSERS[rest]}" if block else DIFFUSERS[rest]


def named(
    given: Pairs, before: str, down: str, up: str, call: Callable[[str], str] = lambda module: module
) -> State:
    """The matrices under the names `before` + module + `down` and `up`."""
    state = {}
    for module, pair in given.items():
        state[f"{before}{call(module)}.{down}"] = pair.down
        state[f"{before}{call(module)}.{up}"] = pair.up
    return state


def with_alphas(
    state: State, given: Pairs, before: str, call: Callable[[str], str] = lambda module: module
) -> State:
    alphas = {f"{before}{call(module)}.alpha": torch.tensor(pair.alpha) for module, pair in given.items()}
    return state | alphas


def flat(module: str) -> str:
    return module.replace(".", "_")


def peft_config(given: Pairs, call: Callable[[str], str] = lambda module: module) -> dict[str, object]:
    """PEFT's configuration: that of the first module, and patterns for those that differ."""
    first = next(iter(given.values()))
    return {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {call(m): p.rank for m, p in given.items() if p.rank != first.rank},
        "alpha_pattern": {call(m): p.alpha for m, p in given.items() if p.alpha != first.alpha},
        "use_rslora": False,
    }


def _safetensors(state: State, folder: Path, name: str, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name, metadata)
    return folder / name


Write = Callable[[Pairs, Path], Path]


def _peft(down: str, up: str, before: str = "base_model.model.") -> Write:
    def write(given: Pairs, folder: Path) -> Path:
        state = named(given, before, down, up)
        _safetensors(state, folder, "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(peft_config(given)))
        return folder

    return write


def _with_tensors(
    before: str, down: str, up: str, call: Callable[[str], str] = lambda module: module
) -> Write:
    def write(given: Pairs, folder: Path) -> Path:
        state = with_alphas(named(given, before, down, up, call), given, before, call)
        return _safetensors(state, folder, "style.safetensors")

    return write


def _diffusers(before: str) -> Write:
    def write(given: Pairs, folder: Path) -> Path:
        state = named(given, before, "lora_A.weight", "lora_B.weight", in_diffusers)
        config = {f"transformer.{key}": value for key, value in peft_config(given, in_diffusers).items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
        return _safetensors(state, folder, "pytorch_lora_weights.safetensors", metadata)

    return write


def _torch_file(given: Pairs, folder: Path) -> Path:
    state = named(given, "base_model.model.", "lora_A.weight", "lora_B.weight")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"generator_lora": state, "critic_lora": {}}, folder / "lora.pt")
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(given)))
    return folder / "lora.pt"


LAYOUTS: dict[str, Write] = {
    "PEFT": _peft("lora_A.weight", "lora_B.weight"),
    "PEFT, adapter default": _peft("lora_A.default.weight", "lora_B.default.weight"),
    "PEFT, adapter style": _peft("lora_A.style.weight", "lora_B.style.weight"),
    "PEFT, no .weight": _peft("lora_A.style", "lora_B.style"),
    "PEFT around a wrapper": _peft("lora_A.weight", "lora_B.weight", "base_model.model.model."),
    "diffusion-pipe": _peft("lora_A.weight", "lora_B.weight", "diffusion_model."),
    "bare, lora_A": _with_tensors("", "lora_A.weight", "lora_B.weight"),
    "bare, lora_down": _with_tensors("", "lora_down.weight", "lora_up.weight"),
    "diffusion_model, lora_A and alpha": _with_tensors(
        "diffusion_model.", "lora_A.weight", "lora_B.weight"
    ),
    "diffusion_model, lora_down": _with_tensors("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "model.diffusion_model": _with_tensors("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "no .weight": _with_tensors("diffusion_model.", "lora_A", "lora_B"),
    "kohya, musubi": _with_tensors("lora_unet_", "lora_down.weight", "lora_up.weight", flat),
    "kohya, names of diffusers": _with_tensors(
        "lora_unet_", "lora_down.weight", "lora_up.weight", lambda module: flat(in_diffusers(module))
    ),
    "LyCORIS": _with_tensors("lycoris_", "lora_down.weight", "lora_up.weight", flat),
    "diffusers": _diffusers("transformer."),
    "diffusers, bare": _diffusers(""),
    "ai-toolkit": _with_tensors("transformer.", "lora_A.weight", "lora_B.weight", in_diffusers),
    "diffusers once": _with_tensors("transformer.", "lora.down.weight", "lora.up.weight", in_diffusers),
    "attention processors": _with_tensors("transformer.", "lora_linear_layer.down.weight",
                                          "lora_linear_layer.up.weight", in_diffusers),
    "wrappers of training": _with_tensors("module.model._fsdp_wrapped_module._orig_mod.", "lora_A.weight",
                                          "lora_B.weight", lambda m: m.replace("attn.", "attn._fpw_module.")),
    "LongLive's .pt": _torch_file,
}  # fmt: skip
"""Layout -> what writes those matrices with their ranks and alphas, and says which file or folder to name."""


def merged_by_hand(given: Pairs, strength: float = 1.0, rest: State | None = None) -> State:
    """The weights with the matrices added, in float64."""
    weights = {name: tensor.double() for name, tensor in (rest or base()).items()}
    for module, pair in given.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + strength * pair.product
    return weights


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any weight."""
    assert set(found) == set(expected)
    gaps = (float((found[name].double() - expected[name].double()).abs().max()) for name in expected)
    return max(gaps, default=math.inf)


def plain_file(given: Pairs, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file that says no alpha, unless the metadata do."""
    state = named(given, "diffusion_model.", "lora_A.weight", "lora_B.weight")
    return _safetensors(state, path.parent, path.name, metadata)


def state_file(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file with those tensors."""
    return _safetensors(state, path.parent, path.name, metadata)


def at(path: Path, strength: float) -> Lora:
    return Lora(path, strength)
