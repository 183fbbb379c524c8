"""The lean runtime: opens a bundle and streams chunks of video. It imports no torch."""

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunks import Chunk, NoiseSource, Timing
from forcingkv.runtime.faults import DeviceError, InUseError, MemoryShortError, NotFiniteError, SessionError
from forcingkv.runtime.session import Session
from forcingkv.runtime.streaming import Video
from forcingkv.runtime.text import Prompt

__all__ = [
    "Bundle",
    "Chunk",
    "DeviceError",
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
