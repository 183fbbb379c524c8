"""Moving averages in torch: against averages of keys before rotation, made from the whole video."""

from __future__ import annotations

import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models import kv_constants
from forcingkv.models.kv import advance, turn_of
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.kv.ema import Ema
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import Positions
from tests.conftest import small_spec
from tests.models.caches import advanced, rotated

FRAMES = 3


def plan_of(*roles: Role, positions: Positions = "relative", **changes: object) -> CachePlan:
    spec = small_spec(layers=1, sink_frames=1, positions=positions, **changes)
    return build_plan(spec, spec.geometry(), Policy("averages", "", {"all": roles}))


def averages(plan: CachePlan, role: Ema, raw: list[torch.Tensor], chunk: int) -> list[torch.Tensor]:
    """(heads, tokens, head_dim) of each average as the chunk sees it, by the rule, frame after frame."""
    group, count = plan.layers[0][0], len(role.rates)
    first = group.opening_frames(plan.spec) - count
    recent = next(one for one in group.roles if isinstance(one, Recent)).frames or 0
    held = raw[first : first + count]
    oldest, started = first + count, False
    for seen in range(1, chunk + 1):
        # Frames that a chunk finds: all before it. Those before the recent ones have left.
        if seen * FRAMES - recent - oldest < FRAMES:
            oldest = max(oldest, seen * FRAMES - recent)
            continue
        left = raw[oldest : oldest + FRAMES]
        oldest += FRAMES
        if role.of == "frames":
            mean = torch.stack(left).mean((0, 2), keepdim=False)[:, None].expand_as(left[0])
            left = [mean] * count
        rates = role.rates if started or role.starts == "first" else (1.0,) * count
        held = [old + rate * (new - old) for old, new, rate in zip(held, left, rates, strict=True)]
        started = True
    return held[: max(0, chunk * FRAMES - first)]


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    "roles",
    [
        (Sink(3), Ema((0.01, 0.1)), Recent(4)),
        (Ema((0.3, 0.2, 0.1), of="tokens", starts="first"), Recent(3)),
        (Sink(1), Ema((0.5,), starts="first"), Recent(1)),
        (Sink(1), Ema((0.5, 0.25, 0.1), of="tokens"), Recent(5)),
        (Ema((0.3,), of="tokens", starts="first"), Recent(4)),
    ],
    ids=["memrope", "reward forcing", "one, from a frame", "by tokens, from what leaves", "one rate for all"],
)
def test_averages_are_those_of_keys_before_rotation(roles: tuple[Role, ...], kind: Positions) -> None:
    plan = plan_of(*roles, positions=kind)
    group = plan.layers[0][0]
    ema = next(role for role in group.roles if isinstance(role, Ema))
    first, moved = ema.first_frame(plan, group), 0
    for chunk, cache, raw, _ in advanced(plan, 8):
        keys, values = cache[0][0][ema.name]
        wanted = averages(plan, ema, [one[0] for one in raw], chunk)
        assert keys.shape[2] == len(wanted) * plan.frame_tokens == ema.tokens(plan, group, chunk)
        for n, average in enumerate(wanted):
            part = slice(n * plan.frame_tokens, (n + 1) * plan.frame_tokens)
            at = rotated(average[None], plan, first + n)[0]
            torch.testing.assert_close(keys[0, :, part], at, atol=5e-6, rtol=0)
            torch.testing.assert_close(values[0, :, part], average, atol=2e-6, rtol=0)
        moved += first_position(plan, chunk, chunk) != chunk * FRAMES
    assert bool(moved) == (kind == "relative")


def test_a_small_rate_moves_averages_of_a_model_in_half_precision() -> None:
    """bfloat16 would stand still: a thousandth is less than half of its last digit."""
    plan = plan_of(Sink(1), Ema((0.001,)), Recent(2))
    made = [cache[0][0] for _, cache, _, _ in advanced(plan, 6, like=torch.zeros((), dtype=torch.bfloat16))]
    assert [held["ema"].keys.dtype for held in made] == [torch.float32] * 6
    assert {held["recent"].keys.dtype for held in made} == {torch.bfloat16}
    before, after = (held["ema"].keys for held in made[-2:])
    change = (after - before).abs().mean() / before.abs().mean()
    assert 1e-4 < change < 1e-2


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((Sink(1), Ema((0.1,))), "frames that leave the recent ones, and there are none"),
        ((Ema((0.1, 0.1), of="tokens"), Recent(3)), "2 averages are made token by token of the 3 frames"),
        ((Sink(10), Ema((0.1, 0.2, 0.3)), Recent(1)), "sink and averages take the place of 13 frames"),
    ],
)
def test_what_does_not_fit_is_refused(roles: tuple[Role, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(*roles)


@pytest.mark.parametrize(
    ("rates", "message"),
    [((), "has 0 rates"), ((1.5,), "rates is 1.5; expected 0 to 1"), ((float("nan"),), "expected 0 to 1")],
)
def test_rates_are_shares(rates: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ema(rates)


def test_nothing_comes_from_the_host_in_a_second_clean_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is captured as a CUDA graph can copy nothing: all is on the device since the first."""
    plan = plan_of(Sink(3), Ema((0.01, 0.1)), Merged(4, 2, 2), Strided(6, 2), Recent(4))
    *_, (chunk, cache, _, _) = advanced(plan, 9)
    shape = 1, plan.spec.heads, plan.chunk_tokens, plan.spec.head_dim
    new = [KeysValues(torch.ones(shape), torch.ones(shape))]
    rows = {name: torch.from_numpy(told) for name, told in plan.rows(chunk).items()}
    tables = map(torch.from_numpy, positions.rotary(plan.spec, plan.geometry, 9, 3))
    given = {"rows": rows, "rotary": tuple(tables), "turn": turn_of(plan, chunk, torch.device("cpu"))}
    monkeypatch.setattr(kv_constants, "_KEPT", {})
    known, _ = advance(plan, cache, new, chunk=None, **given)  # type: ignore[arg-type]
    for name in ("from_numpy", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, None)
    again, _ = advance(plan, cache, new, chunk=None, **given)  # type: ignore[arg-type]
    for name, held in known[0][0].items():
        assert torch.equal(held.keys, again[0][0][name].keys)
