"""`ForcingKVPipeline`: what a diffusers video pipeline takes and returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import export_to_video
from PIL import Image

from forcingkv.headmaps.errors import InputError
from forcingkv.hosts.diffusers import ForcingKVPipeline
from forcingkv.runtime import InUseError
from forcingkv.runtime.text import encode_words
from tests.runtime.conftest import small_bundle

PROMPT, OTHER = "a b c", "d e"
FRAMES = 21


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> Iterator[ForcingKVPipeline]:
    with ForcingKVPipeline.from_pretrained(small_bundle("forcing-kv"), device="cpu") as opened:
        yield opened


def by_session(pipe: ForcingKVPipeline, prompt: str, seed: int) -> np.ndarray[Any, Any]:
    chunks = list(pipe.session.generate(prompt, seed=seed, chunks=pipe.session.spec.chunks_for(2)))
    return np.concatenate([chunk.frames for chunk in chunks])[:FRAMES]


def test_frames_are_those_of_the_session(pipe: ForcingKVPipeline) -> None:
    video = pipe(PROMPT, num_frames=FRAMES, generator=seeded(7))
    assert isinstance(video, WanPipelineOutput)
    assert (video.frames.dtype, video.frames.shape) == (np.float32, (1, FRAMES, 8, 12, 3))
    np.testing.assert_array_equal(np.rint(video.frames[0] * 255), by_session(pipe, PROMPT, 7))
    assert 0 <= video.frames.min() <= video.frames.max() <= 1


def test_outputs_are_of_the_kinds_that_diffusers_has(pipe: ForcingKVPipeline) -> None:
    expected = by_session(pipe, PROMPT, 7)
    (as_tensor,) = pipe(PROMPT, num_frames=FRAMES, generator=seeded(7), output_type="pt", return_dict=False)
    assert as_tensor.shape == (1, FRAMES, 3, 8, 12)
    np.testing.assert_array_equal((as_tensor[0] * 255).round().permute(0, 2, 3, 1).numpy(), expected)
    pictures = pipe(PROMPT, num_frames=FRAMES, generator=seeded(7), output_type="pil").frames
    assert isinstance(pictures[0][0], Image.Image)
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in pictures[0]]), expected)
    latents = pipe(PROMPT, num_frames=FRAMES, generator=seeded(7), output_type="latent").frames
    chunks = list(pipe.session.generate(PROMPT, seed=7, chunks=pipe.session.spec.chunks_for(2)))
    made = np.concatenate([chunk.latents for chunk in chunks], 2)
    np.testing.assert_array_equal(latents, made[:, :, : latents.shape[2]])
    assert pipe.session.spec.frames_per_chunk <= latents.shape[2] <= made.shape[2]


def test_several_prompts_and_videos_each(pipe: ForcingKVPipeline) -> None:
    video = pipe([PROMPT, OTHER], num_frames=FRAMES, num_videos_per_prompt=2, generator=seeded(7))
    assert video.frames.shape[0] == 4
    for found, (prompt, seed) in zip(
        video.frames, [(PROMPT, 7), (PROMPT, 8), (OTHER, 9), (OTHER, 10)], strict=True
    ):
        np.testing.assert_array_equal(np.rint(found * 255), by_session(pipe, prompt, seed))
    video = pipe([PROMPT, OTHER], num_frames=FRAMES, generator=[seeded(3), seeded(3)])
    np.testing.assert_array_equal(np.rint(video.frames[1] * 255), by_session(pipe, OTHER, 3))


def test_a_callback_sees_each_chunk_and_may_end_the_video(pipe: ForcingKVPipeline) -> None:
    seen = []

    def told(one: Any, step: int, time: int, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, given["latents"].shape))
        one._interrupt = step == 1
        return given

    video = pipe(PROMPT, num_frames=60, generator=seeded(7), callback_on_step_end=told)
    assert [step for step, _ in seen] == [0, 1]
    assert video.frames.shape[1] == pipe.session.spec.frames_of(2)


def test_no_more_videos_are_made_once_one_is_ended(pipe: ForcingKVPipeline) -> None:
    """The first is whole; of the second, which was ended, nothing is returned; the third is not begun."""
    seen = []

    def told(one: Any, step: int, time: int, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        one._interrupt = seen.count(0) == 2 and step == 1
        return given

    prompts = [PROMPT, OTHER, PROMPT]
    video = pipe(prompts, num_frames=FRAMES, generator=seeded(7), callback_on_step_end=told)
    assert video.frames.shape[:2] == (1, FRAMES)
    assert seen.count(0) == 2
    np.testing.assert_array_equal(np.rint(video.frames[0] * 255), by_session(pipe, PROMPT, 7))


def test_a_stream_is_of_one_prompt(pipe: ForcingKVPipeline) -> None:
    with pytest.raises(InputError, match="prompts of a stream are 2"):
        next(pipe.stream([PROMPT, OTHER]))  # type: ignore[arg-type]


def test_a_stream_gives_each_chunk_as_it_comes(pipe: ForcingKVPipeline) -> None:
    parts = list(pipe.stream(PROMPT, num_frames=FRAMES, generator=seeded(7)))
    assert len(parts) > 2
    np.testing.assert_array_equal(np.rint(np.concatenate(parts) * 255), by_session(pipe, PROMPT, 7))
    endless = pipe.stream(PROMPT, generator=seeded(7))
    assert next(endless).shape[1:] == (8, 12, 3)


def test_embeddings_stand_for_a_prompt(pipe: ForcingKVPipeline) -> None:
    embeds = torch.from_numpy(encode_words(pipe.session.spec, PROMPT))
    video = pipe(prompt_embeds=embeds, num_frames=FRAMES, generator=seeded(7))
    np.testing.assert_array_equal(np.rint(video.frames[0] * 255), by_session(pipe, PROMPT, 7))


def test_diffusers_own_writer_takes_it(pipe: ForcingKVPipeline, tmp_path: Any) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="diffusers writes videos with imageio")
    video = pipe(PROMPT, num_frames=FRAMES, generator=seeded(7))
    path = export_to_video(video.frames[0], str(tmp_path / "one.mp4"), fps=int(pipe.fps))
    assert (tmp_path / "one.mp4").stat().st_size > 0, path


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"height": 480}, "height is 480; expected 8"),
        ({"width": 832}, "width is 832; expected 12"),
        ({"num_inference_steps": 50}, "num_inference_steps is 50"),
        ({"guidance_scale": 5.0}, "guidance_scale is 5.0"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"prompt": None}, "needs a prompt or prompt_embeds"),
        ({"prompt": []}, "prompt is empty"),
        ({"generator": [seeded(1), seeded(2)]}, "generator are 2"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt is 1.5"),
        ({"num_videos_per_prompt": None}, "num_videos_per_prompt is None"),
        ({"num_frames": 24.0}, "num_frames is 24.0"),
        ({"num_frames": "5"}, "num_frames is '5'"),
        ({"num_frames": True}, "num_frames is True"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": [PROMPT, 5]}, "expected words, or a list of them"),
        ({"generator": 7}, "generator is 7"),
        ({"generator": np.random.default_rng(7)}, "expected a torch.Generator"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 4, 9)}, "prompt_embeds has the shape"),
        ({"prompt": None, "prompt_embeds": torch.zeros(4, 9)}, "prompt_embeds has the shape"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused(pipe: ForcingKVPipeline, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        pipe(**({"prompt": PROMPT, "num_frames": FRAMES} | given))


@pytest.mark.parametrize("later", [{"prompt": [PROMPT, PROMPT, "zebra"]}, {"prompt": None}])
def test_all_prompts_are_looked_at_before_a_video_is_made(
    pipe: ForcingKVPipeline, later: dict[str, Any]
) -> None:
    made: list[int] = []
    if later["prompt"] is None:
        whole = np.repeat(encode_words(pipe.session.spec, PROMPT), 2, 0)
        whole[1, 0, 0] = np.nan
        later = {"prompt_embeds": torch.from_numpy(whole)}
    with pytest.raises(InputError):
        pipe(
            **later, num_frames=FRAMES, callback_on_step_end=lambda one, step, time, given: made.append(step)
        )
    assert not made


def test_one_generator_is_not_two(pipe: ForcingKVPipeline) -> None:
    """Both videos would be the same; in diffusers the second is another."""
    one = seeded(3)
    with pytest.raises(InputError, match="generator is given twice"):
        pipe([PROMPT, OTHER], num_frames=3, generator=[one, one])


def test_seeds_that_are_drawn_follow_torchs_own_and_are_told(pipe: ForcingKVPipeline) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        pipe([PROMPT, OTHER], num_frames=3)
        found.append(pipe.seeds)
    assert found[0] == found[1]
    assert len(set(found[0])) == 2
    pipe(PROMPT, num_frames=3)
    assert pipe.seeds != found[0][:1]


def test_a_call_beside_another_is_refused_and_changes_nothing(pipe: ForcingKVPipeline) -> None:
    refused = []

    def told(one: ForcingKVPipeline, step: int, time: int, given: dict[str, Any]) -> None:
        one._interrupt = step == 1
        for again in (lambda: one(PROMPT, num_frames=3), lambda: next(one.stream(PROMPT))):
            with pytest.raises(InUseError, match="is making a video"):
                again()
            refused.append(step)

    video = pipe(PROMPT, num_frames=60, generator=seeded(7), callback_on_step_end=told)
    assert refused == [0, 0, 1, 1]
    assert video.frames.shape[1] == pipe.session.spec.frames_of(2), "its interrupt was not taken back"
    stream = pipe.stream(PROMPT)
    next(stream)
    with pytest.raises(InUseError, match="a stream of it was not closed"):
        pipe(PROMPT, num_frames=3)
    stream.close()
    pipe(PROMPT, num_frames=3)


def test_a_stream_is_ended_as_a_video_is(pipe: ForcingKVPipeline) -> None:
    parts = 0
    for parts, _ in enumerate(pipe.stream(PROMPT), 1):
        pipe._interrupt = parts == 2
    assert parts == 2


def test_what_a_callback_does_to_latents_changes_nothing(pipe: ForcingKVPipeline) -> None:
    def spoil(one: Any, step: int, time: int, given: dict[str, Any]) -> None:
        given["latents"][:] = 0

    asked = {"num_frames": FRAMES, "output_type": "latent"}
    spoiled = pipe(PROMPT, generator=seeded(7), callback_on_step_end=spoil, **asked).frames
    np.testing.assert_array_equal(spoiled, pipe(PROMPT, generator=seeded(7), **asked).frames)


def test_a_device_may_be_torchs(pipe: ForcingKVPipeline) -> None:
    with ForcingKVPipeline.from_pretrained(small_bundle("forcing-kv"), device=torch.device("cpu")) as opened:
        assert opened.session.runs_on == pipe.session.runs_on
