"""What torch holds while it decodes or encodes, found by running it without contents.

On torch's meta device every operation is gone through and none is computed. Watching which results are still
held after each one gives what a real call has in memory, whatever the layers are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import begin_frame, finish_strip, strip_shapes
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.models.streaming import InPlace, StreamingModule
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.graph_records import STRIP
from forcingkv.runtime.spec import Geometry

Shapes = Mapping[str, Sequence[int]]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all results that are still held.

    Attributes:
        most: the most that there were at once. Of a convolution what it reads and gives counts twice: on a
            CPU and on a GPU it is laid out anew for the kernel, and back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self._now, self._held = 0, 0, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._now += storage.nbytes()
                self._held.add(storage._cdata)
                weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())
        laid_out = 0
        if func is torch.ops.aten.convolution.default:
            laid_out = sum(tensor.untyped_storage().nbytes() for tensor in _tensors((args[0], made)))
        self.most = max(self.most, self._now + laid_out)
        return made

    def own(self, tensors: Any) -> None:
        """Those are there anyway, and do not count."""
        self._held.update(tensor.untyped_storage()._cdata for tensor in _tensors(tensors))

    def _let_go(self, number: int, size: int) -> None:
        self._held.discard(number)
        self._now -= size


def streaming_bytes(
    geometry: Geometry,
    decoder: StreamingDecoder | None,
    encoder: StreamingEncoder | None = None,
    strips: Strips | None = None,
) -> dict[str, int]:
    """By graph, the bytes that a call of decoding or encoding in float32 holds at most beside weights and
    what goes in; what it gives counts. Nothing for a model whose latents are pixels."""
    found = _decoding(decoder, geometry, strips) if decoder else {}
    return found | ({"encode": _encoding(encoder, geometry)} if encoder else {})


def _decoding(decoder: StreamingDecoder, geometry: Geometry, strips: Strips | None) -> dict[str, int]:
    height, width = geometry.latent_height, geometry.latent_width
    latents, first = _empty(1, decoder.latent_channels, 1, height, width), _empty(1)
    if strips is None:
        state = _all_empty(decoder.state_shapes(height, width))
        return {"decode": _most(decoder, decoder.forward, latents, first, state)}
    shapes = strip_shapes(decoder, strips, height, width)
    whole, carried = _all_empty(shapes.whole), _all_empty(shapes.state | shapes.edges)
    features, rows = _empty(strips.rows, *shapes.features[1:]), geometry.height

    def begin(*given: Any) -> Any:
        return begin_frame(decoder, *given)

    def finish(*given: Any) -> Any:
        return finish_strip(decoder, strips, rows, *given)

    return {
        "decode": _most(decoder, begin, latents, first, whole),
        STRIP: _most(decoder, finish, features, first, first, carried),
    }


def _encoding(encoder: StreamingEncoder, geometry: Geometry) -> int:
    height, width = geometry.latent_height, geometry.latent_width
    size = height * encoder.spatial_stride, width * encoder.spatial_stride
    pixels, state = _empty(1, 3, encoder.temporal_stride, *size), encoder.state_shapes(height, width)
    return _most(encoder, encoder.forward, pixels, _empty(1), _all_empty(state))


class _Called(nn.Module):
    """A module with a call of its own choice, for `functional_call`."""

    def __init__(self, module: StreamingModule, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, *given: Any) -> Any:
        return self._call(*given)


def _most(module: StreamingModule, call: Callable[..., Any], *given: Any) -> int:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {f"module.{name}": torch.empty_like(t, device="meta") for name, t in tensors.items()}
    memory = LiveMemory()
    memory.own((weights, [dict(one) if isinstance(one, InPlace) else one for one in given]))
    with torch.no_grad(), memory:
        torch.func.functional_call(_Called(module, call), weights, given)
    return memory.most


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _all_empty(shapes: Shapes) -> InPlace:
    """Caches as sessions hold them."""
    return InPlace({name: _empty(*shape) for name, shape in shapes.items()})


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
