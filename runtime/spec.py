"""What a model is, in numbers: `ModelSpec`, and the `Geometry` of a pixel size.

Every count of layers, heads, frames or tokens anywhere in forcingkv comes from here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds, shown
from forcingkv.headmaps.files import check_name
from forcingkv.headmaps.headmap import MOST
from forcingkv.runtime.schedule import FilledBy
from forcingkv.runtime.schedule import Schedule as Schedule

MOST_FRAMES = 10_000
"""Latent frames that a model attends to, or a role keeps: 40 minutes. The longest history of a public model
has 21."""
MOST_TOKENS = 1 << 24
"""Tokens of a chunk; 24,480 at 1080p."""
MOST_WIDTH = 1 << 17
"""Of a layer; of the largest public model 13,824."""
MOST_PIXELS = 1 << 16
"""Of a side of a frame."""

Positions = Literal["absolute", "relative"]
"""What positions in time are counted from: the start of the video, or that of the window that moves with it
(docs/method.md, "Positions")."""
Dtype = Literal["float32", "bfloat16", "float16"]
Linear = Literal["fp8", "int8"]
"""What linear layers multiply in, where that is another dtype than that of all else: `fp8` is E4M3."""

DecoderKind = Literal["wan-vae", "taehv", "lighttae"]

Recache = Literal["replay", "keep-sink", "empty-sink", "none", "cut"]
"""How the cache is made anew when the prompt is switched (docs/runtime.md, "Switching the prompt"); `cut`: it
stays, and another scene begins."""
ENCODED: tuple[Recache, ...] = ("keep-sink", "empty-sink")
"""The ways that encode newest frames in one pass."""

Context = Literal["cache", "recompute"]
"""Where what a chunk sees of the frames before it comes from: `cache`, the clean passes of all chunks;
`recompute`, one pass over the newest frames before each chunk (docs/decisions/0050)."""
ContextFirst = Literal["kept", "encoded"]
"""The first of those frames: as it was made, or decoded and encoded again as the first frame of a video."""


@dataclass(frozen=True)
class Decoder:
    """How latents become pixels."""

    kind: Literal["pixels", DecoderKind]
    spatial_stride: int = 1
    """Pixels a latent pixel covers, each way."""
    temporal_stride: int = 1
    """Pixel frames a latent frame gives (the video's first latent frame gives one)."""

    def __post_init__(self) -> None:
        check_bounds(self, dict.fromkeys(("spatial_stride", "temporal_stride"), (1, 256)), "decoder")
        if self.kind == "pixels" and (self.spatial_stride, self.temporal_stride) != (1, 1):
            strides = f"{self.spatial_stride} and {self.temporal_stride}"
            raise InputError(
                f"is pixels, with the strides {strides} of another decoder",
                where="decoder",
                expected="spatial_stride = 1 and temporal_stride = 1",
            )


@dataclass(frozen=True)
class TextEncoder:
    """How a prompt becomes the (text_length, text_width) input of the model."""

    kind: Literal["words", "umt5"]
    vocabulary: tuple[str, ...] = ()
    """The words of a `words` encoder, in the order of their one-hot places."""


@dataclass(frozen=True)
class PublicWeights:
    """Where a model's public weights are."""

    hub: str
    """Repository on the Hugging Face hub."""
    file: str
    """The weights, named inside that repository."""
    key: str | None = None
    """Entry of a `.pt` file that holds the state dict; None: see `models.entries`."""
    lora: str | None = None
    """A LoRA in the same repository, to be merged into the weights."""
    lora_alpha: float | None = None
    """Its alpha; a LoRA file itself does not say it. None: equal to its rank. Without `lora`: of a LoRA that
    lies in the file of the weights, beside them; then None is not known, and such a file is refused."""

    def __post_init__(self) -> None:
        check_bounds(self, {"lora_alpha": (-1e9, 1e9)}, "source")
        for name in (self.file, self.lora):
            if name is not None:
                check_name(name, "source")


@dataclass(frozen=True)
class ModelSpec:
    """A causal Wan transformer and how it is run (`docs/method.md`, "The transformer")."""

    name: str
    layers: int
    heads: int
    head_dim: int
    ffn_width: int
    latent_channels: int
    patch: int
    """Side of the square of latent pixels that makes a token."""
    text_width: int
    text_length: int
    time_width: int
    """Width of the sinusoidal time features."""
    frames_per_chunk: int
    attended_frames: int
    """Latent frames the model attends to at most under the policy `full`, sink and current chunk
    included (`local_attn_size`)."""
    ar_start: int
    """Last chunk index at which all heads are still treated alike (`docs/method.md`, "Cache policies and
    roles")."""
    fps: float
    width: int
    """Pixels, of the default resolution."""
    height: int
    schedule: Schedule
    decoder: Decoder
    text: TextEncoder
    sink_frames: int = 0
    """First frames among them that the model itself never drops (`sink_size`)."""
    dtype: Dtype = "float32"
    """What the weights of a bundle are stored as, unless export is told otherwise."""
    source: PublicWeights | None = None
    epsilon: float = 1e-6
    rope_theta: float = 10000.0
    position_table: bool = False
    """Whether tokens carry a learned code of their place in the frame. Public Wan models have none:
    rotary embedding alone cannot tell the left half of pure noise from the right. A model with a
    table runs at its default resolution only."""
    positions: Positions = "absolute"
    """Unless a policy says otherwise."""
    recache: Recache = "replay"
    """What a switch of the prompt does where nobody says: what the model was trained with."""
    scene_frames: int = 0
    """First frames of each scene that the model's window keeps until the next one begins."""
    scene_offset: float = 0.0
    """Frames by which absolute positions jump with each cut to another scene."""
    scene_prefix: str = ""
    """What the first chunk of a scene has before the scene's text, after a cut."""
    context: Context = "cache"
    context_frames: int = 0
    """Newest frames that are encoded anew before each chunk, where `context` is `recompute`."""
    context_first: ContextFirst = "kept"
    # No part of the hash, since a table has none: equal specs have equal ones all the same.
    resolutions: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    """Named pixel sizes, (width, height)."""

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS, f"model {self.name}")
        faults = [(name, "an even number") for name in ("head_dim", "time_width") if getattr(self, name) % 2]
        if self.decoder.kind == "pixels" and self.latent_channels not in (1, 3):
            faults.append(("latent_channels", "1 (grey) or 3 (colour) with the decoder 'pixels'"))
        if self.attended_frames < self.frames_per_chunk:
            faults.append(("attended_frames", f"{self.frames_per_chunk} or more, the frames of a chunk"))
        most = self.attended_frames - self.frames_per_chunk
        if not faults and self.sink_frames > most:
            own = f"of {self.attended_frames} attended frames {self.frames_per_chunk} are the chunk's own"
            faults.append(("sink_frames", f"0 to {most}: {own}"))
        faults += [] if faults else self._faults_of_context()
        if faults:
            name, expected = faults[0]
            what = f"{name} is {getattr(self, name)}"
            raise InputError(what, where=f"model {self.name}", expected=expected)
        if self.context == "recompute" and self.schedule.context == "last":
            raise InputError(
                "has schedule.context = 'last', and its cache is made of the newest frames before each chunk",
                where=f"model {self.name}",
                expected="schedule.context = 'clean' with context = 'recompute': no chunk fills the cache",
            )
        if self.dim > MOST_WIDTH:
            what = f"heads x head_dim are {self.dim}"
            raise InputError(what, where=f"model {self.name}", expected=f"at most {MOST_WIDTH}")
        for name, sides in self.resolutions.items():
            if not all(1 <= side <= MOST_PIXELS for side in sides):
                what = f"the resolution {name} is {shown(sides)}"
                raise InputError(what, where=f"model {self.name}", expected=f"sides of 1 to {MOST_PIXELS}")
        words, needed = len(self.text.vocabulary), len(self.text.vocabulary) + self.text_length
        if self.text.kind == "words" and needed > self.text_width:
            what = f"text_width is {self.text_width}, too few for a vocabulary of {words} and their places"
            raise InputError(what, where=f"model {self.name}", expected=f"{needed} or more")

    def _faults_of_context(self) -> list[tuple[str, str]]:
        """Fields that do not go with `context`, and what they are to be."""
        own, newest = self.frames_per_chunk, self.context_frames
        if self.context == "cache":
            wanted: dict[str, tuple[object, str]] = {"context_frames": (0, ""), "context_first": ("kept", "")}
        else:
            # More would be several blocks, each of which sees those before it alone: a mask.
            if not 1 <= newest <= own:
                return [("context_frames", f"1 to {own}, the frames of a chunk, with context = 'recompute'")]
            alone = ": nothing but the newest frames is seen"
            wanted = {
                "attended_frames": (newest + own, f": {newest} of context and {own} of the chunk"),
                **dict.fromkeys(("sink_frames", "scene_frames", "scene_offset"), (0, alone)),
                "positions": ("relative", ": the context begins at 0"),
                "recache": ("none", ": the next chunk's context follows another prompt in any case"),
            }
        return [
            (name, f"{value!r} with context = {self.context!r}{why}")
            for name, (value, why) in wanted.items()
            if getattr(self, name) != value
        ]

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def passes_described(self) -> str:
        """All passes of a chunk, in words."""
        last = f"clean pass at {self.schedule.context_timestep:g}"
        if self.schedule.context == "last":
            last = "the last of them fills the cache, and there is no clean pass"
        if self.context == "recompute":
            again = ", the first of them encoded again" if self.context_first == "encoded" else ""
            last = (
                f"before each chunk but the first a pass at {self.schedule.context_timestep:g} over the"
                f" {self.context_frames} newest frames{again}, and no clean pass"
            )
        return f"{self.schedule.described}; {last}"

    def filled_by(self, context: FilledBy | None) -> ModelSpec:
        """The same model whose cache is filled by that pass (`Schedule.context`); None: by its own.

        Raises InputError where no chunk fills it.
        """
        if context is None:
            return self
        return replace(self, schedule=replace(self.schedule, context=context))

    @property
    def fills_cache(self) -> FilledBy | Literal["recompute"]:
        """What fills the cache: a chunk's clean pass, its last pass, or a pass over the newest frames."""
        return "recompute" if self.context == "recompute" else self.schedule.context

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """Rotated pairs of a head given to time, height and width (22, 21, 21 of 64)."""
        pairs = self.head_dim // 2
        side = pairs // 3
        return pairs - 2 * side, side, side

    @property
    def chunks_to_fill(self) -> int:
        """The fewest chunks whose frames are as many as the model attends to: in the last of them it attends
        to as much as it ever can."""
        return -(-self.attended_frames // self.frames_per_chunk)

    def frames_of(self, chunks: int) -> int:
        """Pixel frames that the first `chunks` chunks decode to."""
        latent = chunks * self.frames_per_chunk
        return 1 + (latent - 1) * self.decoder.temporal_stride if latent else 0

    def chunks_for(self, seconds: float) -> int:
        """The fewest chunks, 1 at least, of that many seconds of video or more.

        Raises InputError where seconds are not a number above 0 or are too many to count their frames.
        """
        frames = seconds * self.fps
        if seconds <= 0 or not math.isfinite(frames):
            raise InputError(f"is {seconds}", where="seconds", expected="a number above 0, not infinite")
        # The first latent frame gives one pixel frame, each other one as many as the temporal stride.
        latent = 1 + -(-(math.ceil(frames) - 1) // self.decoder.temporal_stride)
        return max(1, -(-latent // self.frames_per_chunk))

    def geometry(self, resolution: str | None = None) -> Geometry:
        """The geometry of a named resolution, of "WxH" as people write it, or of the default.

        Even sides that do not divide into tokens are those of the frames: the model runs at the next size up
        that does, and `Geometry.crop` says so. Raises InputError where the name is unknown, or the pixels
        neither divide into tokens nor are even, or fill no token.
        """
        sides = self._pixels(resolution)
        if self.position_table and sides != (self.width, self.height):
            what = f"{self.name} runs at {self.width}x{self.height} only, the size of its position table"
            raise InputError(what, where="resolution")
        cell, stride = self.decoder.spatial_stride * self.patch, self.decoder.spatial_stride
        whole = not any(side % cell for side in sides)
        if min(sides) < cell or not (whole or all(side % 2 == 0 for side in sides)):
            nearest = (max(cell, side if side % 2 == 0 else round(side / cell) * cell) for side in sides)
            raise InputError(
                f"{sides[0]}x{sides[1]} does not divide into tokens of {cell}x{cell} pixels",
                where="resolution",
                expected=f"width and height that are multiples of {cell}, or even numbers above it,"
                " to which frames are cropped",
                hint="The nearest that fits is {}x{}.".format(*nearest),
            )
        width, height = (-(-side // cell) * cell for side in sides)
        tokens = self.frames_per_chunk * (width // cell) * (height // cell)
        if max(sides) > MOST_PIXELS or tokens > MOST_TOKENS:
            what = f"{sides[0]}x{sides[1]} gives {self.name} {tokens:,} tokens a chunk"
            expected = f"at most {MOST_TOKENS:,}, of sides of at most {MOST_PIXELS} pixels"
            raise InputError(what, where="resolution", expected=expected)
        crop = None if whole else sides
        return Geometry(width, height, width // stride, height // stride, self.patch, crop)

    def _pixels(self, resolution: str | None) -> tuple[int, int]:
        if resolution is None:
            return self.width, self.height
        if resolution in self.resolutions:
            return self.resolutions[resolution]
        named = {name.casefold(): size for name, size in self.resolutions.items()}
        if resolution.strip().casefold() in named:
            return named[resolution.strip().casefold()]
        sides = _SIDES.fullmatch(resolution)
        if sides:
            return int(sides[1]), int(sides[2])
        what = f"{resolution!r} is not a resolution of {self.name}"
        known = " or ".join(["WIDTHxHEIGHT", *sorted(self.resolutions)])
        raise InputError(what, where="resolution", expected=known)


BOUNDS = {
    "layers": (1, MOST),
    "heads": (1, MOST),
    "head_dim": (1, 4096),
    "ffn_width": (1, MOST_WIDTH),
    "latent_channels": (1, 4096),
    "patch": (1, 64),
    "text_width": (1, MOST_WIDTH),
    "text_length": (1, 1 << 16),
    "time_width": (1, MOST_WIDTH),
    "frames_per_chunk": (1, MOST_FRAMES),
    "attended_frames": (1, MOST_FRAMES),
    "ar_start": (0, MOST_FRAMES),
    "fps": (1e-2, 1e3),
    "width": (1, MOST_PIXELS),
    "height": (1, MOST_PIXELS),
    "sink_frames": (0, MOST_FRAMES),
    "scene_frames": (0, MOST_FRAMES),
    "scene_offset": (0, MOST_FRAMES),
    "context_frames": (0, MOST_FRAMES),
    "epsilon": (0, 1),
    "rope_theta": (1, 1e12),
}
"""What the numbers of a model can be."""

_SIDES = re.compile(r"\s*(\d{1,6})\s*[xX*\N{MULTIPLICATION SIGN}]\s*(\d{1,6})\s*")
"""How people write a size."""


@dataclass(frozen=True)
class Geometry:
    """A pixel size, and the latent grid and tokens it makes."""

    width: int
    """Pixels that are computed."""
    height: int
    latent_width: int
    latent_height: int
    patch: int
    crop: tuple[int, int] | None = None
    """Width and height of the frames, whose last columns and rows are cut off; None: all are shown."""

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height of the frames."""
        return self.crop or (self.width, self.height)

    @property
    def name(self) -> str:
        """WIDTHxHEIGHT of the frames, which `ModelSpec.geometry` reads back."""
        return "{}x{}".format(*self.shown)

    @property
    def described(self) -> str:
        """`name`, and what is computed where that is more."""
        return f"{self.name} (computed at {self.width}x{self.height}, cropped)" if self.crop else self.name

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a latent frame."""
        return self.latent_height // self.patch, self.latent_width // self.patch

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        rows, columns = self.grid
        return rows * columns
