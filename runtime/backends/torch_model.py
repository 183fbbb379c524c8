"""The weights of a bundle in torch: the model and its decoder, as they are stored, on a device.

A matrix lies in bundles as (in, out), the way it multiplies; here it is a view of the file where it can be,
and stays in the dtype that it is stored in: what a layer computes in is made of it as it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.baked_names import EXACT, is_matrix, scale_name
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import strip_shapes, strips_of
from forcingkv.models.encoders import StreamingEncoder, stored_encoder
from forcingkv.models.heads import permute_heads
from forcingkv.models.wan import Block, WanModel
from forcingkv.runtime.backends.torch_device import faults, multiplies_in, torch_dtype, wait_for
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.graph_records import DECODING_GRAPHS
from forcingkv.runtime.spec import ModelSpec

try:
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise MissingExtraError("safetensors", "models") from error


class StoredLinear(nn.Linear):
    """A linear layer whose weights stay as they are stored, and that multiplies in a dtype of its own."""

    products: torch.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        kind = self.products
        bias = None if self.bias is None else self.bias.to(kind)
        return F.linear(x.to(kind), self.weight.to(kind), bias).to(x.dtype)


@dataclass(frozen=True)
class Loaded:
    """What lanes on the same weights share."""

    model: WanModel
    decoder: StreamingDecoder | None
    device: torch.device
    compute: torch.dtype
    decodes_in: torch.dtype
    """What the decoder and the encoder compute in: on a CPU float32, since convolutions gain nothing from
    less there."""
    threads: int | None
    """With which a CPU computes, whichever thread asks; None: it is no CPU."""
    encoder: StreamingEncoder | None = None


def load(bundle: Bundle, device: torch.device, *, threads: int | None, compiled: bool) -> Loaded:
    """The model of a bundle; `threads` are those of a CPU.

    Raises InputError where its weights are not those of its model, or in a form that torch does not run;
    MemoryShortError where the device has no room for them.
    """
    manifest, spec = bundle.manifest, bundle.plan.spec
    compute = torch_dtype(manifest.compute)
    with faults("loading the weights"):
        model = _model(spec, _file_of(bundle, "step"), device, compute)
        if compiled:
            compile_blocks(model)
        decodes_in = torch.float32 if device.type == "cpu" else compute
        decoder = None
        if spec.decoder.kind != "pixels":
            path = _file_of(bundle, "decode")
            decoder = _decoder(spec, path, device, decodes_in)
            _check_decoder(bundle, decoder, path)
        encoder = None
        if "encode" in manifest.graphs:
            path = _file_of(bundle, "encode")
            encoder = stored_encoder(_read(path, device, decodes_in), str(path))
            _last_channels(encoder, device)
            geometry = bundle.plan.geometry
            made = encoder.state_shapes(geometry.latent_height, geometry.latent_width)
            _check_carried(bundle, ["encode"], made, path)
    # What was copied and turned is in a queue that those of lanes do not wait for.
    wait_for(device)
    return Loaded(model, decoder, device, compute, decodes_in, threads, encoder)


def with_heads(loaded: Loaded, orders: Sequence[Sequence[int]]) -> Loaded:
    """The same weights with the heads of each layer in another order: those of self-attention are copied, all
    others are shared. `orders` has for each layer the present place of the head at each new place."""
    old = loaded.model
    model = _empty(old.spec, multiplies_in(loaded.device, loaded.compute))
    model.load_state_dict(permute_heads(old.state_dict(), old.spec, orders), assign=True)
    return replace(loaded, model=model.eval().requires_grad_(False))


def _file_of(bundle: Bundle, graph: str) -> Path:
    path = bundle.weights(graph)
    if path is None:
        raise InputError(
            f"has no weights of {graph}",
            where=str(bundle.path),
            hint="Export it again, or do not trust it (docs/security.md).",
        )
    return path


def _check_decoder(bundle: Bundle, decoder: StreamingDecoder, path: Path) -> None:
    """Raise InputError unless a decoder decodes frames in the strips, and carries from call to call, what the
    manifest says."""
    geometry, manifest = bundle.plan.geometry, bundle.manifest
    size = geometry.latent_height, geometry.latent_width
    if manifest.strips is None:
        _check_carried(bundle, ["decode"], decoder.state_shapes(*size), path)
        return
    if strips_of(decoder, geometry, manifest.strips.count) != manifest.strips:
        what = f"does not decode in {manifest.strips.count} strips of {manifest.strips.rows} rows"
        hint = "Export the bundle again with this version of forcingkv."
        raise InputError(what, where=str(path), expected="as the manifest says", hint=hint)
    shapes = strip_shapes(decoder, manifest.strips, *size)
    _check_carried(bundle, DECODING_GRAPHS, {**shapes.whole, **shapes.state, **shapes.edges}, path)


def _check_carried(
    bundle: Bundle, graphs: Sequence[str], made: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Raise InputError unless what graphs carry from call to call has the shapes `made`, as the manifest
    says."""
    found: dict[str, tuple[int, ...]] = {}
    for graph in graphs:
        found |= {name: record.shape for name, record in bundle.manifest.graphs[graph].carried.items()}
    if wrong := sorted(name for name in {**made, **found} if made.get(name) != found.get(name)):
        raise InputError(
            f"carries {wrong[0]} of the shape {made.get(wrong[0])} from call to call",
            where=str(path),
            expected=f"{found.get(wrong[0])}, as the manifest says",
            hint="Export the bundle again with this version of forcingkv.",
        )


