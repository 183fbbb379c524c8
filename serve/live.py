"""A live session: one video for one client, from waiting for a place to the end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from contextlib import suppress

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Chunk, MemoryShortError, SessionError, Video
from forcingkv.serve.begin import Beginning, started, words_at
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.engine import Engine
from forcingkv.serve.frame_coding import Coded, FrameCoder, coded, coder_for
from forcingkv.serve.messages import (
    Asleep,
    ChunkEvent,
    Command,
    Ended,
    EndedEvent,
    ErrorEvent,
    Pause,
    Paused,
    Play,
    Playing,
    Queued,
    Save,
    Saved,
    Stop,
    Switched,
    SwitchPrompt,
)
from forcingkv.serve.outbox import Outbox
from forcingkv.serve.patience import Patience
from forcingkv.serve.refusals import RefusalError, refusal_of
from forcingkv.serve.seat import Seat
from forcingkv.serve.states import SavedState

log = logging.getLogger("forcingkv.serve")

MOST_COMMANDS = 100
"""That wait for the chunk which is being made."""
SAID: dict[Ended, str] = {
    "complete": "The video is complete.",
    "stopped": "The video was stopped.",
    "slow_reader": "The client took nothing for too long.",
    "lost": "The client did not come back.",
    "forgotten": "The session was paused for too long.",
    "draining": "The service ends.",
    "failed": "The video could not go on.",
}


class LiveSession:
    """One video on its way to one client.

    Only `run` touches the video, between chunks; what a client says comes to it as commands.

    Attributes:
        id: its name. key: the secret with which a client comes back to it.
        outbox: what the client is to get.
    """

    def __init__(self, engine: Engine, beginning: Beginning) -> None:
        self.id, self.key = engine.new_name(), secrets.token_urlsafe(24)
        self._engine, self._beginning = engine, beginning
        self._bundle: ServedBundle = beginning.bundle
        self._changed = asyncio.Event()
        self.outbox = Outbox(engine.limits.ahead, self._changed)
        self._commands: deque[Command] = deque()
        self._over: Ended | None = None
        self._patience = Patience(engine.limits, self.outbox)
        self._seat = Seat(engine, self._bundle)
        self._video: Video | None = None
        self._coder: FrameCoder | None = None
        self._coding: asyncio.Task[None] | None = None
        self._frames = self._made = 0
        self._asked = self._last = time.monotonic()

    @property
    def was_dropped(self) -> bool:
        """Whether it ended since its client took nothing."""
        return self._over == "slow_reader"

    def tell(self, command: Command) -> None:
        """A message of the client. Raises RefusalError where too many wait already."""
        if len(self._commands) >= MOST_COMMANDS:
            raise RefusalError("too_many", f"{MOST_COMMANDS} messages wait for the chunk that is being made.")
        self._commands.append(command)
        self._changed.set()

    def drain(self, until: float) -> None:
        """The service ends: the video may, until then (`time.monotonic`); else its state is kept."""
        self._patience.drained = until
        self._changed.set()

    async def run(self) -> None:
        """Make the video. Returns when it is over, whatever the reason, and all is given back."""
        state: SavedState | None = None
        try:
            await self._begin()
            while not self._over:
                await self._may_go_on()
                if not self._over:
                    await self._next()
            await self._coded()
            if self._over == "draining":
                state = await self._last_state()
            self._end(self._over, SAID[self._over], state)
        except Exception as error:  # whatever it was: others go on
            with suppress(Exception):  # the chunk before is whole
                await self._coded()
            self._end("failed", self._refuse(error, "session failed").message)
        finally:
            await self._release()
            if self._coder is not None:
                self._coder.close()
            if self._patience.asleep:
                await self._engine.aside(self._engine.states.drop, self._patience.asleep)

    def _refuse(self, error: BaseException, said: str) -> RefusalError:
        """Tell the client of an error; what is not its fault goes into the log too."""
        refusal = refusal_of(error)
        if not refusal.is_the_clients:
            log.error(said, extra={"session": self.id}, exc_info=error)
        self._engine.metrics.refusals.labels(refusal.code).inc()
        self.outbox.put(
            ErrorEvent(code=refusal.code, message=refusal.message, retry_after=refusal.retry_after)
        )
        return refusal

    def _end(self, reason: Ended, message: str, state: SavedState | None = None) -> None:
        self._engine.metrics.ended.labels(reason).inc()
        log.info("session ended", extra={"session": self.id, "reason": reason, "chunks": self._made})
        name = state.name if state else None
        self.outbox.put(EndedEvent(reason=reason, chunks=self._made, message=message, state=name))

    # Beginning

    async def _begin(self) -> None:
        await self._take_place()
        if self._over:
            return
        waited = time.monotonic() - self._asked
        self._engine.metrics.waited.observe(waited)
        assert self._seat.session is not None
        video = self._video = await self._engine.make(self._beginning.video, self._seat.session)
        start, spec = self._beginning.start, self._bundle.bundle.plan.spec
        self._frames = spec.frames_of(video.index)
        width, height = self._bundle.bundle.manifest.frame_size
        asked = start.frames, width, height, spec.fps, start.enlarge, self._frames
        self._coder = await self._engine.aside(coder_for, *asked)
        self._engine.metrics.sessions.labels(self._bundle.name).inc()
        log.info(
            "session started",
            extra={
                "session": self.id,
                "bundle": self._bundle.name,
                "waited": round(waited, 3),
                "seed": video.seed,
            },
        )
        self._last = time.monotonic()
        self.outbox.put(started(self, self._beginning, video, self._coder), tuple(self._coder.head))

    async def _take_place(self) -> None:
        """Wait for a place, and take a session there; the client may leave or stop meanwhile."""

        def tell(place: int, wait: float | None) -> None:
            self.outbox.put(Queued(session=self.id, key=self.key, place=place, wait_seconds=wait))

        start = self._beginning.start
        waiting = asyncio.ensure_future(self._seat.take(tell, enlarge=start.enlarge))
        while not waiting.done() and not self._over:
            self._changed.clear()
            if any(isinstance(command, Stop) for command in self._commands):
                self._over = "stopped"
                break
            changed = asyncio.ensure_future(self._until_changed())
            await asyncio.wait({waiting, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            with suppress(asyncio.CancelledError):
                await changed
        if self._over:
            waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting

    # Between chunks

    async def _may_go_on(self) -> None:
        """Do what the client said, and wait while no chunk may be made."""
        while not self._over:
            if self._commands:
                await self._coded()  # events are in the order of chunks
                await self._obey(self._commands.popleft())
            elif self._may_make():
                return
            else:
                self._changed.clear()
                await self._until_changed()

    def _may_make(self) -> bool:
        waits = self._patience
        return waits.paused is None and self.outbox.has_room and not waits.is_over(self._video)

    async def _until_changed(self) -> None:
        """Wait until something changed, or time is up for something."""
        limit = self._patience.limit(self._video)
        left = None if limit is None else max(limit[0] - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(left):
                await self._changed.wait()
        except TimeoutError:
            assert limit is not None
            if limit[1] is None:
                await self._fall_asleep()
            else:
                self._over = limit[1]

    async def _obey(self, command: Command) -> None:
        try:
            match command:
                case Stop():
                    self._over = "stopped"
                case Pause():
                    self._patience.paused = self._patience.paused or time.monotonic()
                    self.outbox.put(Paused())
                case Play():
                    await self._play()
                case SwitchPrompt():
                    await self._switch(command)
                case Save():
                    state = await self._keep()
                    self.outbox.put(Saved(state=state.name, chunk=self._awake.index))
        except SessionError:
            raise
        except (RefusalError, InputError, OSError) as error:
            self._refuse(error, f"{command.type} failed")

    @property
    def _awake(self) -> Video:
        if self._video is None:
            raise RefusalError("not_now", "The session is asleep: say play first.")
        return self._video

    async def _switch(self, command: SwitchPrompt) -> None:
        video = self._awake
        prompt = await self._engine.prompt(self._bundle, command.prompt)
        chunk = await self._engine.make(
            video.switch, prompt, at=command.at, recache=command.recache, fade=command.fade
        )
        self.outbox.put(Switched(chunk=chunk, prompt=command.prompt))

    async def _keep(self) -> SavedState:
        """Save the state among those that clients may begin with. Raises what `_saved` does, and OSError."""
        states, state = self._engine.states, await self._saved()
        try:
            await self._engine.aside(states.keep, state)
        except OSError:
            await self._engine.aside(states.drop, state)
            raise
        return state

    async def _saved(self) -> SavedState:
        """The state on disk, where nobody else finds it. Raises what `Video.save` does; it is gone then."""
        video, states = self._awake, self._engine.states
        state = states.new(self._bundle.name)
        try:
            await self._engine.make(video.save, state.folder)
        except BaseException:
            await self._engine.aside(states.drop, state)
            raise
        return state

    async def _last_state(self) -> SavedState | None:
        """What can be gone on with, where the service ends; None: the video had not begun."""
        if self._patience.asleep is None:
            return await self._keep() if self._video else None
        state, self._patience.asleep = self._patience.asleep, None
        await self._engine.aside(self._engine.states.keep, state)
        return state

    # Sleep

    async def _fall_asleep(self) -> None:
        """Save the video to disk, and give its place to others."""
        await self._coded()
        try:
            self._patience.asleep = await self._saved()
        except (InputError, OSError) as error:  # a full disk: it keeps its place
            log.warning("a paused session could not be saved: %s", error, extra={"session": self.id})
            self._patience.paused = time.monotonic()
            return
        await self._release()
        self.outbox.put(Asleep())
        log.info("session asleep", extra={"session": self.id})

    async def _play(self) -> None:
        """Go on after a pause. Raises RefusalError where no place can be had: it sleeps on then."""
        if self._patience.asleep:
            await self._wake_up(self._patience.asleep)
        if self._over:  # while it waited for a place
            return
        self._patience.paused, self._last = None, time.monotonic()
        self.outbox.wait_anew()
        self.outbox.put(Playing())

    async def _wake_up(self, state: SavedState) -> None:
        """Take a place again, and go on where the video was."""
        self._patience.waking = True
        try:
            await self._take_place()
            if self._seat.session is None:
                return
            self._video = await self._engine.make(self._seat.session.restore, state.folder)
        except BaseException as error:
            self._seat.give_back()
            self._patience.paused = time.monotonic()
            if isinstance(error, MemoryShortError):
                raise refusal_of(error) from error
            raise
        finally:
            self._patience.waking = False
        self._patience.asleep = None
        await self._engine.aside(self._engine.states.drop, state)

    # Chunks

    async def _next(self) -> None:
        video = self._awake
        began = time.monotonic()
        self.outbox.promise()
        chunk, done = await self._engine.make(self._make, video)
        if chunk is None:
            self._over = "complete"
            return
        every, self._last = time.monotonic() - max(self._last, began), time.monotonic()
        self._engine.metrics.chunk.labels(self._bundle.name).observe(every)
        if not self._made:
            self._engine.metrics.first.observe(time.monotonic() - self._asked)
        self._made += 1
        first, self._frames = self._frames, self._frames + len(chunk.frames)
        self._engine.metrics.frames.labels(self._bundle.name).inc(len(chunk.frames))
        await self._coded()
        words = words_at(video, chunk.index)
        self._coding = asyncio.create_task(self._hand_out(chunk, done, first, every, words))
        if video.chunks is not None and video.index >= video.chunks:
            self._over = "complete"

    def _make(self, video: Video) -> tuple[Chunk | None, Coded | None]:
        """The next chunk. Its frames are encoded while the one after is made, unless both take the same
        cores: there they would only hold each other up."""
        chunk = next(video, None)
        if chunk is None or self._coder is None or video.host_is_free:
            return chunk, None
        return chunk, coded(self._coder, chunk)

    async def _hand_out(self, chunk: Chunk, done: Coded | None, first: int, every: float, words: str) -> None:
        assert self._coder is not None
        if done is None:
            done = await self._engine.aside(coded, self._coder, chunk)
        parts, seconds = done
        size = sum(map(len, parts))
        self._engine.metrics.bytes_sent.inc(size)
        kv = {name: held for name, held in self._bundle.kv_bytes(chunk.index).items() if held}
        self.outbox.put(
            ChunkEvent(
                chunk=chunk.index,
                first_frame=first,
                frames=len(chunk.frames),
                seconds=seconds,
                every=every,
                kv_bytes=kv,
                prompt=words,
                given=chunk.given,
                parts=len(parts),
                bytes=size,
            ),
            parts,
        )

    async def _coded(self) -> None:
        """Wait until the chunk before is on its way."""
        if self._coding:
            coding, self._coding = self._coding, None
            await coding

    async def _release(self) -> None:
        """Give back session and place, once the chunk that is being made is done."""
        if self._coding:
            with suppress(Exception):
                await self._coded()
        self._video = None
        self._seat.give_back()
