"""A long video takes no more memory and no more time a chunk than a short one.

    python benchmarks/long_video.py
    python benchmarks/long_video.py --bundle bundle --prompt "a 3 moving left and a 7 moving up" --json

One child process generates `--chunks` chunks, and reports resident memory after each. Printed are memory
after chunk 50 and after the last, median seconds a chunk in chunks 50 to 100 and in the last 50, and the
last latent frame, which is past 1,024: where public code ends. Without `--bundle` the demo model is exported
into a temporary folder, with its head map and the policy forcing-kv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress

from forcingkv.measure.process import resident
from forcingkv.runtime import Session

EARLY, SPAN = 50, 50


def child(given: argparse.Namespace) -> None:
    """Generate, and print resident bytes, seconds and the last latent frame of each chunk."""
    with Session.open(given.bundle, threads=given.threads) as session:
        frames = session.spec.frames_per_chunk
        for chunk in session.generate(given.prompt, seed=0, chunks=given.chunks):
            last = (chunk.index + 1) * frames - 1
            print(json.dumps([resident("VmRSS"), chunk.timing.total, last]), flush=True)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run the child, and compare its early chunks with its last ones."""
    words = [sys.executable, __file__, "--child", "--bundle", str(given.bundle), "--prompt", given.prompt]
    words += ["--chunks", str(given.chunks), "--threads", str(given.threads)]
    rows: list[tuple[int, float, int]] = []
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process,
        Progress(disable=not sys.stderr.isatty()) as shown,
    ):
        assert process.stdout
        task = shown.add_task("generating chunks", total=given.chunks)
        for line in process.stdout:
            rows.append(tuple(json.loads(line)))
            shown.update(task, completed=len(rows))
    if process.returncode or len(rows) != given.chunks:
        sys.exit("the child process failed")
    memory = {"early": rows[EARLY][0], "last": rows[-1][0]}
    seconds = {
        "early": statistics.median(row[1] for row in rows[EARLY : EARLY + SPAN]),
        "last": statistics.median(row[1] for row in rows[-SPAN:]),
    }
    return {
        "chunks": given.chunks,
        "last_frame": rows[-1][2],
        "resident_mb": {name: round(size / 1e6, 1) for name, size in memory.items()},
        "memory_ratio": round(memory["last"] / memory["early"], 4),
        "seconds_a_chunk": {name: round(value, 4) for name, value in seconds.items()},
        "seconds_ratio": round(seconds["last"] / seconds["early"], 4),
    }


def export_demo(folder: Path) -> Path:
    """The demo model as a bundle, by the command a user would run."""
    maps = Path(__file__).parents[1] / "headmaps" / "maps"
    words = ["export", "--model", "demo", "--headmap", maps / "demo.json", "--policy", "forcing-kv"]
    words += ["--out", folder / "bundle"]
    print("forcingkv", *words, file=sys.stderr, flush=True)
    subprocess.run(
        [sys.executable, "-m", "forcingkv", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )
    return folder / "bundle"


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the demo model, exported for this")
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--chunks", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given)
    if given.chunks < EARLY + 2 * SPAN:
        parser.error(f"--chunks is {given.chunks}: at least {EARLY + 2 * SPAN}")
    with tempfile.TemporaryDirectory() as room:
        given.bundle = given.bundle or export_demo(Path(room))
        found = measure(given)
    if given.json:
        print(json.dumps(found, indent=1))
        return None
    memory, seconds = found["resident_mb"], found["seconds_a_chunk"]
    print(f"{found['chunks']} chunks, the last latent frame is {found['last_frame']}")
    print(f"resident MB: {memory['early']} early, {memory['last']} at last: x {found['memory_ratio']}")
    print(f"seconds a chunk: {seconds['early']} early, {seconds['last']} at last: x {found['seconds_ratio']}")
    return None


if __name__ == "__main__":
    main()