def compile_blocks(model: WanModel) -> None:
    """Compile what surrounds attention in a block: of one shape in all layers, phases and chunks, so it is
    compiled once, when it first runs. Attention itself is a kernel already."""
    for block in model.blocks:
        assert isinstance(block, Block)
        for name in ("before_attention", "after_attention"):
            setattr(block, name, torch.compile(getattr(block, name), dynamic=False))


def _model(spec: ModelSpec, path: Path, device: torch.device, compute: torch.dtype) -> WanModel:
    shapes, products = weight_shapes(spec), multiplies_in(device, compute)
    model = _empty(spec, products)
    linears = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    stored = _Stored(path, device)
    stored.check({name: _as_stored(name, shape) for name, shape in shapes.items()}, spec.name)

    def placed(name: str) -> Tensor:
        tensor, of = stored.read(name), name.rpartition(".")[0]
        if is_matrix(name, shapes[name]):
            # A view of the file where that multiplies as well as any; else each product would turn it anew.
            as_it_lies = tensor.dtype == torch.float32 or products != tensor.dtype
            tensor = tensor.t() if as_it_lies else tensor.t().contiguous()
        if of in linears:
            return tensor
        return tensor.to(torch.float32 if name.endswith(EXACT) else compute)

    model.load_state_dict({name: placed(name) for name in shapes}, assign=True)
    return model.eval().requires_grad_(False)


def _empty(spec: ModelSpec, products: torch.dtype) -> WanModel:
    """A model without weights yet, whose linear layers multiply in a dtype of their own."""
    with torch.device("meta"):
        model = WanModel(spec)
    _store_linears(model, products)
    return model


def _store_linears(module: nn.Module, products: torch.dtype) -> None:
    """Put a `StoredLinear` in the place of every linear layer, of no contents yet."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            with torch.device("meta"):
                linear = StoredLinear(child.in_features, child.out_features, child.bias is not None)
            linear.products = products
            setattr(module, name, linear)
        else:
            _store_linears(child, products)


def _as_stored(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if is_matrix(name, shape) else shape


class _Stored:
    """A safetensors file of a bundle, whose digest was checked."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        # Pages of the file are read as they are needed; a GPU gets each tensor for itself.
        try:
            self._file: Any = safe_open(path, "pt", device=str(device) if device.type != "mps" else "cpu")
        except SafetensorError as error:
            raise self._unreadable(error) from error
        self._device = device

    def _unreadable(self, error: Exception) -> InputError:
        text = f"cannot be read as tensors ({' '.join(str(error).split())})"
        return InputError(text, where=str(self._path), hint="Export the bundle again.")

    def check(self, wanted: Mapping[str, tuple[int, ...]], model: str) -> None:
        """Raise InputError unless it holds exactly tensors of those shapes, in floats."""
        names = set(self._file.keys())
        scaled = sorted(scale_name(name) for name in wanted if scale_name(name) in names)
        if scaled:
            raise InputError(
                f"holds linear layers in 8 bits ({scaled[0]})",
                where=str(self._path),
                expected="weights in float32, bfloat16 or float16",
                hint="For --backend torch export the model with another --dtype.",
            )
        found = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        wrong = sorted(name for name in names | set(wanted) if found.get(name) != wanted.get(name))
        if wrong:
            name = wrong[0]
            shape = f"has {name} of the shape {found[name]}" if name in found else f"has no {name}"
            raise InputError(
                f"is not the weights of {model}: it {shape}",
                where=str(self._path),
                expected=f"the shape {wanted[name]}" if name in wanted else "no tensor of that name",
                hint="Export the bundle again with this version of forcingkv.",
            )

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the device."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:  # a dtype that torch has not
            raise self._unreadable(error) from error
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            expected = "float32, bfloat16 or float16"
            raise InputError(f"holds {name} in {tensor.dtype}", where=str(self._path), expected=expected)
        return tensor.to(self._device)

    def all(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {name: self.read(name) for name in self._file.keys()}  # noqa: SIM118


def _decoder(spec: ModelSpec, path: Path, device: torch.device, compute: torch.dtype) -> StreamingDecoder:
    from forcingkv.models.decoders import stored_decoder

    decoder = stored_decoder(spec.decoder.kind, _read(path, device, compute), str(path))
    _last_channels(decoder, device)
    return decoder


def _read(path: Path, device: torch.device, compute: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(compute) for name, tensor in _Stored(path, device).all().items()}


def _last_channels(module: nn.Module, device: torch.device) -> None:
    """On a GPU channels lie last in what a module has of 4 dimensions: kernels of convolutions."""
    if device.type in ("cuda", "xpu"):
        moved: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert moved is module
