"""The causal Wan transformer, functional in its caches (`docs/method.md`, "The transformer").

One class serves every model and every use: what analysis records, what export traces and what the
parity tests compare. It holds no cache. How the queries of a layer meet keys is given from outside
as an `Attend`, so full, windowed, pruned, masked and recorded attention are all the same forward.
Parameter names are those of the public Wan checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.runtime.spec import ModelSpec


class KeysValues(NamedTuple):
    """Keys (after RoPE) and values of some heads: each (batch, heads, tokens, head_dim)."""

    keys: Tensor
    values: Tensor


Attend: TypeAlias = Callable[[int, Tensor, KeysValues], Tensor]
"""(layer, queries, keys and values of the current tokens) -> (batch, heads, tokens, head_dim)."""


def attend_current(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
    """Attention among the current tokens alone: no cache, no mask."""
    return F.scaled_dot_product_attention(queries, current.keys, current.values)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (batch, heads, tokens, head_dim) by angles (tokens, head_dim / 2).

    While a graph is traced this is one operator, RotaryEmbedding, which engines have a kernel for.
    """
    if torch.compiler.is_exporting():
        tables = (table.expand(len(x), -1, -1) for table in (cosines, sines))
        return torch.onnx.ops.rotary_embedding(x, *tables, interleaved=True)
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1).flatten(-2)


class RMSNorm(nn.Module):
    """RMS normalisation over the whole width (not per head), in and to float32 whatever x is."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon)


class SelfAttention(nn.Module):
    """Attention of the video to itself; `attend` decides which keys a query meets."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q, self.k, self.v, self.o = (nn.Linear(spec.dim, spec.dim) for _ in range(4))
        self.norm_q = RMSNorm(spec.dim, spec.epsilon)
        self.norm_k = RMSNorm(spec.dim, spec.epsilon)

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> (batch, heads, tokens, head_dim)."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`, then the output projection."""
        out: Tensor = self.o(x.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, KeysValues]:
        """The queries of all heads, and keys and values; what is attended to goes through `merge`."""
        # Normalised and rotated in float32, then attended to in the model's dtype.
        queries = rotate(self.split(self.norm_q(self.q(x))), *rotary).to(x)
        keys = rotate(self.split(self.norm_k(self.k(x))), *rotary).to(x)
        return queries, KeysValues(keys, self.split(self.v(x)))


class CrossAttention(SelfAttention):
    """Attention to the prompt; its keys and values depend on the prompt alone."""

    def project(self, text: Tensor) -> KeysValues:
        return KeysValues(self.split(self.norm_k(self.k(text)).to(text)), self.split(self.v(text)))

    def forward(self, x: Tensor, prompt: KeysValues) -> Tensor:  # type: ignore[override]
        queries = self.split(self.norm_q(self.q(x)).to(x))
        return self.merge(F.scaled_dot_product_attention(queries, prompt.keys, prompt.values))


class Block(nn.Module):
    """One layer: self-attention, attention to the prompt, feed-forward, each modulated by the timestep."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.self_attn = SelfAttention(spec)
        self.cross_attn = CrossAttention(spec)
        self.norm3 = nn.LayerNorm(spec.dim, eps=spec.epsilon)
        self.ffn = nn.Sequential(
            nn.Linear(spec.dim, spec.ffn_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(spec.ffn_width, spec.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, spec.dim) / spec.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        prompt: KeysValues,
        layer: int,
        attend: Attend,
    ) -> Tensor:
        parts = (time + self.modulation.float()).to(x).split(1, -2)
        attended = attend(layer, *self.before_attention(x, parts, rotary))
        return self.after_attention(x, parts, attended, prompt)

    def before_attention(
        self, x: Tensor, parts: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, KeysValues]:
        """Queries, keys and values of the current tokens. Of one shape in every chunk, as what follows
        attention is: a backend may compile both."""
        shift, gain = parts[:2]
        queries, current = self.self_attn(modulate(normed(x, self.epsilon), shift, gain), rotary)
        return queries, current

    def after_attention(
        self, x: Tensor, parts: Sequence[Tensor], attended: Tensor, prompt: KeysValues
    ) -> Tensor:
        """The rest of the block, from what the heads attended to."""
        gate1, shift, gain, gate2 = parts[2:]
        x = x + gated(self.self_attn.merge(attended), gate1)
        x = x + self.cross_attn(self.norm3(x), prompt)
        return x + gated(self.ffn(modulate(normed(x, self.epsilon), shift, gain)), gate2)


class Head(nn.Module):
    """Tokens to the pixels of their patch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.head = nn.Linear(spec.dim, spec.patch**2 * spec.latent_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, spec.dim) / spec.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (time.unsqueeze(-2).float() + self.modulation.float()).to(x).split(1, -2)
        out: Tensor = self.head(modulate(normed(x, self.epsilon), shift, 1 + scale))
        return out


