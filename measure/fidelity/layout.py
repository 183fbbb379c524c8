"""Where the chunks of a video begin, in pixel frames."""

from __future__ import annotations

from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import ModelSpec


@dataclass(frozen=True)
class ChunkLayout:
    """Pixel frames of the chunks of a video.

    Pair `i` is frames `i` and `i + 1`. A pair is at a **boundary** if its frames are of two chunks. Inside a
    chunk, a pair is a **crossing** if its frames come from two latent frames: decoders make several frames
    of one latent frame, and the step from one latent frame to the next is larger wherever it lies.

    Raises InputError for numbers that no decoder gives.
    """

    first: int
    """Frames of the first chunk: its first latent frame gives one, the others `stride`."""
    later: int
    """Frames of every later chunk: `stride` for each latent frame."""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.later or self.later % self.stride:
            raise InputError(
                f"are {self.first} in the first chunk and {self.later} in later ones",
                where="frames a chunk",
                expected="1 + (F - 1) * stride in the first chunk and F * stride in later ones, for F latent"
                " frames a chunk (9 and 12 for Wan's VAE: F = 3, stride 4)",
            )

    @classmethod
    def of(cls, spec: ModelSpec) -> ChunkLayout:
        """The layout of a model's videos."""
        return cls(spec.frames_of(1), spec.frames_of(2) - spec.frames_of(1))

    @property
    def stride(self) -> int:
        """Pixel frames of a latent frame other than the video's first."""
        return self.later - self.first + 1

    def chunk_of(self, frame: int) -> int:
        """The index of the chunk that a pixel frame is in."""
        return max(0, (frame - self.first) // self.later + 1)

    def boundaries(self, frames: int) -> list[int]:
        """Pairs at the boundaries of chunks, of a video of that many frames."""
        return list(range(self.first - 1, frames - 1, self.later))

    def crossings(self, frames: int) -> list[int]:
        """Pairs inside chunks whose frames come from two latent frames."""
        boundaries = set(self.boundaries(frames))
        return [pair for pair in range(0, frames - 1, self.stride) if pair not in boundaries]

    def around(self, boundary: int) -> range:
        """Pairs of the two chunks that meet there, that boundary among them, the others left out."""
        length = self.first if boundary == self.first - 1 else self.later
        return range(boundary - length + 1, boundary + self.later)
