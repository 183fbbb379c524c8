"""What heads see until they are split (`early`, `opening`); and segments of several frames that leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.wan import WanModel
from forcingkv.prune.onnx_operators import check_choice
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.backends.torch_cache import JoinedCache
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import On
from tests.runtime.videos import PROMPT, assert_same, video_of

POLICY = """
name = "as before"
summary = "before the split all heads see the sink and two newest frames"
[groups]
static = [{ role = "sink", frames = 1 }, { role = "early", frames = 1 }, { role = "recent", frames = 1 }]
dynamic = [
    { role = "sink", frames = 1 },
    { role = "retained", segments = 4, ratio = 0.34 },
    { role = "recent", frames = 2 },
]
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    file = tmp_path_factory.mktemp("early") / "early.toml"
    file.write_text(POLICY)
    return load_policy(str(file))


def of_layers(**changes: object) -> ModelSpec:
    return small_spec(**({"layers": 2, "ar_start": 2} | changes))


def plan_of(policy: Policy, **changes: object) -> CachePlan:
    spec = of_layers(**changes)
    return build_plan(spec, spec.geometry(), policy, headmap_of(spec, [[0], [1, 2]]))


def frames_of(plan: CachePlan, chunks: int) -> list[list[int]]:
    """What static heads see beside their own chunk, and dynamic heads but for segments."""
    seen = []
    for chunk in range(chunks):
        for group in plan.layers[0]:
            roles = [role for role in group.roles if not role.chooses]
            spans = [span for role in roles for span in role.spans(plan, group, chunk, None)]
            seen.append([span.frame for span in spans])
    return seen


def test_heads_see_alike_until_they_are_split(policy: Policy) -> None:
    plan = plan_of(policy)
    assert frames_of(plan, 5) == [
        *([], []),
        *([0, 1, 2], [0, 1, 2]),
        *([0, 4, 5], [0, 4, 5]),
        *([0, 8], [0, 7, 8]),
        *([0, 11], [0, 10, 11]),
    ]
    lengths = [phase.length("static", "early") // plan.frame_tokens for phase in plan.phases]
    assert lengths == [0, 1, 0, 0]
    assert [phase.first_chunk for phase in plan.phases] == [0, 1, 3, 4]


def test_it_does_not_rest_before_the_split(policy: Policy) -> None:
    """Chunks of one frame: lengths are those of rest in chunk 2, which no early frame has reached yet."""
    groups = {"static": policy.groups["static"][1:], "dynamic": policy.groups["dynamic"][2:]}
    spec = of_layers(frames_per_chunk=1, attended_frames=4, ar_start=3)
    plan = build_plan(spec, spec.geometry(), Policy("a", "", groups), headmap_of(spec, [[0], [1, 2]]))
    assert frames_of(plan, 6)[::2] == [[], [0], [0, 1], [1, 2], [3], [4]]


def rival(name: str, ar_start: int = 1, **changes: object) -> CachePlan:
    """A shipped policy whose heads see alike until they are split; each of its groups has one of 3 heads."""
    spec, chosen = of_layers(ar_start=ar_start, **changes), load_policy(name)
    return build_plan(spec, spec.geometry(), chosen, map_for(chosen))


def map_for(policy: Policy) -> HeadMap:
    row = ("sink", "neighbour", "dummy") if "neighbour" in policy.groups else ("static", "static", "dynamic")
    return HeadMap(ModelIdentity("small", 2, 3), (row, row), Rule("given"))


def seen(plan: CachePlan, chunk: int) -> list[list[int]]:
    """The frames that each group sees beside its chunk, rising."""
    return [
        sorted(span.frame for role in group.roles for span in role.spans(plan, group, chunk, None))
        for group in plan.layers[0]
    ]


def test_dummy_forcing_sees_what_its_release_sees() -> None:
    """Frame 0 and the newest, then what each class sees; frame 0 is none of the newest of neighbour heads."""
    plan = rival("dummy-forcing", ar_start=2)
    assert seen(plan, 1) == [[0, 1, 2]] * 3
    assert seen(plan, 2) == [[0, 3, 4, 5]] * 3
    assert seen(plan, 3) == [[0], [6, 7, 8], [8]]
    assert seen(rival("dummy-forcing-6"), 2) == [[0], [1, 2, 3, 4, 5], [5]]


@pytest.mark.parametrize("name", ["forcing-kv-krea", "forcing-kv-krea-sink"])
def test_the_whole_history_until_the_split(name: str) -> None:
    plan, sink = rival(name, ar_start=3), [0] * name.endswith("sink")
    for chunk in (1, 2, 3):
        assert seen(plan, chunk) == [list(range(3 * chunk))] * 2
    assert seen(plan, 4) == [[*sink, 11], [*sink, 9, 10, 11]]
    # No further than the model attends: 15 frames with the chunk's own.
    assert seen(rival(name, ar_start=8), 8)[0] == sink + list(range(12 + len(sink), 24))


@pytest.mark.parametrize("name", ["dummy-forcing", "dummy-forcing-6", "forcing-kv-krea"])
def test_memory_is_taken_for_what_there_ever_is(name: str) -> None:
    """What sessions hold, on graphs and in place; and no more frames than there are before the split."""
    plan = rival(name)
    group = plan.layers[0][0]
    early = next(role for role in group.roles if role.name == "early")
    assert early.buffer_tokens(plan, group) == (2 * plan.frame_tokens,) * 2
    buffers = CacheBuffers(plan, OnnxLane({}), "float32")
    assert sum(plan.buffer_bytes_by_role("float32").values()) == buffers.nbytes
    joined = JoinedCache(plan, OnnxLane({}), "float32", torch.device("cpu"))
    assert sum(plan.joined_bytes_by_role("float32").values()) == joined.nbytes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("dummy-forcing", {"ar_start": 3}, marks=pytest.mark.long),
        ("dummy-forcing", {"ar_start": 2, "positions": "relative"}),
        pytest.param("dummy-forcing-6", {"ar_start": 1}, marks=pytest.mark.long),
        pytest.param("forcing-kv-krea-sink", {"ar_start": 2}, marks=pytest.mark.long),
        ("collected", {"ar_start": 2, "frames_per_chunk": 1, "attended_frames": 9}),
        pytest.param(
            "collected", {"ar_start": 4, "frames_per_chunk": 1, "attended_frames": 9}, marks=pytest.mark.long
        ),
    ],
)
def test_sessions_make_what_the_loop_makes_of_rivals(
    tmp_path: Path, on: On, name: str, changes: dict[str, object]
) -> None:
    if name == "collected":  # an opening of several chunks, and nothing but it and early frames beside it
        name = str(tmp_path / "collected.toml")
        Path(name).write_text(COLLECTED)
    plan = rival(name, **changes)  # type: ignore[arg-type]
    assert made_alike(on, plan, map_for(plan.policy)) <= 1e-5


