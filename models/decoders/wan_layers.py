"""The layers that Wan's decoders and encoders are made of, as they run in a stream: diffusers' modules and
weights, our own way through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.models.decoders.rows import Rows
from forcingkv.models.streaming import kept

MOST_SCORES, PART_SCORES = 1 << 26, 1 << 24
"""Numbers of attention's scores of a frame that are computed at once, as those of 480p are, and of a part if
there are more. Of few large parts TensorRT computes all side by side: 0.95 GB at 720p, where 0.17 will do."""
PAST = 2
"""Frames that a temporal kernel of 3 looks back."""


class Call:
    """What one call carries through the layers: x is (1, channels, frames, height, width) throughout.

    Attributes:
        rows: which of the frame's rows there are.
        blank: leading frames that are blank if this is a video's first call.
        following: the caches for the next call.
    """

    def __init__(
        self,
        first: Tensor,
        state: Mapping[str, Tensor],
        rows: Rows | None = None,
        *,
        begun: int = 0,
        blank: int = 0,
    ) -> None:
        """`begun` caches are those of layers before the first one."""
        self.first, self.state, self._begun = first, state, begun
        self.rows, self.blank = rows or Rows(), blank
        self.following: dict[str, Tensor] = {}

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        return normed(norm, x, self.rows.inside(x))

    def conv(self, conv: Any, x: Tensor, unseen: int | None = None) -> Tensor:
        """A causal convolution, for which the first `unseen` frames of a first call are zeros."""
        unseen = self.blank if unseen is None else unseen
        name = f"feature.{self._begun + len(self.following)}"
        head, rest = x[:, :, :unseen] * (1 - self.first), x[:, :, unseen:]
        frames = torch.cat([part for part in (self.state[name], head, rest) if part.shape[2]], 2)
        self.following[name] = kept(self.state, name, frames[:, :, -PAST:])
        # Not conv(frames): that pads in a step of its own, one more copy of the features.
        height, width = conv.kernel_size[1:]
        frames, padded = self.rows.above(frames, height)
        return F.conv3d(frames, conv.weight, conv.bias, padding=(0, padded, width // 2))

    def stage(self, stage: Any, x: Tensor) -> Tensor:
        """Residual blocks, then twice the height and width, and in most stages twice the frames."""
        entering, lag = x, self.rows.lag
        for block in stage.resnets:
            x = self.residual(block, x)
        for upsampler in upsamplers(stage):
            x = self.upsample(upsampler, x)
        # Of Wan 2.2. The public decoder leaves out the first frames of the shortcut in a video's first call:
        # they are those that are blank here, so that what is not blank falls on the same frames.
        shortcut = getattr(stage, "avg_shortcut", None)
        if shortcut is None:
            return x
        return x + self.rows.later(_enlarged(shortcut, entering), lag * shortcut.factor_s)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        lag = self.rows.lag
        out = self.conv(block.conv1, block.nonlinearity(self.normed(block.norm1, x)))
        out = self.conv(block.conv2, block.nonlinearity(self.normed(block.norm2, out)))
        x, shortcut = self.rows.later(x, lag), block.conv_shortcut
        return out + (x if isinstance(shortcut, nn.Identity) else pointwise(shortcut, x))

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        frames = self.double(layer.time_conv, x) if layer.mode == "upsample3d" else x[0].transpose(0, 1)
        inside = self.rows.inside(frames)
        frames = frames if inside is None else frames * inside
        # With a factor of 2 this is the same as the layer's own mode, nearest-exact.
        wide = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        self.rows.enlarged(2)
        conv = layer.resample[1]
        wide, padded = self.rows.above(wide, conv.kernel_size[0])
        resampled = F.conv2d(wide, conv.weight, conv.bias, padding=(padded, conv.padding[1]))
        return resampled.transpose(0, 1)[None]

    def double(self, time_conv: Any, x: Tensor) -> Tensor:
        """Two frames of each: (2 * frames, channels, height, width).

        A video's first frame goes on as it is, and the convolution never sees it.
        """
        _, channels, count, height, width = x.shape
        opening, until = self.blank, self.blank + 1
        pairs = self.conv(time_conv, x, unseen=until).reshape(2, channels, count, height, width)
        frames = pairs.permute(2, 0, 1, 3, 4).reshape(2 * count, channels, height, width)
        last = 2 * until - 1
        kept = torch.where(self.first > 0.5, x[:, :, opening], frames[last : last + 1])
        parts = (frames[:last], kept, frames[last + 1 :])
        self.blank = last
        return torch.cat([part for part in parts if part.shape[0]])


def upsamplers(stage: Any) -> Sequence[Any]:
    """None or one."""
    if hasattr(stage, "upsampler"):  # of Wan 2.2
        return () if stage.upsampler is None else (stage.upsampler,)
    return tuple(stage.upsamplers or ())


def _enlarged(shortcut: Any, x: Tensor) -> Tensor:
    """diffusers' shortcut without weights: channels, repeated or not, become the frames, rows and columns of
    what each frame and pixel turns into."""
    _, channels, count, height, width = x.shape
    frames, side = shortcut.factor_t, shortcut.factor_s
    # One dimension fewer than diffusers has: TensorRT takes 8 at most.
    each = x[0, :, None].expand(channels, shortcut.repeats, count, height, width)
    spread = each.reshape(shortcut.out_channels, frames, side, side, count, height, width)
    return spread.permute(0, 4, 1, 5, 2, 6, 3).reshape(1, -1, count * frames, height * side, width * side)


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """diffusers' pointwise convolution, without its cache."""
    out: Tensor = F.conv3d(x, conv.weight, conv.bias)
    return out


def normed(norm: Any, x: Tensor, inside: Tensor | None = None) -> Tensor:
    """diffusers' RMS norm over the channels, in two passes over the features instead of five.

    The length is float32 whatever the features are. `inside` (rows, 1) is 0 for rows that become zeros.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    gain = norm.scale * norm.gamma.view(-1, *[1] * (x.dim() - 2))
    gain = gain if inside is None else gain * inside
    out: Tensor = x / length.clamp_min(1e-12).to(x.dtype) * gain
    return out


def attend(block: Any, x: Tensor) -> Tensor:
    """diffusers' attention block, within each frame.

    One frame at a time, and of a large one some queries at a time, since the scores are the square of a
    frame's pixels: 4 GB at 1080p. They are written out because the one head is wider than fused attention
    takes.
    """
    return torch.cat([_attend_frame(block, frame) for frame in x.split(1, 2)], 2)


def _attend_frame(block: Any, frame: Tensor) -> Tensor:
    x = frame[:, :, 0]
    query, key, value = block.to_qkv(normed(block.norm, x)).flatten(2).chunk(3, 1)
    queries, tokens = (query * query.shape[1] ** -0.5).transpose(1, 2), key.shape[2]
    parts = math.ceil(tokens**2 / PART_SCORES) if tokens**2 > MOST_SCORES else 1
    attended = [
        (part @ key).softmax(-1) @ value.transpose(1, 2) for part in queries.split(-(-tokens // parts), 1)
    ]
    seen = torch.cat(attended, 1) if parts > 1 else attended[0]
    out: Tensor = x + block.proj(seen.transpose(1, 2).reshape(x.shape))
    return out[:, :, None]