def normed(x: Tensor, epsilon: float) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def modulate(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    """x (batch, tokens, dim) times a gain, which is 1 + the published scale, and shifted.

    Shift and gain are (batch, 1, dim) where all tokens have one timestep, or (batch, chunks, 1, dim).
    """
    return _merged(_per_chunk(x, gain) * gain + shift)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x (batch, tokens, dim) times a gate shaped as in `modulate`."""
    return _merged(_per_chunk(x, gate) * gate)


def _per_chunk(x: Tensor, like: Tensor) -> Tensor:
    """(batch, chunks, tokens a chunk, dim) where `like` has chunks."""
    return x if like.dim() == 3 else torch.unflatten(x, 1, (like.shape[1], -1))


def _merged(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.flatten(1, 2)


class PatchEmbedding(nn.Module):
    """The convolution (1, patch, patch) of Wan, as the matrix product it is."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.weight = nn.Parameter(torch.empty(spec.dim, spec.latent_channels, 1, spec.patch, spec.patch))
        self.bias = nn.Parameter(torch.zeros(spec.dim))
        nn.init.xavier_uniform_(self.weight.view(spec.dim, -1))

    def forward(self, latents: Tensor) -> Tensor:
        batch, channels, frames, height, width = latents.shape
        p = self.patch
        x = latents.reshape(batch, channels, frames, height // p, p, width // p, p)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(x, self.weight.flatten(1), self.bias)


class WanModel(nn.Module):
    """A causal Wan transformer of any size: see `forward`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embedding = PatchEmbedding(spec)
        if spec.position_table:
            tokens = spec.geometry().frame_tokens
            self.position_embedding = nn.Parameter(torch.randn(1, tokens, spec.dim) * 0.2)
        self.text_embedding = nn.Sequential(
            nn.Linear(spec.text_width, spec.dim), nn.GELU(approximate="tanh"), nn.Linear(spec.dim, spec.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(spec.time_width, spec.dim), nn.SiLU(), nn.Linear(spec.dim, spec.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(spec.dim, 6 * spec.dim))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.head = Head(spec)

    def prompt(self, text: Tensor) -> list[KeysValues]:
        """Cross-attention keys and values of each layer for text (batch, text_length, text_width)."""
        embedded = self.text_embedding(text)
        return [_cross(block).project(embedded) for block in self.blocks]

    def keep_prompt_part(self) -> None:
        """Drop every parameter that `prompt` does not use."""
        del self.patch_embedding, self.time_embedding, self.time_projection, self.head
        for block in self.blocks:
            attention = _cross(block)
            del block.self_attn, block.ffn, block.norm3, block.modulation
            del attention.q, attention.o, attention.norm_q

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        prompt: Sequence[KeysValues],
        attend: Attend = attend_current,
    ) -> tuple[Tensor, list[KeysValues]]:
        """One pass: the predicted flow (see `flow`), and each layer's new keys and values."""
        new: list[KeysValues] = []

        def kept(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            new.append(current)
            return attend(layer, queries, current)

        return self.flow(latents, time, rotary, prompt, kept), new

    def flow(
        self,
        latents: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        prompt: Sequence[KeysValues],
        attend: Attend,
    ) -> Tensor:
        """One pass, of which nothing is kept: `attend` is given each layer's keys and values.

        Args:
            latents: (batch, latent_channels, frames, height, width).
            time: time features (batch, chunks, time_width), chunks dividing frames; one timestep a
                chunk. From `forcingkv.runtime.positions.time_features`.
            rotary: cosines and sines (tokens, head_dim / 2). From `positions.rotary`.
            prompt: what `prompt()` gave.
            attend: how each layer's queries meet keys; called once a layer, in their order.

        Returns the predicted flow, shaped as latents.
        """
        x = self.patch_embedding(latents)
        if self.spec.position_table:
            x = x + self.position_embedding.repeat(1, latents.shape[2], 1)
        if time.shape[1] == 1:
            time = time.squeeze(1)  # what all tokens share needs no dimension of chunks
        embedded = self.time_embedding(time)
        # Shift, scale, gate of attention and of the feed-forward, in float32. Of every 1 + scale the 1 is
        # added here, once.
        modulation = self.time_projection(embedded).unflatten(-1, (6, -1)).float()
        gains = torch.arange(6, device=time.device).remainder(3).eq(1)
        modulation = modulation + gains.to(modulation).unsqueeze(-1)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, rotary, prompt[layer], layer, attend)
        return self._unpatchify(self.head(x, embedded), latents.shape)

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        batch, channels, frames, height, width = shape
        p = self.spec.patch
        x = tokens.reshape(batch, frames, height // p, width // p, p, p, channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)


def _cross(block: nn.Module) -> CrossAttention:
    attention = block.cross_attn
    assert isinstance(attention, CrossAttention)
    return attention
