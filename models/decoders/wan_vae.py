"""The decoder of Wan 2.1's VAE as a stream: diffusers' layers and weights, our own way through them.

The public decoder treats a video's first latent frame differently: it becomes one pixel frame, not four, and
no temporal upsampling ever looks back at it. Here every call doubles time alike, so that one static
graph serves all of them. In a first call the first of each doubled pair is **blank**: after k
doublings 2**k - 1 leading frames are. What a convolution computes for them is of no account, but it
must read zeros there, as it reads before the start of a video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import read_json
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.names import check_tensors, is_decoder, without_prefix
from forcingkv.models.decoders.rows import Rows
from forcingkv.models.tensor_files import open_tensors

MOST_SIZE, MOST_BLOCKS = 1 << 14, 64
"""Of a number in a configuration, and of layers or entries of a list."""
MOST_SCORES, PART_SCORES = 1 << 26, 1 << 24
"""Numbers of attention's scores of a frame that are computed at once, as those of 480p are, and of a part if
there are more. Of few large parts TensorRT computes all side by side: 0.95 GB at 720p, where 0.17 will do."""
BEGUN = 1
"""Stages behind the attention that the part of the decoder has which sees whole frames. With it are 6% of
the caches; those of the next stage would make it 19%, and without any the strips would be later."""
PAST = 2
"""Frames that a temporal kernel of 3 looks back."""
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
WAN_VAE = "Wan2.1_VAE.pth"
NAME = AutoencoderKLWan.__name__
WAN_NAMES = ("decoder.middle.", "decoder.upsamples.")
"""How names start that only files in Wan's own naming have."""


