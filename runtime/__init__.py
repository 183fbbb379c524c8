"""The lean runtime: opens a bundle and streams chunks of video. It imports no torch."""

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunks import NoiseSource
from forcingkv.runtime.faults import (
    DeviceError,
    GoingOnWarning,
    InUseError,
    MemoryShortError,
    NotFiniteError,
    SessionError,
)
from forcingkv.runtime.results import Chunk, Timing
from forcingkv.runtime.session import Session
from forcingkv.runtime.streaming import Video
from forcingkv.runtime.text import Prompt

__all__ = [
    "Bundle",
    "Chunk",
    "DeviceError",
    "GoingOnWarning",
    "InUseError",
    "InputError",
    "MemoryShortError",
    "MissingExtraError",
    "NoiseSource",
    "NotFiniteError",
    "Prompt",
    "Session",
    "SessionError",
    "Timing",
    "Video",
]
