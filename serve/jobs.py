"""Makes the videos of jobs, one after the other, in the places that live sessions leave."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress

from forcingkv.runtime import Session
from forcingkv.runtime.video import open_writer
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.engine import Engine
from forcingkv.serve.job_store import INTERRUPTED, Job, JobStore
from forcingkv.serve.refusals import RefusalError, refusal_of
from forcingkv.serve.seat import Seat

LOOK = 5.0
"""Seconds between two looks at whether another replica died."""
log = logging.getLogger("forcingkv.serve")


class Jobs:
    """The jobs of a service. Those that waited when it was stopped go on waiting, in another replica too."""

    def __init__(self, engine: Engine, store: JobStore) -> None:
        self._engine, self.store = engine, store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopped: set[str] = set()
        self._looking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Take up what waits; from now on also what replicas leave that die."""
        for job in self.store.take_over():
            self._follow(job)
        if self._engine.replica:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            for job in await self._engine.aside(self.store.take_over):
                if job.id not in self._tasks:
                    self._follow(job)

    async def add(self, job: Job) -> Job:
        """A job of a client. Raises RefusalError where it has too many, or too many wait."""
        mine = sum(one.client == job.client and not one.over for one in self.store.all())
        limits = self._engine.limits
        if self._engine.draining:
            raise RefusalError("draining", "The service is about to end.", limits.drain)
        if mine >= limits.sessions_a_client:
            raise RefusalError("too_many", f"You have {mine} jobs already: wait for one, or delete it.", 30.0)
        if len(self._tasks) >= limits.waiting + self._engine.places.most:
            wait = self._engine.places.wait(len(self._tasks)) or 30.0
            raise RefusalError("busy", f"{len(self._tasks)} jobs wait already.", wait)
        job = await self._engine.aside(self.store.add, job)
        self._follow(job)
        return job

    async def remove(self, name: str) -> None:
        """Remove a job, and stop it where it is at work. Raises RefusalError where there is none."""
        try:
            self.store.get(name)
        except KeyError:
            raise RefusalError("not_found", "There is no such video.") from None
        self._stopped.add(name)
        if task := self._tasks.get(name):
            if self.store.get(name).status == "queued":
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._engine.aside(self.store.remove, name)
        self._stopped.discard(name)

    async def drain(self) -> None:
        """Stop all: those at work are said to be interrupted, those that wait go on waiting on disk."""
        if self._looking:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        self._stopped |= self._tasks.keys()
        for name, task in list(self._tasks.items()):
            if self.store.get(name).status == "queued":
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _follow(self, job: Job) -> None:
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def _run(self, job: Job) -> None:
        try:
            bundle = self._engine.bundle(job.bundle)
            seat = Seat(self._engine, bundle)
            try:
                await self._make(job, bundle, await seat.take())
            finally:
                seat.give_back()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.code == "internal":
                log.exception("job failed", extra={"job": job.id})
            self._fail(job, refusal.code, refusal.message)

    async def _make(self, job: Job, bundle: ServedBundle, session: Session) -> None:
        """Make the video of a job; it is there under its name once it is whole."""
        engine, store = self._engine, self.store
        if not store.change(job.id, status="in_progress"):
            return
        prompt = await engine.aside(bundle.prompt, job.prompt, engine.limits.prompt)
        video = await engine.make(session.generate, prompt, seed=job.seed, chunks=job.chunks)
        said = {"title": job.prompt, "forcingkv_bundle": bundle.name, "forcingkv_seed": str(job.seed)}
        with store.unfinished(job.id) as path:
            with open_writer(path, fps=session.spec.fps, metadata=said) as writer:
                while (chunk := await engine.make(next, video, None)) is not None:
                    await engine.aside(writer.write, chunk.frames)
                    there = store.change(job.id, made=video.index)
                    engine.metrics.frames.labels(bundle.name).inc(len(chunk.frames))
                    if job.id in self._stopped or not there:
                        raise RefusalError("interrupted", INTERRUPTED)
            await engine.aside(os.replace, path, store.video(job.id))
        store.change(job.id, status="completed", completed=int(time.time()))
        engine.metrics.jobs.labels("completed").inc()
        log.info("job completed", extra={"job": job.id, "chunks": job.chunks})

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._engine.metrics.jobs.labels("failed").inc()
        self.store.change(job.id, status="failed", code=code, message=message, completed=int(time.time()))