COLLECTED = """
name = "collected"
summary = "an opening of three frames"
[groups]
sink = [{ role = "opening", frames = 3 }, { role = "early", frames = 2 }]
neighbour = [{ role = "opening", frames = 3 }, { role = "recent", frames = 2 }]
dummy = [{ role = "sink", frames = 3 }, { role = "early", frames = 1 }]
"""


def made_alike(on: On, plan: CachePlan, headmap: HeadMap) -> float:
    """The largest difference of a session's latents of 7 chunks from those of the loop."""
    spec, policy = plan.spec, plan.policy
    weights = random_model(spec).state_dict()
    model = WanModel(spec).eval()
    model.load_state_dict(permute_heads(weights, spec, head_orders(spec, policy, headmap)))
    text = torch.from_numpy(encode_words(spec, PROMPT))
    wanted = [chunk.latents for chunk in generate(model, plan, text, seeded_noise(plan, 7), 7)]
    with on.open(shared_bundle(spec, weights, policy, headmap=headmap)) as session:
        made = video_of(session, 7)
    return max(float(np.abs(a.latents - b.numpy()).max()) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("name", ["dummy-forcing", "forcing-kv-krea"])
def test_a_video_saved_about_the_split_goes_on_to_the_bit(tmp_path: Path, on: On, name: str) -> None:
    with on.open(small_bundle(name)) as session:
        whole = video_of(session, 5)
        for made in (1, 2, 3):  # heads are split after chunk 1
            video = session.generate(PROMPT, seed=7, chunks=5)
            assert_same([next(video) for _ in range(made)], whole[:made])
            video.save(tmp_path / str(made))
            assert_same(session.restore(tmp_path / str(made)), whole[made:])


@pytest.mark.parametrize("ar_start", [1, pytest.param(3, marks=pytest.mark.long)])
def test_sessions_make_what_the_loop_makes(policy: Policy, on: On, ar_start: int) -> None:
    """On graphs, which are verified in every phase too, and on torch in place."""
    plan = plan_of(policy, ar_start=ar_start)
    assert made_alike(on, plan, headmap_of(plan.spec, [[0], [1, 2]])) <= 1e-5


def test_segments_are_those_of_frames_that_leave(policy: Policy) -> None:
    """With two recent frames: of frames 4 to 6 when 7 and 8 stay, each beside the one after it."""
    plan = plan_of(policy, ar_start=1)
    group = plan.layers[0][1]
    retained = next(role for role in group.roles if role.chooses)
    spans = retained.spans(plan, group, 3, [0, 5, 10, 11])
    assert [span.frame for span in spans] == [4, 5, 6, 6]


def test_what_does_not_fit_is_refused(policy: Policy, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    recent = ', { role = "recent", frames = 1 }]'
    for changed, message in [
        (POLICY.replace('role = "early", frames = 1', 'role = "early", frames = 0'), "early has no frames"),
        (POLICY.replace(recent, ', { role = "opening", frames = 1 }]'), "has a sink, .*, and an opening"),
    ]:
        file.write_text(changed)
        with pytest.raises(InputError, match=message):
            plan_of(load_policy(str(file)))
    file.write_text(POLICY.replace("frames = 2", "frames = 3"))
    plan = plan_of(load_policy(str(file)), ar_start=0)
    with pytest.raises(InputError, match="from chunk 1 on, which finds 2 of 3 recent frames"):
        check_choice(plan)
