"""What the clean pass is worth on the demo model: its videos with it, and with the keys of the last pass.

    python -m studies.last_pass_on_demo --out runs/last-pass [--prompts 64] [--chunks 12] [--ends 250,500]
        [--policies full,forcing-kv] [--headmap FILE] [--seed 0] [--backend torch] [--page docs/ablations.md]
    python -m studies.last_pass_on_demo --returns runs/occluded-bed/returns.jsonl

The same prompts and seeds through each policy, with `context` clean and last. `--ends`: the passes of the
model's schedule are made down to these timesteps; at the last of them the cached keys of `last` are made, and
public models end at 625 or above. OUT/videos.jsonl has a line for each video; a run goes on where another
stopped. Printed as Markdown, and written into a page between its marks if one is given: for each end, policy
and measure the means, and last minus clean, pair by pair, with the interval of 95% over prompts. PSNR is to
`full` with its clean pass, of equal seeds.

With `--returns` the same of digits that come back, of a file that studies/occluded_bed.py wrote under both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from forcingkv.commands.console import default_prompts, progress_bar
from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError, read_headmap
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.fidelity.evaluation import (
    Estimate,
    VideoRow,
    differences,
    estimate,
    evaluate_sessions,
    seeded_prompts,
)
from forcingkv.measure.fidelity.video_measures import METRICS
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import FilledBy
from forcingkv.runtime.spec import ModelSpec
from studies.ablation.__main__ import page_with
from studies.occluded_bed import JUDGED, LAST

MODEL = "demo"
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"
VIDEOS = "videos.jsonl"
CONTEXTS: tuple[FilledBy, ...] = get_args(FilledBy)
REFERENCE = "full, clean"
MARKS = "<!-- the clean pass: begin -->", "<!-- the clean pass: end -->"
MEASURES = (
    "psnr",
    "digits_read",
    "direction_right",
    "motion",
    "chunk_discontinuity",
    "seam_motion",
    "seam_residual",
    "sharpness_drift",
    "contrast_drift",
    "histogram_drift",
)
"""Those of `METRICS` that are shown: lightness is all that the demo's frames have."""


def ending_at(spec: ModelSpec, end: float) -> ModelSpec:
    """The model with the passes of its schedule down to a timestep. Raises InputError where none is there."""
    steps = spec.schedule.denoising_steps
    if end not in steps:
        listed = ", ".join(f"{step:g}" for step in steps)
        raise InputError(
            f"has no pass at {end:g}", where=f"--ends: {spec.name}", expected=f"some of {listed}"
        )
    made = replace(spec.schedule, denoising_steps=steps[: steps.index(end) + 1], redraw_from=None)
    return replace(spec, schedule=made)


def bundles_of(policies: Sequence[str], headmap: HeadMap, folder: Path, backend: str) -> dict[str, Bundle]:
    """The model under each policy. Raises InputError without `full`, which others are compared with."""
    spec, weights = load_spec(MODEL), load_weights(load_spec(MODEL))
    made = dict[str, Bundle]()
    if "full" not in policies:
        raise InputError("lacks full, which videos are compared with", where="--policies")
    for name in policies:
        policy, out = load_policy(name), folder / name
        heads = headmap if policy.needs_headmap else None
        export_bundle(
            spec,
            weights,
            policy,
            out,
            headmap=heads,
            target="torch" if backend == "torch" else "onnx",
            verify=False,
        )
        made[name] = Bundle.open(out)
    return made


def run_by(bundle: Bundle, spec: ModelSpec) -> Bundle:
    """A bundle whose session follows another schedule: its graphs know nothing of it."""
    return Bundle(bundle.path, replace(bundle.manifest, model=spec), bundle.headmap)


