"""What decoding takes: sizes of the decoders, and a prediction of their time.

A decoder's time is scaled from one published figure: by the pixels of its frames, and by what bounds it on
the two GPUs. It is rougher than a prediction of the transformer, of which every operation is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_toml
from forcingkv.measure.planner.gpus import Gpu, load_gpu
from forcingkv.runtime.decode_strips import OPTION, Strips, choose_strips
from forcingkv.runtime.spec import Geometry

WAN21_CHANNELS = 16
"""Of the latents that most decoders are for."""


@dataclass(frozen=True)
class DecodingFigure:
    """What decoding took in a published run; `decoders.toml` says where the fields come from."""

    gpu: str
    width: int
    height: int
    frames: int
    """Pixel frames."""
    seconds: float
    bound: Literal["operations", "bandwidth"]
    source: str

    def seconds_on(self, gpu: Gpu, geometry: Geometry, frames: int, strips: Strips | None = None) -> float:
        """Seconds that so many pixel frames of another size should take on a GPU, in strips if there are any:
        they compute some rows more than the frame has."""
        measured = load_gpu(self.gpu)
        if self.bound == "operations":
            slower = measured.peak_flops / gpu.peak_flops
        else:
            slower = measured.bandwidth / gpu.bandwidth
        pixels = geometry.width * geometry.height / (self.width * self.height)
        rows = strips.count * strips.pixel_rows / geometry.height if strips else 1.0
        return self.seconds * slower * pixels * rows * frames / self.frames


@dataclass(frozen=True)
class StripCosts:
    """Sizes of a decoder in strips; `decoders.toml` says what they mean and where they come from."""

    lag: int
    scale: int
    whole: int
    features: int
    edges: int
    whole_activation_bytes: int | None = None
    strip_activation_bytes: int | None = None

    def cache_bytes(self, strips: Strips, geometry: Geometry, cached: int, size: int) -> int:
        """Bytes of feature caches, features and edges of a session, in numbers of `size` bytes, of a decoder
        whose caches have `cached` numbers for each latent pixel (`strip_decoder.StripRecords.nbytes`)."""
        pixels = geometry.latent_height * geometry.latent_width
        whole, share = self.whole * pixels, strips.pixel_rows / geometry.height
        state, features = ((cached - self.whole) * pixels * share, self.features * pixels * share)
        held = whole + strips.count * (state + features) + max(whole, state)
        return round(size * (held + 2 * self.edges * geometry.latent_width))

    def activation_bytes(self, strips: Strips, geometry: Geometry) -> int:
        """What one of both parts needs at most while it runs; 0 where that is not known."""
        pixels = geometry.latent_height * geometry.latent_width
        strip = (self.strip_activation_bytes or 0) * pixels * strips.pixel_rows / geometry.height
        return round(max((self.whole_activation_bytes or 0) * pixels, strip))


@dataclass(frozen=True)
class DecoderCosts:
    """Sizes of a pixel decoder; `decoders.toml` says what they mean and where they come from."""

    parameters: int
    cached: int
    activation_bytes: int | None = None
    published: DecodingFigure | None = None
    strips: StripCosts | None = None
    """None: it decodes frames as a whole."""

    def strips_of(self, geometry: Geometry, count: int | None = None) -> Strips | None:
        """The strips in which frames of a size are decoded, as export chooses them; None: as a whole.

        Raises InputError for a count that cannot be.
        """
        if self.strips:
            size = geometry.width, geometry.height
            return choose_strips(*size, self.strips.lag, self.strips.scale, count)
        if count not in (None, 1):
            raise InputError(f"is {count}, and this decoder decodes frames as a whole", where=OPTION)
        return None


@cache
def decoder_costs(kind: str, channels: int = WAN21_CHANNELS) -> DecoderCosts:
    """The sizes of a decoder for latents of so many channels; of Wan 2.1's, where none has so many."""
    text = (resources.files(__package__) / "decoders.toml").read_bytes()
    data: dict[str, Any] = dict(parse_toml(text, "decoders.toml")[kind])
    if kind != "pixels":
        data = dict(data.get(str(channels)) or data[str(WAN21_CHANNELS)])
    if "published" in data:
        data["published"] = DecodingFigure(**data["published"])
    if "strips" in data:
        data["strips"] = StripCosts(**data["strips"])
    return DecoderCosts(**data)
