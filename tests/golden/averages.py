"""Windows that remember what left them by moving averages: MemRoPE and Reward Forcing."""

from __future__ import annotations

from dataclasses import replace

from forcingkv.runtime.kv.ema import Ema
from forcingkv.runtime.kv.policies import ALL, Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.spec import ModelSpec
from tests.golden.files import GoldenError
from tests.golden.said import Said

MEMROPE, REWARD_FORCING = "memrope", "reward forcing"
"""What the kind of a policy begins with, in small letters."""
IN_WORDS = ("cache_order", "update", "keys")
"""Rules that stand in a file as sentences. Who runs it has read them, and latents show what else they say."""
METHODS = ("ema", "eviction")


def memrope(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy]:
    """A long and a short average behind the sink; by `eviction` none, and as many frames more."""
    method = said.need("method")
    if method not in METHODS:
        raise GoldenError(f"its method is {method!r}; known are {', '.join(METHODS)}")
    rates = (said.need("alpha_long"), said.need("alpha_short")) if method == "ema" else ()
    return _window(spec, said, (Ema(tuple(map(float, rates))),) if rates else (), sink=True)


def reward_forcing(spec: ModelSpec, said: Said) -> tuple[ModelSpec, Policy]:
    """A sink that is an average itself, token by token."""
    rates = (1.0 - float(said.need("alpha")),) * said.number("sink_frames", least=1)
    return _window(spec, said, (Ema(rates, of="tokens", starts="first"),), sink=False)


def _window(
    spec: ModelSpec, said: Said, averages: tuple[Ema, ...], *, sink: bool
) -> tuple[ModelSpec, Policy]:
    """Recent frames as many as are left of the window."""
    for name in IN_WORDS:
        said.get(name, None)
    frames, window = said.number("sink_frames"), said.number("window_frames")
    kept = frames if sink else 0
    recent = window - spec.frames_per_chunk - kept - sum(len(one.rates) for one in averages)
    spec = replace(spec, attended_frames=window, sink_frames=frames)
    roles: tuple[Role, ...] = (*((Sink(frames),) if sink else ()), *averages, Recent(recent))
    return spec, Policy("golden", "a window with averages", {ALL: roles})
