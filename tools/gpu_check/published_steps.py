"""The published comparison on the card at hand: `full` against `forcing-kv`, beside what `plan` predicts."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcingkv.export import export_bundle
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.bench.cases import typical_layers
from forcingkv.measure.nominal import nominal_map
from forcingkv.measure.planner.gpus import Gpu, gpu_names, load_gpu
from forcingkv.measure.planner.published import published_data
from forcingkv.measure.planner.report import plan_report
from forcingkv.models.checkpoint import random_weights, weight_shapes
from forcingkv.models.decoders import StreamingDecoder, decoder_for
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.faults import MemoryShortError, SessionError
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.pass_timer import PassTimer
from forcingkv.runtime.spec import ModelSpec
from tools.gpu_check.check import Check

MODEL, POLICIES = "self-forcing", ("full", "forcing-kv")
PUBLISHED = {"fps": 29.0, "480p": 1.50, "1080p": 2.82}
"""From the abstract of arXiv 2605.09681: over 29 frames a second on an H200 (of which model is not said), and
the speedups on Self Forcing. Frames there are 4 x latent frames; text and decoding are left out."""
EAGER: dict[str, Any] = {}
GRAPHS: dict[str, Any] = {"cuda_graphs": True}
COMPILED: dict[str, Any] = {"compiled": True}
ORDER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("480p", "eager", EAGER),
    ("480p", "CUDA graphs", GRAPHS),
    ("1080p", "eager", EAGER),
    ("480p", "compiled", COMPILED),
    ("480p", "compiled, CUDA graphs", COMPILED | GRAPHS),
    ("1080p", "CUDA graphs", GRAPHS),
    ("720p", "eager", EAGER),
    ("720p", "compiled, CUDA graphs", COMPILED | GRAPHS),
    ("1080p", "compiled, CUDA graphs", COMPILED | GRAPHS),
)
"""By what each tells: resolution, name, options of the session."""
LEAST = {"480p": 20.0, "720p": 35.0, "1080p": 50.0}
"""Seconds without which a part is not begun: a guess, of nothing measured."""
ROUNDS, ROUND_SECONDS = 7, 6.0
"""Turns of both policies: at most so many, and none is begun after so long."""
STREAMED = 3
"""Chunks at the end of a video that are timed as they come."""
SMALL = "64x64"
"""The resolution on a stand-in for the GPU."""


def published(check: Check) -> None:
    """All layers in bfloat16 with random weights, policies in turns; each part is told when it is known."""
    spec, decoder = decoder_for(load_spec(MODEL), "taehv", None, random=True)
    assert decoder is not None
    order, layers = ORDER, spec.layers
    if not check.gpu:
        check.stands_in(f"torch on the CPU, one layer of {spec.layers}, at {SMALL}")
        order, layers = ((SMALL, "eager", EAGER),), 1
    wrong = []
    with TemporaryDirectory(prefix="forcingkv-published-") as place:
        study = Study(check, spec, decoder, layers, Path(place))
        for resolution, name, options in order:
            part = f"{resolution} {name}"
            if check.left < LEAST.get(resolution, 0):
                check.part(part, "skipped", why=f"{check.left:.0f} s are left")
                continue
            try:
                check.part(part, **study.measure(resolution, options))
            except (InputError, MemoryShortError) as error:  # too little memory or room on the disk
                check.part(part, "skipped", why=str(error)[:400])
            except Exception as error:
                wrong.append(part)
                check.part(part, "failed", why=f"{type(error).__name__}: {error}"[:400])
    check.expect(not wrong, f"parts that failed: {', '.join(wrong)}")


class SameLayers(Mapping[str, Tensor]):
    """Random weights, the same in every layer: drawing 30 layers' takes longer than timing them."""

    def __init__(self, spec: ModelSpec) -> None:
        self._names, self._drawn = weight_shapes(spec), random_weights(replace(spec, layers=1))
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        first = re.sub(r"^blocks\.\d+\.", "blocks.0.", name)
        if first not in self._held:
            self._held[first] = self._drawn[first]
        return self._held[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Study:
    """What is timed, and what the parts have in common."""

    check: Check
    spec: ModelSpec
    decoder: StreamingDecoder
    layers: int
    place: Path
    bundles: dict[tuple[str, str], Path] = field(default_factory=dict)

    def bundle(self, resolution: str, policy: str) -> Path:
        """The bundle of a policy, made when it is first asked for."""
        key = resolution, policy
        if key not in self.bundles:
            loaded = load_policy(policy)
            heads = nominal_map(self.spec, loaded)
            part, fitted, headmap = typical_layers(self.spec, loaded, heads, self.layers)
            out = self.place / f"{resolution}-{policy}"
            dtype: Any = "bfloat16" if self.check.gpu else "float32"
            export_bundle(
                part,
                SameLayers(part),
                fitted,
                out,
                headmap=headmap,
                resolution=resolution,
                decoder=self.decoder,
                dtype=dtype,
                target="torch",
            )
            self.bundles[key] = out
        return self.bundles[key]

    def measure(self, resolution: str, options: dict[str, Any]) -> dict[str, Any]:
        """Both policies in turns, at the length that caches come to rest at; figures for one line."""
        began, device = time.perf_counter(), "cuda" if self.check.gpu else "cpu"
        paths = {policy: self.bundle(resolution, policy) for policy in POLICIES}
        made = time.perf_counter() - began
        with ExitStack() as stack:
            sessions = {
                policy: stack.enter_context(
                    Session.open(path, backend="torch", device=device, frames="device", **options)
                )
                for policy, path in paths.items()
            }
            timed = {policy: Timed(session) for policy, session in sessions.items()}
            warm = time.perf_counter()
            for one in timed.values():
                one.warm(3 if self.check.gpu else 0)
            warm = time.perf_counter() - warm
            turns = time.perf_counter()
            for number in range(ROUNDS if self.check.gpu else 1):
                if number and (time.perf_counter() - turns > ROUND_SECONDS or self.check.left < 10):
                    break
                for one in timed.values():
                    one.turn()
            found = {policy: one.figures() for policy, one in timed.items()}
            for policy, session in sessions.items():
                if self.check.gpu and self.check.left > 15 and resolution == "480p":
                    found[policy] |= self._streamed(session)
            runs_on = sessions[POLICIES[0]].runs_on
            memory = torch.cuda.max_memory_allocated() if self.check.gpu else None
        full, pruned = (found[policy] for policy in POLICIES)
        return {
            "policies": found,
            "speedup": full["chunk_seconds"] / pruned["chunk_seconds"],
            "speedup_with_decoding": pruned["fps_with_decoding"] / full["fps_with_decoding"],
            "published": _published(resolution),
            "plan": self._predicted(resolution),
            "layers": self.layers,
            "runs_on": runs_on,
            "seconds": {"exports": made, "warming up": warm, "all": time.perf_counter() - began},
            "most_memory_bytes": memory,
        }

    def _streamed(self, session: Session) -> dict[str, Any]:
        """Frames a second as they come out of a video, decoding beside the passes of the next chunk."""
        spec, last = session.spec, session.plan.phases[-1].first_chunk
        text = np.random.default_rng(0).standard_normal((1, spec.text_length, spec.text_width), np.float32)
        came = []
        try:
            for _ in session.generate(text, seed=0, chunks=last + STREAMED + 1):
                came.append(time.perf_counter())
        except SessionError as error:  # random weights may lead anywhere
            return {"streamed": f"{type(error).__name__}: {error}"[:200]}
        return {"fps_streamed": _frames(spec) * STREAMED / (came[-1] - came[-1 - STREAMED])}

    def _predicted(self, resolution: str) -> dict[str, Any]:
        """What `plan` says of this GPU, for the last phase of the cache as it is timed here."""
        gpu = known_gpu(self.check.machine.gpu)
        if gpu is None:
            return {"why_none": f"no data sheet of {self.check.machine.gpu or 'a CPU'} is known"}
        policies = [load_policy(policy) for policy in POLICIES]
        rows = plan_report(self.spec, policies, [gpu], resolution=resolution)["policies"]
        seconds = {row["policy"]: row["gpus"][0]["chunk_seconds"] for row in rows}
        return {
            "gpu": gpu.key,
            "fps": {policy: _frames(self.spec) / took for policy, took in seconds.items()},
            "speedup": seconds["full"] / seconds["forcing-kv"],
        }


def _published(resolution: str) -> dict[str, Any]:
    rows = [one["row"] for one in published_data()["rows"]]
    of = [row for row in rows if row["model"] == MODEL and row["resolution"] == resolution]
    figures = [
        {key: row[key] for key in ("name", "policy", "measure", "published", "gpu")}
        for row in of
        if row["policy"] in POLICIES
    ]
    return {"speedup": PUBLISHED.get(resolution), "fps_of_forcing_kv": PUBLISHED["fps"], "rows": figures}


ALSO = {
    *("nvidia", "geforce", "sxm", "sxm4", "sxm5", "80gb", "141gb", "180gb", "hbm3", "hbm3e"),
    *("blackwell", "workstation", "server", "edition"),
}
"""Words that drivers say beside the name of a card with a data sheet here; others make it another card."""


def known_gpu(name: str | None) -> Gpu | None:
    """The GPU that a driver calls so, among those that have a data sheet here."""
    words = re.sub(r"[^a-z0-9]+", " ", (name or "").lower()).split()
    keys = {key: key.split("-") for key in gpu_names()}
    for key, own in keys.items():
        if set(own) <= set(words) and not set(words) - set(own) - ALSO:
            return load_gpu(key)
    return None


def _frames(spec: ModelSpec) -> int:
    """Pixel frames of a chunk as published figures count them."""
    return spec.frames_per_chunk * spec.decoder.temporal_stride


@dataclass
class Timed:
    """A session's passes as they are in the last phase of its cache."""

    session: Session
    denoise: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._timer: PassTimer = self.session.pass_timer(self.session.plan.phases[-1].first_chunk)

    def warm(self, times: int) -> None:
        """Run each kind untimed: in three times it is loaded and compiled, captured, and replayed."""
        for run in (self._timer.denoise, self._timer.fill, self._timer.decode):
            for _ in range(times):
                run()

    def turn(self) -> None:
        """Time each kind once."""
        self.denoise.append(self._timer.denoise())
        self.clean.append(self._timer.fill())
        self.decode.append(self._timer.decode())

    def figures(self) -> dict[str, Any]:
        """Medians over the turns, and what they come to for a chunk."""
        spec = self.session.spec
        denoise, clean, decode = (statistics.median(one) for one in (self.denoise, self.clean, self.decode))
        chunk = (len(spec.schedule.later) + spec.schedule.clean_passes - 1) * denoise + clean
        return {
            "pass_seconds": denoise,
            "clean_pass_seconds": clean,
            "decode_seconds": decode,
            "chunk_seconds": chunk,
            "fps": _frames(spec) / chunk,
            "fps_with_decoding": _frames(spec) / (chunk + decode),
            "turns": len(self.denoise),
            "cache_bytes": self._timer.cache_bytes,
        }
