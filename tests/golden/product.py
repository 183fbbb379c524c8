"""The product, run over a whole video of a golden file: a session on a bundle, or the loop of `models`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forcingkv.export import export_bundle
from forcingkv.models.decoders.taehv import TaehvDecoder
from forcingkv.models.generate import generate
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv_roles import HALVES, CleanPass, TorchRole
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import Session
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.script import ENCODED
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.settings import Case

Runner = Literal["torch", "onnxruntime", "loop"]
RUNNERS = get_args(Runner)
WIDTHS = (8, 8, 8, 8)
"""Of the decoder, whose frames nobody looks at."""


@dataclass(frozen=True)
class Made:
    """What the product made of a chunk."""

    latents: npt.NDArray[np.float32]
    """(1, channels, frames, height, width)."""
    indices: list[int] | None
    """Segments that its clean pass chose; None: none, or nobody sees them (onnxruntime)."""


def run(file: GoldenFile, case: Case, runner: Runner) -> Iterator[Made]:
    """All chunks of a case."""
    weights = {name: torch.from_numpy(tensor.copy()) for name, tensor in file.weights.items()}
    yield from (_loop(file, case, weights) if runner == "loop" else _session(file, case, weights, runner))


class Noise:
    """A file's noise; nothing is added where it has none: after the last step."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self._values = values

    def __call__(self, chunk: int, step: int) -> npt.NDArray[np.float32]:
        if step >= self._values.shape[1]:
            return np.zeros_like(self._values[0, 0])
        values: npt.NDArray[np.float32] = self._values[chunk, step]
        return values


def _session(file: GoldenFile, case: Case, weights: dict[str, Tensor], runner: Runner) -> Iterator[Made]:
    decoder = TaehvDecoder(widths=WIDTHS, latent_channels=case.spec.latent_channels).eval()
    noise, start = Noise(file.tensor(case.noise)), start_of(file, case)
    given = case.given
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        export_bundle(
            case.spec,
            weights,
            case.policy,
            Path(folder, "bundle"),
            headmap=case.headmap,
            decoder=decoder,
            target="torch" if runner == "torch" else "onnx",
            verify=False if runner == "onnxruntime" else None,
            recache=any(one.recache in ENCODED for one in case.changes) if runner == "onnxruntime" else None,
        )
        with Session.open(Path(folder, "bundle"), backend=runner) as session, chosen_segments() as chosen:
            video = session.generate(
                file.tensor(case.text)[None],
                seed=0,
                chunks=given + case.chunks,
                noise=lambda chunk, step, shape: noise(chunk - given, step),
                start=start,
            )
            for change in case.changes:
                text = file.tensor(change.text)[None]
                video.switch(text, recache=change.recache, at=given + change.chunk)
            for chunk in video:
                indices = chosen.pop() if chosen else None
                if not chunk.given:
                    yield Made(chunk.latents, indices)


def _loop(file: GoldenFile, case: Case, weights: dict[str, Tensor]) -> Iterator[Made]:
    if any(change.recache != "cut" for change in case.changes):
        raise GoldenError("the loop of the models switches no prompts: take --backend torch")
    plan = build_plan(case.spec, case.spec.geometry(), case.policy, case.headmap)
    model = WanModel(case.spec).eval().requires_grad_(False)
    orders = head_orders(case.spec, case.policy, case.headmap)
    model.load_state_dict(permute_heads(weights, case.spec, orders))
    noise, text = Noise(file.tensor(case.noise)), torch.from_numpy(file.tensor(case.text)[None])
    start, given = start_of(file, case), case.given

    def drawn(chunk: int, step: int) -> Tensor:
        return torch.from_numpy(noise(chunk - given, step).copy())

    begun = None if start is None else torch.from_numpy(start)
    scenes = {given + one.chunk: torch.from_numpy(file.tensor(one.text)[None]) for one in case.changes}
    made = generate(model, plan, text, drawn, given + case.chunks, start=begun, scenes=scenes)
    for chunk in itertools.islice(made, given, None):
        indices = None if chunk.indices is None else chunk.indices.tolist()
        yield Made(chunk.latents.numpy(), indices)


def start_of(file: GoldenFile, case: Case) -> npt.NDArray[np.float32] | None:
    """Latents that the video begins with: (1, channels, frames, height, width)."""
    if not case.start_frames:
        return None
    start = file.tensor("start")
    if start.shape[2] < case.start_frames:
        raise GoldenError(f"its start has {start.shape[2]} frames, and {case.start_frames} are taken")
    return np.ascontiguousarray(start[:, :, : case.start_frames])


@contextmanager
def chosen_segments() -> Iterator[list[list[int]]]:
    """What clean passes in torch choose while it is open: the newest choice alone, until it is taken out.

    Sessions do not hand it out, and latents alone would not show two segments that are nearly alike.
    """
    found: list[list[int]] = []
    half = HALVES[Retained.name]

    class Watched(TorchRole):
        of = Retained

        def advance(self, role: Any, done: CleanPass) -> KeysValues:
            made = half.advance(role, done)
            found[:] = [done.chosen[0].tolist()] if done.choice and done.chosen else []
            return made

    HALVES[Retained.name] = Watched()
    try:
        yield found
    finally:
        HALVES[Retained.name] = half
