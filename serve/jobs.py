"""Makes the videos of jobs, one after the other, in the places that live sessions leave."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from typing import Any

from forcingkv.runtime import Session
from forcingkv.runtime.video import open_writer
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.engine import Engine
from forcingkv.serve.job_store import INTERRUPTED, Job, JobStore
from forcingkv.serve.refusals import RefusalError, refusal_of
from forcingkv.serve.seat import Seat

LOOK = 5.0
"""Seconds between two looks at whether another replica died, or the table can be written again."""
log = logging.getLogger("forcingkv.serve")


class Jobs:
    """The jobs of a service. Those that waited when it was stopped go on waiting, in another replica too."""

    def __init__(self, engine: Engine, store: JobStore) -> None:
        self._engine, self.store = engine, store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._at_work: set[str] = set()
        """Those that have a place: they are stopped between chunks."""
        self._coming = 0
        """Those that are being written to the table."""
        self._stopped: set[str] = set()
        self._looking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Take up what waits; from now on also what replicas leave that die."""
        for job in self.store.take_over():
            self._follow(job, self._engine.client(job.client, let_in=True))
        if self._engine.replica:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            try:
                left = await self._engine.aside(self.store.take_over)
            except sqlite3.Error as error:  # such as a full disk: it is looked again
                log.error("the table of jobs cannot be used: %s", error)
                continue
            for job in left:
                self._follow(job, self._engine.client(job.client, let_in=True))

    async def add(self, job: Job) -> Job:
        """A job of a client. Raises RefusalError where it has too many, or too many wait."""
        limits, places = self._engine.limits, self._engine.places
        with ExitStack() as counted:
            counted.enter_context(self._engine.client(job.client))
            there = len(self._tasks) + self._coming
            if there >= limits.waiting + places.most:
                raise RefusalError("busy", f"{there} jobs wait already.", places.wait(there) or 30.0)
            self._coming += 1  # before anything is waited for: many may ask at once
            try:
                job = await self._engine.aside(self.store.add, job)
            finally:
                self._coming -= 1
            self._follow(job, counted.pop_all())
        return job

    async def remove(self, name: str) -> None:
        """Remove a job, and stop it where it is at work."""
        self._stopped.add(name)
        try:
            if task := self._tasks.get(name):
                if name not in self._at_work:
                    task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await self._engine.aside(self.store.remove, name)
        finally:
            self._stopped.discard(name)

    async def drain(self, until: float) -> None:
        """End all: those that wait go on waiting on disk. Those at work may go on until then
        (`time.monotonic`), and are said to be interrupted."""
        for name, task in list(self._tasks.items()):
            if name not in self._at_work:
                task.cancel()
        if self._looking:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()), timeout=max(until - time.monotonic(), 0.0))
        self._stopped |= self._tasks.keys()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _follow(self, job: Job, counted: AbstractContextManager[Any]) -> None:
        if job.id in self._tasks:  # found in the table by two
            return
        task = self._tasks[job.id] = asyncio.create_task(self._run(job, counted))
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def _run(self, job: Job, counted: AbstractContextManager[Any]) -> None:
        """Wait for a place, make the video, and say how that went."""
        with counted:
            await self._run_counted(job)

    async def _run_counted(self, job: Job) -> None:
        try:
            bundle = self._engine.bundle(job.bundle)
            seat = Seat(self._engine, bundle)
            try:
                session = await seat.take(let_in=True)
                if self._engine.draining:  # it goes on waiting, on disk
                    return
                self._at_work.add(job.id)
                await self._make(job, bundle, session)
            finally:
                seat.give_back()
        except Exception as error:
            refusal = refusal_of(error)
            if not refusal.is_the_clients:
                log.exception("job failed", extra={"job": job.id})
            await self._fail(job, refusal)
        finally:
            self._at_work.discard(job.id)

    async def _make(self, job: Job, bundle: ServedBundle, session: Session) -> None:
        """Make the video of a job; it is there under its name once it is whole."""
        engine, store = self._engine, self.store
        if not await self._change(job, status="in_progress"):
            return
        prompt = await engine.prompt(bundle, job.prompt)
        video = await engine.make(session.generate, prompt, seed=job.seed, chunks=job.chunks)
        said = {"title": job.prompt, "forcingkv_bundle": bundle.name, "forcingkv_seed": str(job.seed)}
        with store.unfinished(job.id) as path:
            with open_writer(path, fps=session.spec.fps, metadata=said) as writer:
                while (chunk := await engine.make(next, video, None)) is not None:
                    await engine.aside(writer.write, chunk.frames)
                    there = await self._change(job, made=video.index)
                    engine.metrics.frames.labels(bundle.name).inc(len(chunk.frames))
                    if job.id in self._stopped or not there:
                        raise RefusalError("interrupted", INTERRUPTED)
            await engine.aside(os.replace, path, store.video(job.id))
        await self._change(job, status="completed", completed=int(time.time()))
        engine.metrics.jobs.labels("completed").inc()
        log.info("job completed", extra={"job": job.id, "chunks": job.chunks})

    async def _fail(self, job: Job, refusal: RefusalError) -> None:
        """Say in the table why it failed.

        Where that cannot be written it is tried again: a job that is not at work must not look as if it were.
        """
        self._engine.metrics.jobs.labels("failed").inc()
        said = {"code": refusal.code, "message": refusal.message, "completed": int(time.time())}
        while True:
            try:
                await self._change(job, status="failed", **said)
            except sqlite3.Error as error:
                log.error("the table of jobs cannot be written: %s", error, extra={"job": job.id})
                if job.id in self._stopped:  # whoever begins next finds that it was cut off
                    return
                await asyncio.sleep(LOOK)
            else:
                return

    async def _change(self, job: Job, **values: Any) -> bool:
        return await self._engine.aside(partial(self.store.change, job.id, **values))
