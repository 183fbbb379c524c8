"""Videos of the demo model that begin with a picture or with a clip: are its digits read in later chunks?

    python studies/starts_on_demo.py [--clips 16] [--policies full,forcing-kv] [--seed 0]

Real clips of digits that the model never saw. A video begins with the first frame, which stands still for a
chunk, or with the first chunk of the clip, and goes on under the clip's own prompt or that of another clip.
Prints as JSON, for each policy, start and prompt: whether the first frame shown is the given one, and the
shares of digits in chunk 5 that are those of the start, and those of the prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.export import export_bundle
from forcingkv.headmaps import read_headmap
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.data import Clip, make_clip
from forcingkv.models.demo.judge import READ_CHUNK, grey, read
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy

MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"
STARTS = ("picture", "clip")
PROMPTS = ("its own", "another clip's")


def pixels(clip: Clip, frames: int) -> npt.NDArray[np.uint8]:
    """The first frames of a clip as a file would have them."""
    levels = ((clip.frames[:frames] + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(levels[..., None], 3, -1)


def begun(session: Session, clip: Clip, start: str, prompt: str, seed: int) -> tuple[bool, list[int | None]]:
    """Whether the first frame shown is the clip's, and the digits that are read in chunk `READ_CHUNK`."""
    size = session.spec.frames_per_chunk
    given = pixels(clip, size)
    if start == "picture":
        given = np.repeat(given[:1], size, 0)
    video = session.generate(prompt, seed=seed, chunks=READ_CHUNK + 1, start=session.encode(given))
    shown = [chunk.frames for chunk in video]
    return bool((shown[0] == given).all()), list(read(grey(np.asarray(shown[READ_CHUNK]))))


def rows(policies: Sequence[str], count: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each policy, start and prompt."""
    spec, headmap = load_spec("demo"), read_headmap(MAP)
    rng = np.random.default_rng(seed)
    clips = [make_clip(rng, spec.frames_per_chunk, "held-out") for _ in range(count)]
    for name in policies:
        policy = load_policy(name)
        of = headmap if policy.needs_headmap else None
        export_bundle(spec, load_weights(spec), policy, folder / name, headmap=of, verify=False)
        with Session.open(folder / name) as session:
            for start in STARTS:
                for shift, said in enumerate(PROMPTS):
                    others = [clips[(number + shift) % count] for number in range(count)]
                    made = [
                        begun(session, clip, start, other.prompt, seed + number)
                        for number, (clip, other) in enumerate(zip(clips, others, strict=True))
                    ]
                    yield {"policy": name, "start": start, "prompt": said} | _shares(made, clips, others)


def _shares(
    made: Sequence[tuple[bool, list[int | None]]], clips: Sequence[Clip], others: Sequence[Clip]
) -> dict[str, float]:
    def share(of: Sequence[Clip]) -> float:
        wanted = [digit for clip in of for digit, _ in clip.moves]
        seen = [digit for _, digits in made for digit in digits]
        return float(np.mean([a == b for a, b in zip(seen, wanted, strict=True)]))

    return {
        "first frames as given": float(np.mean([same for same, _ in made])),
        "digits of the start": share(clips),
        "digits of the prompt": share(others),
    }


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        for row in rows(given.policies.split(","), given.clips, given.seed, Path(folder)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
