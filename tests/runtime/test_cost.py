"""Operations of a pass: equal to those torch counts when the model runs, and to published shares."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forcingkv.models.generate import generate, latent_shape, seeded_noise
from forcingkv.models.kv import Cache, attend_cache, empty_cache
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime.cost import chunk_flops, pass_flops
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import FilledBy
from forcingkv.runtime.spec import ModelSpec, Schedule
from tests.conftest import headmap_of, random_model, small_spec

POLICIES = ("full", "window", "forcing-kv")


def plan_of(spec: ModelSpec, policy: str, resolution: str | None = None) -> CachePlan:
    """Every other head static; layer 2, if there is one, has no static head and layer 3 no dynamic one."""
    static = [list(range(0, spec.heads, 2)) for _ in range(spec.layers)]
    static[2:4] = [[], list(range(spec.heads))]
    return build_plan(spec, spec.geometry(resolution), load_policy(policy), headmap_of(spec, static))


def time_embedding(spec: ModelSpec) -> int:
    """Left out of a pass: three products with a single vector, whatever the number of tokens."""
    return 2 * (spec.time_width * spec.dim + spec.dim**2 + spec.dim * 6 * spec.dim)


def prompt_projection(spec: ModelSpec) -> int:
    """Left out of a pass, since it is done once a video: text embedding, cross-attention keys and values."""
    embedding = 2 * spec.text_length * (spec.text_width * spec.dim + spec.dim**2)
    return embedding + 2 * spec.text_length * spec.layers * 2 * spec.dim**2


def steady_cache(plan: CachePlan, like: torch.Tensor) -> Cache:
    """A cache as the last phase has it, of any content."""
    chunk = plan.phases[-1].first_chunk

    def held(heads: int, tokens: int) -> KeysValues:
        shape = (1, heads, tokens, plan.spec.head_dim)
        return KeysValues(like.new_zeros(shape), like.new_zeros(shape))

    return [
        [{role.name: held(g.heads, plan.tokens(g, role, chunk)) for role in g.roles} for g in groups]
        for groups in plan.layers
    ]


def counted(model: WanModel, plan: CachePlan, device: str = "cpu") -> dict[str, int]:
    """What torch counts in one pass: in all, and in attention over keys."""
    spec = plan.spec
    like = torch.empty(0, device=device)
    latents = like.new_zeros(latent_shape(plan))
    rotary = (like.new_zeros(plan.chunk_tokens, spec.head_dim // 2),) * 2
    prompt = [
        KeysValues(*(like.new_zeros(1, spec.heads, spec.text_length, spec.head_dim),) * 2)
    ] * spec.layers
    time = like.new_zeros(1, 1, spec.time_width)
    attend = attend_cache(plan, steady_cache(plan, like))
    # Of scaled dot product attention torch counts the parts, two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, time, rotary, prompt, attend)
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(n for operator, n in by_operator.items() if "bmm" in str(operator))
    return {"total": counter.get_total_flops(), "attention": attention}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("changes", [{}, {"sink_frames": 3, "attended_frames": 9}])
def test_a_pass_costs_what_torch_counts(policy: str, changes: dict[str, object]) -> None:
    spec = small_spec(**changes)
    plan = plan_of(spec, policy)
    found = pass_flops(plan)
    torch_counts = counted(random_model(spec), plan)
    assert torch_counts["total"] == found.total + time_embedding(spec)
    assert torch_counts["attention"] == found.attention + found.cross


def test_so_does_a_pass_of_the_public_model() -> None:
    """The 1.3B model at 480p, without memory: torch counts shapes on the device `meta`."""
    spec = load_spec("self-forcing")
    plan = plan_of(spec, "forcing-kv")
    with torch.device("meta"):
        model = WanModel(spec)
    found = pass_flops(plan)
    assert counted(model, plan, "meta")["total"] == found.total + time_embedding(spec)
    assert time_embedding(spec) / found.total < 1e-5


@pytest.mark.parametrize("context", ["clean", "last"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_video_costs_what_its_chunks_cost(policy: str, context: FilledBy) -> None:
    """Every chunk of every phase, the clean passes too; the choice of segments makes no products."""
    spec = small_spec(attended_frames=9, schedule=Schedule((1000.0,), context=context))
    plan = plan_of(spec, policy)
    chunks = plan.phases[-1].first_chunk + 1
    text = torch.zeros(1, spec.text_length, spec.text_width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(generate(random_model(spec), plan, text, seeded_noise(plan, 0), chunks))
    passes = chunks * (len(spec.schedule.later) + (context == "clean"))
    left_out = prompt_projection(spec) + passes * time_embedding(spec)
    assert counter.get_total_flops() == sum(chunk_flops(plan, c) for c in range(chunks)) + left_out
    assert chunk_flops(plan) == chunk_flops(plan, chunks - 1)


def test_the_first_chunk_attends_to_itself_alone() -> None:
    spec = small_spec()
    plan = plan_of(spec, "full")
    own = 4 * plan.chunk_tokens**2 * spec.dim * spec.layers
    assert pass_flops(plan, 0).attention == own
    assert [pass_flops(plan, chunk).attention // own for chunk in range(7)] == [1, 2, 3, 4, 5, 5, 5]
    assert empty_cache(plan, torch.empty(0))[0][0]["recent"].keys.shape[2] == 0


def test_forcing_kv_costs_five_frames_a_static_head_and_six_a_dynamic_one() -> None:
    spec = load_spec("self-forcing")
    full, forcing = (plan_of(spec, policy) for policy in ("full", "forcing-kv"))
    frames = pass_flops(forcing).attention * 21 / pass_flops(full).attention
    # Layer 0 is not split, layer 2 has no static head and layer 3 no dynamic one; the others have halves.
    assert frames * 30 == pytest.approx(5 + 6 + 5 + 27 * 5.5)
    assert pass_flops(forcing).linear == pass_flops(full).linear
    assert pass_flops(forcing).cross == pass_flops(full).cross


def test_attention_takes_shares_like_the_published_ones() -> None:
    """The paper measured 24%, 61% and 89% of a block's time "as the sequence grows" (docs/method.md),
    without saying at which sizes. Of operations it is 25% in the first chunk at 480p and 70% in the last
    phase, 43 to 84% at 720p, and 63 to 92% at 1080p, so the published shares are those of videos that
    begin at 480p and go on to 1080p."""
    spec = load_spec("self-forcing")
    shares = {}
    for resolution in spec.resolutions:
        plan = plan_of(spec, "full", resolution)
        found = [pass_flops(plan, chunk).attention_share for chunk in range(7)]
        assert found == sorted(found), "it grows with the history"
        assert found[-1] == pass_flops(plan).attention_share
        shares[resolution] = (round(found[0], 3), round(found[-1], 3))
    assert shares == {"480p": (0.249, 0.699), "720p": (0.434, 0.843), "1080p": (0.635, 0.924)}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_share_of_attention_grows_with_the_resolution(policy: str) -> None:
    spec = load_spec("self-forcing")
    shares = [pass_flops(plan_of(spec, policy, size)).attention_share for size in ("480p", "720p", "1080p")]
    assert shares == sorted(set(shares))
