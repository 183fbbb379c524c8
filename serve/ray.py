"""The service as a deployment of Ray Serve: replicas on several GPUs or machines, behind one address.

    serve run forcingkv.serve.ray:app bundles=/shared/forcing-kv,/shared/full data=/shared/served replicas=2

Bundles and the folder are places that all replicas see. A connection stays with its replica; a client that
lost it and reaches another one is led to its session (`serve/relay.py`). Where a replica dies its sessions
are gone; states that they saved are in the folder, and any replica goes on from them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Bundle
from forcingkv.runtime.footprint import footprint, readable
from forcingkv.runtime.ray_cluster import off_gpus, room, takes_gpu
from forcingkv.serve.app import make_app
from forcingkv.serve.bundles import BundleChoice
from forcingkv.serve.logs import log_to_stderr
from forcingkv.serve.run import open_service
from forcingkv.serve.settings import TOKEN, Settings

NAME = "forcingkv"
OPTIONS = (
    "bundles",
    "data",
    "replicas",
    "sessions",
    "threads",
    "device",
    "backend",
    "origins",
    "hosts",
    "embeds",
)
SOCKETS = 4096
"""Connections of one replica, which Ray counts as requests: a socket is one for as long as it is open."""


def app(args: Mapping[str, Any]) -> serve.Application:
    """What `serve run` and `serve deploy` build: `deployment` of options that are words.

    `bundles` (folders, or NAME=FOLDER, with commas) and `data` are needed. The token is that of the
    environment. Raises InputError for options that are not known, or not of their kind.
    """
    if unknown := sorted(set(args) - set(OPTIONS)):
        raise InputError(f"is not known: {unknown[0]}", where="the options", expected=", ".join(OPTIONS))
    for name in ("bundles", "data"):
        if not args.get(name):
            raise InputError("is not given", where=name, expected=f"{name}=...")

    def number(name: str) -> int | None:
        text = str(args.get(name, ""))
        if text and not (text.isascii() and text.isdigit() and int(text)):
            raise InputError(f"is {text!r}", where=name, expected="a whole number from 1 on")
        return int(text) if text else None

    def words(name: str) -> tuple[str, ...]:
        return tuple(part for part in str(args.get(name, "")).split(",") if part)

    choices = []
    for one in words("bundles"):
        name, equals, place = one.partition("=")
        folder = Path(place if equals else one)
        embeds = Path(args["embeds"]) if args.get("embeds") else None
        choices.append(BundleChoice(name if equals else folder.resolve().name, folder, embeds))
    settings = Settings(
        data=Path(args["data"]),
        token=os.environ.get(TOKEN) or None,
        origins=words("origins"),
        hosts=words("hosts"),
        sessions=number("sessions") or Settings.sessions,
        backend=args.get("backend") or None,
        device=args.get("device") or None,
        threads=number("threads"),
    )
    return deployment(choices, settings, number("replicas"))


def deployment(
    choices: Sequence[BundleChoice], settings: Settings, replicas: int | None = None
) -> serve.Application:
    """The service with so many replicas; None: as many as there are GPUs for, or memory and cores.

    Each replica has all bundles, and an equal share of the memory there is. `settings.host` is where replicas
    listen to each other: 127.0.0.1 on one machine, else an address of theirs (0.0.0.0 is none).

    Raises InputError where a replica does not fit, and as `Bundle.open` does.
    """
    on_gpu = takes_gpu(settings.backend, settings.device)
    threads = settings.threads or 1
    least = memory_of(choices)
    whole = int(ray.cluster_resources().get("memory", 0))
    if on_gpu:
        count = replicas or room("GPU", 1)
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1}
    else:
        count = replicas or min(room("CPU", threads), max(1, whole // least))
        needs = {"num_cpus": threads, "memory": whole // count}
        if whole // count < least:
            what = f"{count} replicas of {readable(least)} do not fit into {readable(whole)}"
            raise InputError(what, where="replicas", expected=f"at most {whole // least}")
        on_torch = settings.backend == "torch" or (settings.backend is None and settings.device == "cpu")
        on_torch |= settings.backend is None and not all(
            Bundle.open(choice.folder).manifest.has_graphs for choice in choices
        )
        backend, device = off_gpus(settings.backend, settings.device, on_torch=on_torch)
        settings = replace(settings, memory=whole // count, backend=backend, device=device)
    secret = secrets.token_hex(16)

    def build() -> FastAPI:
        """The application of one replica, made in its process."""
        mine = replace(settings, replica=serve.get_replica_context().replica_id.unique_id, secret=secret)
        log_to_stderr()
        return make_app(lambda: open_service(mine, list(choices)))

    made = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=count,
        ray_actor_options=needs,
        max_ongoing_requests=SOCKETS,
        graceful_shutdown_timeout_s=settings.limits.drain + 15.0,
    )
    return made.bind()


def memory_of(choices: Sequence[BundleChoice]) -> int:
    """Bytes that a replica takes at least: the weights of all bundles, and one session of each."""
    total = 0
    for choice in choices:
        bundle = Bundle.open(choice.folder)
        total += sum(footprint(bundle.manifest, bundle.plan).values())
    return total
