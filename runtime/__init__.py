"""The lean runtime: opens a bundle and streams chunks of video. It imports no torch."""

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.session import Chunk, Session, Timing

__all__ = ["Bundle", "Chunk", "InputError", "Session", "Timing"]
