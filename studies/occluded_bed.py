"""The test bed in which memory matters: does the digit that comes back look like the one that went away?

    python studies/occluded_bed.py --out runs/occluded-bed [--policies studies/newest.toml,full,forcing-kv]
        [--checkpoint FILE] [--headmap FILE] [--each 4] [--seed 0] [--backend torch] [--waits given]
        [--context clean|last]

Real clips of held-out scans, both digits of which go away: `--each` clips for every number of chunks that
they are away, 1 to 8, and for digits that are in the first frame or come late. A video begins with the clip
until the digits come back, and goes on by itself. With `--waits made` it does so from the second chunk
without digits on: then the model has to count the chunks that it waits, too. Every policy gets the same clips
and seeds.

OUT/returns.jsonl has a line for each clip and policy: what is right of the digit of each half. A run goes on
where another stopped. Printed as JSON: for each policy, chunks away, entry, and kind of place where digits
go, how many are right, with Wilson's interval of 95%. `seen_in_window`: whether under `full` the chunk in
which they come back still sees them whole.

With `--context last` the last denoising pass fills the cache, of given chunks too (`cache_as_made`), and
policies are called so: "full, last pass".
studies/last_pass_on_demo.py compares both, clip by clip.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.stats import binomtest

from forcingkv.export import export_bundle
from forcingkv.export.precision import Target
from forcingkv.headmaps import InputError, read_headmap
from forcingkv.headmaps.fields import to_data
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.judge import grey
from forcingkv.models.demo_occluded.data import CHUNK, MOST_AWAY, MOST_LATE, Clip, Timeline, make_clip
from forcingkv.models.demo_occluded.judge import Waits, given_chunks, judge_returns, judged_chunk
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session, Video
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.positions import Floats, chunk_noise

MODEL = "demo-occluded"
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / f"{MODEL}.json"
RETURNS = "returns.jsonl"
JUDGED = ("digit", "place", "direction")
ENTRIES = {"first frame": (0, 0), "late": (1, MOST_LATE)}
"""How digits come for the first time: the fewest and most chunks before that."""
KEYS = ("policy", "away", "entry", "kind")
LAST = ", last pass"
"""Behind the name of a policy whose cache is filled by the last denoising pass."""


@dataclass(frozen=True)
class Asked:
    """A clip of the test bed."""

    entry: str
    number: int
    """Among those of its entry and length of absence."""
    clip: Clip

    @property
    def name(self) -> str:
        return f"{self.clip.timeline.away} away, {self.entry}, {self.number}"

    @property
    def seed(self) -> int:
        """Of the noise."""
        return zlib.crc32(self.name.encode())


def bed_clips(each: int, seed: int) -> list[Asked]:
    """The clips of the test bed; of one seed, those of a smaller `each` are among them."""
    clips = []
    for away, (entry, (least, most)), number in product(
        range(1, MOST_AWAY + 1), ENTRIES.items(), range(each)
    ):
        rng = np.random.default_rng((seed, away, least, number))
        timeline = Timeline(int(rng.integers(least, most + 1)), away)
        clips.append(Asked(entry, number, make_clip(rng, timeline, timeline.returns + 2, "held-out")))
    return clips


def given_frames(clip: Clip, waits: Waits = "given") -> npt.NDArray[np.uint8]:
    """The frames (frames, height, width) that a video to be judged begins with."""
    return ((clip.frames[: given_chunks(clip, waits) * CHUNK] + 1) * 127.5).round().astype(np.uint8)


def go_on(session: Session, asked: Asked, waits: Waits = "given") -> npt.NDArray[np.uint8]:
    """The frames (frames, height, width, 3) of a video that begins as the clip does, to the judged chunk."""
    clip = asked.clip
    start = session.encode(np.repeat(given_frames(clip, waits)[..., None], 3, -1))
    video = session.generate(clip.prompt, seed=asked.seed, chunks=judged_chunk(clip) + 1, start=start)
    shown = [chunk.frames for chunk in islice(video, video.given)]
    if session.spec.schedule.context == "last":
        cache_as_made(session, video, start)
    return np.concatenate([*shown, *(chunk.frames for chunk in video)])


def cache_as_made(session: Session, video: Video, start: Floats) -> None:
    """Let the cache hold given chunks as if the model had made them: what its last pass makes of them,
    noised.

    A session encodes what is given at timestep 0, whichever pass fills the cache. Then nearly all that is
    seen of the digits would be the same under both.
    """
    last = len(session.spec.schedule.later) - 1

    def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Floats:
        return chunk_noise(video.seed, chunk, step, shape)

    with session._using(video._token) as maker:
        maker.cache.restart()
        given, maker.given = maker.given, 0
        for index, latents in enumerate(np.split(start, given, 2)):
            maker.replay(index, latents, noise, last)
        maker.given = given


def judged(session: Session, asked: Asked, waits: Waits) -> dict[str, Any]:
    """A clip, and what is right of its digits under a session's policy."""
    clip = asked.clip
    seen = judge_returns(grey(go_on(session, asked, waits)[-CHUNK:]), clip)
    return {
        "clip": asked.name,
        "away": clip.timeline.away,
        "late": clip.timeline.late,
        "entry": asked.entry,
        "kind": [mover.kind for mover in clip.movers],
        "wanted": [mover.digit for mover in clip.movers],
    } | {name: [getattr(one, name) for one in seen] for name in JUDGED}


