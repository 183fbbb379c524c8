"""What attention loses to a cache of fewer bits: the error of its output, by role and by rounding.

    python studies/codes_on_demo.py [--seeds 0,1] [--json]

Videos of the demo model under the policy full, exact. In a chunk of the last phase the attention of every
head is computed again with some of the keys and values rounded: the root mean square of the difference, over
that of the output. All that is cached is rounded, keys alone, values alone, or the frames of a role alone;
also in ways that the product does not have. Beside them the same of random numbers whose keys are as those of
large models are, with channels that differ in size: heads of 128 channels, pairs of channels as large as
exp(N(0, 1)), one in 32 of them 8 times that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.commands.console import default_prompts
from forcingkv.models.checkpoint import build_model, load_weights
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import Cache
from forcingkv.models.kv_codes import decoded, encoded
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import Attend, KeysValues
from forcingkv.runtime.kv.codes import CODINGS, Coding
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import CLEAN_PASS
from forcingkv.runtime.text import encode_words

CHUNK = 7
"""Whose attention is looked at: the window is full."""
NEWEST = 3
"""Frames that are the newest, the others are old."""
Rounding = Callable[[Tensor], Tensor]
"""Numbers (..., tokens, channels) -> what is read of them."""
Attention = tuple[Tensor, KeysValues, KeysValues, int]
"""Queries, what is cached, the chunk's own, tokens of a frame."""


def coded(coding: Coding) -> Rounding:
    """As the product does it."""
    return lambda x: decoded(*encoded(x, coding), coding, x.dtype)


def between_extremes(group: int) -> Rounding:
    """Four bits of a group of channels, 0 the least number and 15 the largest: with a zero point."""

    def rounded(x: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, (-1, group))
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        return (((parts - low) / scale).round() * scale + low).flatten(-2)

    return rounded


def by_channel(rounding: Rounding, tokens: int) -> Rounding:
    """The same of groups of tokens, each channel by itself (KIVI's keys)."""

    def rounded(x: Tensor) -> Tensor:
        frames = torch.unflatten(x, -2, (-1, tokens)).transpose(-1, -2)
        return rounding(frames).transpose(-1, -2).flatten(-3, -2)

    return rounded


def roundings(tokens: int) -> dict[str, tuple[float, Rounding, Rounding]]:
    """Name -> bits of a number with scales of 16 bits, in heads of 128; of keys; of values."""
    four = coded(CODINGS["int4"])
    whole, small = (coded(Coding(7, group=size, in_a_byte=2)) for size in (None, 16))
    channels, zeros = coded(Coding(7)), between_extremes(32)
    kivi = by_channel(lambda x: between_extremes(x.shape[-1])(x), tokens)
    return {
        "int8 (product)": (8 + 16 / 128, coded(CODINGS["int8"]), coded(CODINGS["int8"])),
        "fp8 (product)": (8 + 16 / 128, coded(CODINGS["fp8"]), coded(CODINGS["fp8"])),
        "int4 by 32 channels (product)": (4 + 16 / 32, four, four),
        "int4 by 16 channels": (4 + 16 / 16, small, small),
        "int4 by all channels": (4 + 16 / 128, whole, whole),
        "int4 by 32 channels, zero point": (4 + 32 / 32, zeros, zeros),
        "int4 keys by channel of a frame": (4 + 16 / 64, by_channel(channels, tokens), four),
        "int4 keys by channel, zero points (KIVI)": (4 + 32 / 48, kivi, zeros),
    }


def lost(
    attention: Attention, exact: Tensor, keys: Rounding, values: Rounding, part: slice, of: Sequence[str]
) -> float:
    """Root mean square of what changes, over that of the exact output, where keys or values of the tokens
    `part` of the cache are rounded."""
    queries, held, own, _ = attention
    made = KeysValues(*(one.clone() for one in held))
    for name, rounding in (("keys", keys), ("values", values)):
        if name in of:
            one = getattr(made, name)
            one[:, :, part] = rounding(one[:, :, part])
    found = _attended(queries, made, own)
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _attended(queries: Tensor, held: KeysValues, own: KeysValues) -> Tensor:
    keys, values = (torch.cat(pair, 2) for pair in zip(held, own, strict=True))
    return F.scaled_dot_product_attention(queries, keys, values)


def of_the_demo(seeds: Sequence[int]) -> list[Attention]:
    """The attention of every layer in the first and the clean pass of a chunk."""
    spec = load_spec("demo")
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    model, prompts = build_model(spec, load_weights(spec)), default_prompts("demo")
    found: list[Attention] = []

    def watch(chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        if (chunk, step) not in ((CHUNK, 0), (CHUNK, CLEAN_PASS)):
            return attend

        def seen(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            held = cache[layer][0].values()
            joined = KeysValues(*(torch.cat(part, 2) for part in zip(*held, strict=True)))
            found.append((queries, joined, current, plan.frame_tokens))
            return attend(layer, queries, current)

        return seen

    for seed in seeds:
        text = torch.from_numpy(encode_words(spec, prompts[seed % len(prompts)]))
        for _ in generate(model, plan, text, seeded_noise(plan, seed), CHUNK + 1, watch):
            pass
    return found


def with_large_channels(count: int) -> list[Attention]:
    """Random queries, keys and values of 4 heads; see above."""
    generator = np.random.default_rng(0)

    def drawn(tokens: int, size: npt.NDArray[np.float64] | float = 1.0) -> Tensor:
        return torch.from_numpy(generator.standard_normal((4, tokens, 128)) * size).float()[None]

    made: list[Attention] = []
    for _ in range(count):
        size = np.exp(generator.standard_normal((4, 1, 64)))
        size = np.repeat(size * np.where(generator.random((4, 1, 64)) < 1 / 32, 8, 1), 2, -1)
        root = np.sqrt(size / np.sqrt(np.square(size).mean(-1, keepdims=True)))  # of queries and of keys
        held, own = (KeysValues(drawn(tokens, root), drawn(tokens)) for tokens in (864, 144))
        made.append((drawn(144, root), held, own, 48))
    return made


def table(attentions: Sequence[Attention]) -> dict[str, dict[str, float]]:
    """Of each rounding what is lost: in all that is cached, in keys and in values alone, in frame 0, in the
    newest frames and in those between."""
    tokens = attentions[0][3]
    cached = attentions[0][1].keys.shape[2]
    everything, newest = slice(0, cached), slice(cached - NEWEST * tokens, cached)
    known = [(one, _attended(*one[:3])) for one in attentions]
    parts = {
        "all": (everything, ("keys", "values")),
        "keys": (everything, ("keys",)),
        "values": (everything, ("values",)),
        "frame 0": (slice(0, tokens), ("keys", "values")),
        "old": (slice(tokens, cached - NEWEST * tokens), ("keys", "values")),
        "newest 3": (newest, ("keys", "values")),
    }
    return {
        name: {"bits": round(bits, 2)}
        | {
            what: float(np.mean([lost(*one, keys, values, part, of) for one in known]))
            for what, (part, of) in parts.items()
        }
        for name, (bits, keys, values) in roundings(tokens).items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found = {"demo": table(of_the_demo(seeds)), "large channels": table(with_large_channels(4))}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for what, rows in found.items():
        columns = list(next(iter(rows.values())))
        print(f"\n{what:<42}" + "".join(f"{column:>10}" for column in columns))
        for name, row in rows.items():
            cells = "".join(f"{row[c]:>10.2f}" if c == "bits" else f"{row[c]:>10.2%}" for c in columns)
            print(f"{name:<42}{cells}")


if __name__ == "__main__":
    main()