class WanVaeDecoder(StreamingDecoder):
    """The decoder half of an `AutoencoderKLWan`. Caches: the last two frames each convolution read.

    Args:
        vae: an autoencoder of Wan 2.1's kind; its decoder's modules are taken over, not copied.
            None: Wan 2.1's own, with weights drawn at random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan | None = None) -> None:
        super().__init__()
        vae = vae or AutoencoderKLWan()
        config = vae.config
        self.latent_channels = config.z_dim
        self.temporal_stride = 2 ** sum(config.temperal_downsample)
        self.spatial_stride = 2 ** (len(config.dim_mult) - 1)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        # In the state dict too: an export takes everything with contents from there.
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1))

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        shapes = [
            (1, conv.in_channels, PAST, height * scale, width * scale) for conv, scale in self._causal_convs()
        ]
        return {f"feature.{number}": shape for number, shape in enumerate(shapes)}

    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features, following = self.begin(latents, first, state)
        pixels, later = self.finish(features, first, state, Rows())
        return pixels, following | later

    def begin(
        self, latents: Tensor, first: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        call, decoder = _Call(first, state), self.decoder
        x = call.conv(decoder.conv_in, _pointwise(self.post_quant_conv, latents * self.std + self.mean))
        x = call.residual(decoder.mid_block.resnets[0], x)
        for attention, block in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            x = call.residual(block, _attend(attention, x))
        for stage in decoder.up_blocks[:BEGUN]:
            x = call.stage(stage, x)
        return x, call.following

    def finish(
        self, features: Tensor, first: Tensor, state: Mapping[str, Tensor], rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        doubled = sum(up.mode == "upsample3d" for s in self.decoder.up_blocks[:BEGUN] for up in s.upsamplers)
        call = _Call(first, state, rows, begun=self.begun, blank=2**doubled - 1)
        decoder, x = self.decoder, features
        for stage in decoder.up_blocks[BEGUN:]:
            x = call.stage(stage, x)
        x = call.conv(decoder.conv_out, decoder.nonlinearity(call.normed(decoder.norm_out, x)))
        return x.clamp(-1, 1), call.following

    @property
    def begun(self) -> int:
        blocks = [self.decoder.mid_block, *self.decoder.up_blocks[:BEGUN]]
        doubling = sum(up.mode == "upsample3d" for s in blocks[1:] for up in s.upsamplers or ())
        convs: int = 1 + sum(2 * len(block.resnets) for block in blocks) + doubling
        return convs

    def _causal_convs(self) -> Iterator[tuple[nn.Conv3d, int]]:
        """The convolutions with a cache in the order of the forward, and how much wider than latents."""
        decoder, scale = self.decoder, 1
        yield decoder.conv_in, scale
        for block in decoder.mid_block.resnets:
            yield from ((block.conv1, scale), (block.conv2, scale))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                yield from ((block.conv1, scale), (block.conv2, scale))
            for upsampler in stage.upsamplers or ():
                if upsampler.mode == "upsample3d":
                    yield upsampler.time_conv, scale
                scale *= 2
        yield decoder.conv_out, scale


class _Call:
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

    def stage(self, stage: Any, x: Tensor) -> Tensor:
        for block in stage.resnets:
            x = self.residual(block, x)
        for upsampler in stage.upsamplers or ():
            x = self.upsample(upsampler, x)
        return x

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        return _normed(norm, x, self.rows.inside(x))

    def conv(self, conv: Any, x: Tensor, unseen: int | None = None) -> Tensor:
        """A causal convolution, for which the first `unseen` frames of a first call are zeros."""
        unseen = self.blank if unseen is None else unseen
        name = f"feature.{self._begun + len(self.following)}"
        head, rest = x[:, :, :unseen] * (1 - self.first), x[:, :, unseen:]
        frames = torch.cat([part for part in (self.state[name], head, rest) if part.shape[2]], 2)
        self.following[name] = frames[:, :, -PAST:].clone()
        # Not conv(frames): that pads in a step of its own, one more copy of the features.
        height, width = conv.kernel_size[1:]
        frames, padded = self.rows.above(frames, height)
        return F.conv3d(frames, conv.weight, conv.bias, padding=(0, padded, width // 2))

    def residual(self, block: Any, x: Tensor) -> Tensor:
        lag = self.rows.lag
        out = self.conv(block.conv1, block.nonlinearity(self.normed(block.norm1, x)))
        out = self.conv(block.conv2, block.nonlinearity(self.normed(block.norm2, out)))
        x, shortcut = self.rows.later(x, lag), block.conv_shortcut
        return out + (x if isinstance(shortcut, nn.Identity) else _pointwise(shortcut, x))

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        frames = self.double(layer.time_conv, x) if layer.mode == "upsample3d" else x[0].transpose(0, 1)
        inside = self.rows.inside(frames)
        frames = frames if inside is None else frames * inside
        # With a factor of 2 this is the same as the layer's own mode, nearest-exact.
        wide = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        self.rows.doubled()
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


def _pointwise(conv: Any, x: Tensor) -> Tensor:
    out: Tensor = F.conv3d(x, conv.weight, conv.bias)
    return out


def _normed(norm: Any, x: Tensor, inside: Tensor | None = None) -> Tensor:
    """diffusers' RMS norm over the channels, in two passes over the features instead of five.

    The length is float32 whatever the features are. `inside` (rows, 1) is 0 for rows that become zeros.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    gain = norm.scale * norm.gamma.view(-1, *[1] * (x.dim() - 2))
    gain = gain if inside is None else gain * inside
    out: Tensor = x / length.clamp_min(1e-12).to(x.dtype) * gain
    return out


def _attend(block: Any, x: Tensor) -> Tensor:
    """diffusers' attention block, within each frame.

    One frame at a time, and of a large one some queries at a time, since the scores are the square of a
    frame's pixels: 4 GB at 1080p. They are written out because the one head is wider than fused attention
    takes.
    """
    return torch.cat([_attend_frame(block, frame) for frame in x.split(1, 2)], 2)


