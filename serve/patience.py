"""How long a live session may stay as it is: lost, paused, asleep, held back, or told to end."""

from __future__ import annotations

import time

from forcingkv.runtime import Video
from forcingkv.serve.messages import Ended
from forcingkv.serve.outbox import Outbox
from forcingkv.serve.settings import Limits
from forcingkv.serve.states import SavedState


class Patience:
    """What a session waits for, and until when.

    Attributes:
        paused: since when (`time.monotonic`); None: it is not.
        asleep: where it is on disk, without a place; None: it is awake.
        waking: whether it waits for a place again. Its client said play then, and nothing else is waited for.
        drained: until when the video may go on, where the service ends; None: it does not.
    """

    def __init__(self, limits: Limits, outbox: Outbox) -> None:
        self._limits, self._outbox = limits, outbox
        self.paused: float | None = None
        self.drained: float | None = None
        self.asleep: SavedState | None = None
        self.waking = False

    def is_over(self, video: Video | None) -> bool:
        """Whether the video has to end by now, though it could go on."""
        limit = self.limit(video)
        return limit is not None and limit[0] <= time.monotonic()

    def limit(self, video: Video | None) -> tuple[float, Ended | None] | None:
        """Until when things may stay as they are, and how the session ends then; None: it falls asleep."""
        limits, box, found = self._limits, self._outbox, list[tuple[float, Ended | None]]()
        if box.lost is not None:
            # Where the service ends nobody can come back to it.
            found.append((0.0 if self.drained is not None else box.lost + limits.lost, "lost"))
        if self.drained is not None:
            endless = video is None or video.chunks is None or self.paused is not None
            found.append((0.0 if endless else self.drained, "draining"))
        if self.waking:
            pass
        elif self.asleep and self.paused is not None:
            found.append((self.paused + limits.idle + limits.forgotten, "forgotten"))
        elif self.paused is not None and video is not None:
            found.append((self.paused + limits.idle, None))
        elif box.full is not None and box.lost is None:
            found.append((box.full + limits.reader, "slow_reader"))
        return min(found, key=lambda limit: limit[0], default=None)