def run(out: Path, policies: Sequence[str], clips: Sequence[Asked], given: argparse.Namespace) -> None:
    """Judge each clip under each policy, but for what OUT/returns.jsonl has.

    Raises InputError where that has lines of other weights, head map, policy, seed or waits of the same name.
    """
    spec, path = load_spec(MODEL).filled_by(given.context), out / RETURNS
    last = spec.schedule.context == "last"
    out.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    weights = load_weights(spec, given.checkpoint)
    for name in policies:
        policy = load_policy(name)
        headmap = read_headmap(given.headmap) if policy.needs_headmap else None
        made_of = {
            "weights": weights.digest,
            "policy": to_data(policy),
            "seed": given.seed,
            "waits": given.waits,
        }
        made_of |= {"headmap": headmap.digest if headmap else None, "backend": given.backend}
        made_of |= {"context": "last"} if last else {}
        called = policy.name + (LAST if last else "")
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        there = [line for line in map(json.loads, before) if line["policy"] == called]
        if any(line["made_of"] != digest for line in there):
            what = f"has videos of {called} with other weights, head map, policy, seed, waits or backend"
            raise InputError(what, where=str(path), hint="Give another folder with --out.")
        done = {line["clip"] for line in there}
        left = [asked for asked in clips if asked.name not in done]
        if not left:
            continue
        bundle = out / "bundles" / called
        target: Target = "torch" if given.backend == "torch" else "onnx"
        export_bundle(spec, weights, policy, bundle, headmap=headmap, target=target, verify=False)
        with Session.open(bundle, backend=given.backend) as session, path.open("a", encoding="utf-8") as file:
            for asked in left:
                line = {"policy": called, "made_of": digest} | judged(session, asked, given.waits)
                file.write(json.dumps(line) + "\n")
                file.flush()


def rows(path: Path) -> list[dict[str, Any]]:
    """Counts and intervals by policy, chunks away, entry and kind; then without entry and kind, as `all`."""
    halves = pl.read_ndjson(path).explode("kind", "wanted", *JUDGED)
    merged = halves.with_columns(entry=pl.lit("all"), kind=pl.lit("all"))
    counts = pl.concat([halves, merged]).group_by(KEYS, maintain_order=True)
    found = counts.agg(pl.len().alias("returns"), *(pl.col(name).sum() for name in JUDGED)).sort(KEYS)
    return [_with_intervals(row) for row in found.iter_rows(named=True)]


def _with_intervals(row: dict[str, Any]) -> dict[str, Any]:
    intervals = {}
    for name in JUDGED:
        of = binomtest(row[name], row["returns"]).proportion_ci(method="wilson")
        intervals[f"{name}_interval"] = [round(of.low, 3), round(of.high, 3)]
    return row | {"seen_in_window": seen_in_window(row["away"])} | intervals


def seen_in_window(away: int) -> bool:
    """Whether the chunk in which digits come back sees the last chunk in which they were seen whole."""
    timeline = Timeline(0, away)
    return timeline.returns - timeline.seen_whole < load_spec(MODEL).chunks_to_fill


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    newest = str(Path(__file__).with_name("newest.toml"))
    parser.add_argument("--policies", default=f"{newest},full,window,forcing-kv")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--headmap", type=Path, default=MAP)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--waits", choices=get_args(Waits), default="given")
    parser.add_argument("--context", choices=("clean", "last"))
    given = parser.parse_args()
    run(given.out, given.policies.split(","), bed_clips(given.each, given.seed), given)
    for row in rows(given.out / RETURNS):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
