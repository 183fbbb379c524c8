"""What every pixel decoder is: a function of some latent frames and its own feature caches."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class StreamingDecoder(nn.Module, ABC):
    """Turns latents into pixels, any number of latent frames a call.

    The caches come in and go out; the module keeps nothing between calls, and one static graph serves the
    first call and all later ones. A video decoded in one call or in many is the same video.

    Attributes:
        latent_channels: channels of the latents.
        temporal_stride: pixel frames a latent frame.
        spatial_stride: pixels a latent pixel, in height and in width.
    """

    latent_channels: int
    temporal_stride: int
    spatial_stride: int

    @abstractmethod
    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape (batch 1) of every feature cache, for latents of that height and width."""

    def empty_state(self, height: int, width: int) -> dict[str, Tensor]:
        """The caches before a video's first call: zeros, of the dtype and on the device of the weights."""
        weight = next(self.parameters())
        shapes = self.state_shapes(height, width)
        return {name: weight.new_zeros(shape, requires_grad=False) for name, shape in shapes.items()}

    @abstractmethod
    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode the next latent frames of a video.

        Args:
            latents: (1, latent_channels, n, h, w), n >= 1, normalised as the transformer makes them.
            first: (1,), 1.0 in a video's first call and 0.0 in the others; the dtype of the latents.
            state: the caches that the call before returned; zeros in the first call.

        Returns:
            Pixels (1, 3, temporal_stride * n, spatial_stride * h, spatial_stride * w) in [-1, 1], and the
            next caches under the same names. The first temporal_stride - 1 pixel frames of a first call
            mean nothing and are the caller's to drop: a latent frame at the start is one pixel frame.
        """