def run(given: argparse.Namespace) -> list[VideoRow]:
    """Measure each video that OUT/videos.jsonl does not have, and give all that were asked for.

    Raises InputError where it has lines that were made otherwise.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    path, headmap = given.out / VIDEOS, read_headmap(given.headmap)
    policies = given.policies.split(",")
    made_of: dict[str, Any] = {"weights": load_weights(load_spec(MODEL)).digest, "headmap": headmap.digest}
    made_of |= {"policies": [to_data(load_policy(name)) for name in policies], "chunks": given.chunks}
    made_of |= {"model": to_data(load_spec(MODEL)), "backend": given.backend}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    rows = [*map(json.loads, path.read_text(encoding="utf-8").splitlines())] if path.is_file() else []
    if any(row["made_of"] != digest for row in rows):
        what = "has videos of other weights, head map, policies, length or backend"
        raise InputError(what, where=str(path), hint="Give another folder with --out.")
    prompts = [(prompt, None) for prompt in default_prompts(MODEL)[: given.prompts]]
    samples = seeded_prompts(prompts, 1, given.seed)
    bundles = bundles_of(policies, headmap, given.out / "bundles", given.backend)
    wanted = [(end, sample) for end in given.ends for sample in samples]
    there = {(row["end"], row["prompt"], row["seed"]) for row in rows}
    with progress_bar() as shown, path.open("a", encoding="utf-8") as file:
        task = shown.add_task("videos", total=len(wanted) * len(policies) * len(CONTEXTS))
        for end in given.ends:
            spec = ending_at(load_spec(MODEL), end)
            with ExitStack() as stack:
                sessions = {
                    f"{name}, {context}": stack.enter_context(
                        Session.open(
                            run_by(bundle, spec.filled_by(context)), backend=given.backend, threads=1
                        )
                    )
                    for name, bundle in bundles.items()
                    for context in CONTEXTS
                }
                for sample in samples:
                    if (end, sample.prompt, sample.seed) in there:
                        shown.advance(task, len(sessions))
                        continue
                    found = evaluate_sessions(
                        sessions, [sample], given.chunks, REFERENCE, lambda: shown.advance(task)
                    )
                    rows += (new := [{"made_of": digest, "end": end} | row for row in found])
                    file.write("".join(json.dumps(row) + "\n" for row in new))
                    file.flush()
    asked = {(end, sample.prompt, sample.seed) for end, sample in wanted}
    return [row for row in rows if (row["end"], row["prompt"], row["seed"]) in asked]


def compared(rows: Sequence[VideoRow]) -> Iterator[dict[str, Any]]:
    """For each end, policy and measure: means of both, and last minus clean."""
    by_session = defaultdict[tuple[float, str], list[VideoRow]](list)
    for row in rows:
        by_session[row["end"], row["policy"]].append(row)
    for end, session in by_session:
        policy, context = session.rsplit(", ", 1)
        if context != "clean":
            continue
        clean, last = (by_session[end, f"{policy}, {one}"] for one in CONTEXTS)
        prompts = [row["prompt"] for row in clean]
        for metric in MEASURES:
            before, after = ([row.get(metric) for row in of] for of in (clean, last))
            if any(value is not None for value in after):
                said = {"end": f"{end:g}", "policy": policy, "measure": _titled(metric)}
                yield said | _paired(before, after, prompts)


def _titled(metric: str) -> str:
    title, unit = METRICS[metric]
    return f"{title}, {unit}" if unit else title


def returns(path: Path) -> Iterator[dict[str, Any]]:
    """The same of digits that came back (studies/occluded_bed.py), by how long they were away; clip by clip.

    Raises InputError where no policy was run under both.
    """
    by_policy = defaultdict[str, dict[str, Mapping[str, Any]]](dict)
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        by_policy[line["policy"]][line["clip"]] = line
    both = [name for name in by_policy if name + LAST in by_policy]
    if not both:
        what = f"has no policy both as it is and as NAME{LAST}"
        raise InputError(what, where=str(path), hint="Run studies/occluded_bed.py with --context last too.")
    for name in both:
        clean, last = by_policy[name], by_policy[name + LAST]
        clips = [clip for clip in clean if clip in last]
        lengths = sorted({clean[clip]["away"] for clip in clips})
        for away in (None, *lengths):
            of = [clip for clip in clips if away in (None, clean[clip]["away"])]
            for measure in JUDGED:
                before, after = ([float(np.mean(one[clip][measure])) for clip in of] for one in (clean, last))
                said = {"away": "all" if away is None else away, "policy": name, "measure": measure}
                yield said | _paired(before, after, of)


def _paired(
    clean: Sequence[float | None], last: Sequence[float | None], prompts: Sequence[str]
) -> dict[str, Any]:
    return {
        "clean": estimate(clean, prompts),
        "last": estimate(last, prompts),
        "difference": estimate(differences(last, clean), prompts),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `compared` or `returns` as Markdown; a difference whose interval is clear of 0 is bold."""
    names = [*rows[0]]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [_told(value) if isinstance(value, Estimate) else str(value) for value in row.values()]
        clear = isinstance(row["difference"], Estimate) and row["difference"].excludes_zero
        cells[-1] = f"**{cells[-1]}**" if clear else cells[-1]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(one: Estimate) -> str:
    if one.mean is None:
        return "-"
    interval = "" if one.low is None else f" ({one.low:.4g} to {one.high:.4g})"
    return f"{one.mean:.4g}{interval}"


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--returns", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--ends", type=lambda text: [*map(float, text.split(","))], default=[250.0, 500.0])
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--headmap", type=Path, default=MAP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if (given.out is None) == (given.returns is None):
        parser.error("use either --out or --returns")
    made = table([*(compared(run(given)) if given.out else returns(given.returns))])
    print(made, end="")
    if given.page:
        about = (
            f"`python -m studies.last_pass_on_demo`, {given.prompts} prompts, {given.chunks} chunks a video,"
            f" {given.backend}."
        )
        text = given.page.read_text(encoding="utf-8")
        write_text(given.page, page_with(text, f"{about}\n\n{made}", MARKS))


if __name__ == "__main__":
    main()
