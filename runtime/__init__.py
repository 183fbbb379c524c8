"""The lean runtime: opens a bundle and streams chunks of video. It imports no torch."""

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.faults import DeviceError, MemoryShortError, NotFiniteError, SessionError
from forcingkv.runtime.results import Chunk, Timing
from forcingkv.runtime.session import Session
from forcingkv.runtime.streaming import Video

__all__ = [
    "Bundle",
    "Chunk",
    "DeviceError",
    "InputError",
    "MemoryShortError",
    "NotFiniteError",
    "Session",
    "SessionError",
    "Timing",
    "Video",
]