def _attend_frame(block: Any, frame: Tensor) -> Tensor:
    x = frame[:, :, 0]
    query, key, value = block.to_qkv(_normed(block.norm, x)).flatten(2).chunk(3, 1)
    queries, tokens = (query * query.shape[1] ** -0.5).transpose(1, 2), key.shape[2]
    parts = math.ceil(tokens**2 / PART_SCORES) if tokens**2 > MOST_SCORES else 1
    attended = [
        (part @ key).softmax(-1) @ value.transpose(1, 2) for part in queries.split(-(-tokens // parts), 1)
    ]
    seen = torch.cat(attended, 1) if parts > 1 else attended[0]
    out: Tensor = x + block.proj(seen.transpose(1, 2).reshape(x.shape))
    return out[:, :, None]


def load_wan_vae(path: Path, config: Mapping[str, Any] | None = None) -> WanVaeDecoder:
    """Read a VAE; the encoder in it is checked and left aside.

    Args:
        path: a diffusers folder, or one with the subfolder `vae`: config and weights. Or Wan's folder, with
            `Wan2.1_VAE.pth`. Or one file, in the naming of diffusers or of Wan, which its names tell.
        config: of a single file, the fields that differ from Wan 2.1's.

    Raises InputError where a file cannot be read, the config is not of a VAE of Wan 2.1's kind, or a tensor
    is missing, unexpected or wrongly shaped.
    """
    in_wans = path / WAN_VAE
    if path.is_dir() and not in_wans.is_file():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae, weights = _from_config(folder / CONFIG), folder / WEIGHTS
    else:
        weights = in_wans if path.is_dir() else path
        vae = _empty(dict(config or {}), str(weights))
    files = open_tensors(weights, is_decoder)
    names = without_prefix(files.shapes)
    check_tensors("wan-vae", names, str(weights))
    if any(name.startswith(WAN_NAMES) for name in names):
        names = convert_wan_vae_to_diffusers(names)
    whole = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    return WanVaeDecoder(vae).fill(files, names, "the Wan 2.1 VAE (names as in diffusers)", whole)


def _from_config(path: Path) -> AutoencoderKLWan:
    if not path.exists():
        expected = f"a diffusers VAE: {CONFIG} and {WEIGHTS}"
        raise InputError("is not there", where=str(path), expected=expected)
    content = read_json(path, marked=True)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != NAME:
        raise InputError(f"describes {kind or 'no model'}", where=str(path), expected=NAME)
    return _empty({name: v for name, v in content.items() if not name.startswith("_")}, str(path))


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no autoencoder has: one of 10^9 layers would take hours to find wrong."""
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        most = MOST_BLOCKS if "num" in name else MOST_SIZE
        numbers = [one for one in values if isinstance(one, int | float)]
        if len(values) > MOST_BLOCKS or any(abs(number) > most for number in numbers):
            expected = f"numbers up to {most}, {MOST_BLOCKS} of them at most"
            raise InputError(f"{name} is {shown(value)}", where=where, expected=expected)


def _empty(config: dict[str, Any], where: str) -> AutoencoderKLWan:
    """The autoencoder without storage, once it is sure that it is one this decoder knows."""
    _check_sizes(config, where)
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config)
        found = vae.config
        faults = {
            "is_residual": found.is_residual,
            "patch_size": found.patch_size is not None,
            "out_channels": found.out_channels != 3,
            "latents_mean": len(found.latents_mean) != found.z_dim,
            "latents_std": len(found.latents_std) != found.z_dim,
        }
        mean_std = [float(value) for value in (*found.latents_mean, *found.latents_std)]
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        what, hint = f"does not describe an {NAME} ({error})", "An unknown field may need a newer diffusers."
        raise InputError(what, where=where, hint=hint) from error
    if not all(map(math.isfinite, mean_std)):
        raise InputError("latents_mean or latents_std is not finite", where=where)
    wrong = [f"{name} = {getattr(found, name)!r}" for name, fault in faults.items() if fault]
    if wrong:
        hint = "Take the VAE of Wan 2.1. That of Wan 2.2's 5B model is another."
        raise InputError(f"is not of Wan 2.1's kind: {', '.join(wrong)}", where=where, hint=hint)
    return vae
