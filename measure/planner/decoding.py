"""What decoding takes: sizes of the decoders, and a prediction of their time.

A decoder's time is scaled from one published figure: by the pixels of its frames, and by what bounds it on
the two GPUs. It is rougher than a prediction of the transformer, of which every operation is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from forcingkv.headmaps.reading import parse_toml
from forcingkv.measure.planner.gpus import Gpu, load_gpu
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

    def seconds_on(self, gpu: Gpu, geometry: Geometry, frames: int) -> float:
        """Seconds that so many pixel frames of another size should take on a GPU."""
        measured = load_gpu(self.gpu)
        if self.bound == "operations":
            slower = measured.peak_flops / gpu.peak_flops
        else:
            slower = measured.bandwidth / gpu.bandwidth
        pixels = geometry.width * geometry.height / (self.width * self.height)
        return self.seconds * slower * pixels * frames / self.frames


@dataclass(frozen=True)
class DecoderCosts:
    """Sizes of a pixel decoder; `decoders.toml` says what they mean and where they come from."""

    parameters: int
    cached: int
    activation_bytes: int | None = None
    published: DecodingFigure | None = None


@cache
def decoder_costs(kind: str, channels: int = WAN21_CHANNELS) -> DecoderCosts:
    """The sizes of a decoder for latents of so many channels; of Wan 2.1's, where none has so many."""
    text = (resources.files(__package__) / "decoders.toml").read_bytes()
    data: dict[str, Any] = dict(parse_toml(text, "decoders.toml")[kind])
    if kind != "pixels":
        data = dict(data.get(str(channels)) or data[str(WAN21_CHANNELS)])
    if "published" in data:
        data["published"] = DecodingFigure(**data["published"])
    return DecoderCosts(**data)
