"""Building the engines of a model at several resolutions, without a GPU: seconds, memory, sizes.

    python benchmarks/engine_table.py --headmap forcingkv_heads_selfforcing.json

Runs `forcingkv export --random-weights --target tensorrt-rtx` for each resolution and policy, as a user
would, and prints a table in Markdown. Peak memory is that of all its processes together, looked at every
0.2 seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL = 0.2


def resident(pid: int) -> int:
    """Bytes that a process and its descendants hold."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)
    return own * 1024 + sum(resident(int(child)) for child in children)


def watched(words: list[str]) -> tuple[str, float, int]:
    """Run a command: its output, seconds, and the most memory its processes held together."""
    print(*words, file=sys.stderr, flush=True)
    started, peak = time.perf_counter(), [0]
    with subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            while process.poll() is None:
                peak[0] = max(peak[0], resident(process.pid))
                time.sleep(INTERVAL)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout
        out = process.stdout.read()
    watcher.join()
    if process.returncode:
        sys.exit(f"failed: {' '.join(words)}")
    return out, time.perf_counter() - started, peak[0]


def row(manifest: dict[str, Any], seconds: float, peak: int) -> str:
    """A line of the table."""
    width, height = manifest["resolution"]
    sms = sorted({engine["sm"] for engine in manifest["engines"]})
    steps = [engine for engine in manifest["engines"] if engine["graph"] == "step"]
    decode = max(e["activation_bytes"] for e in manifest["engines"] if e["graph"] == "decode")
    step = steps[0]
    sizes = " / ".join(f"{manifest['files'][e['file']]['bytes'] / 1e9:.2f}" for e in steps)
    built = " / ".join(f"{e['seconds']:.0f}" for e in steps)
    cells = [
        f"{width}x{height}",
        manifest["policy"]["name"],
        " + ".join(map(str, sms)),
        f"{seconds:.0f}",
        f"{peak / 1e9:.1f}",
        built,
        sizes,
        f"{max(e['activation_bytes'] for e in steps) / 1e9:.2f}",
        f"{decode / 1e9:.2f}",
        f"{manifest['plan']['kv_bytes'] / 1e9:.2f}",
        step["layers"],
        step["plugin_layers"],
        step["phases"],
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = """\
| resolution | policy | SMs | export, s | peak host memory, GB | step built in, s | step engine, GB \
| step activations, GB | decode activations, GB | KV attended to, GB | layers | plugin nodes | phases |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Read the options, export, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="self-forcing")
    parser.add_argument("--headmap", type=Path, required=True)
    parser.add_argument("--resolutions", default="480p,720p,1080p")
    parser.add_argument("--policies", default="forcing-kv,full")
    parser.add_argument("--sms", default="89,120")
    given = parser.parse_args()
    print(HEAD, flush=True)
    for resolution in given.resolutions.split(","):
        for policy in given.policies.split(","):
            with tempfile.TemporaryDirectory() as folder:
                words = [
                    "forcingkv",
                    "export",
                    "--model",
                    given.model,
                    "--random-weights",
                    "--headmap",
                    str(given.headmap),
                    "--resolution",
                    resolution,
                    "--policy",
                    policy,
                    "--target",
                    "tensorrt-rtx",
                    *(w for sm in given.sms.split(",") for w in ("--sm", sm)),
                    "--out",
                    f"{folder}/bundle",
                    "--json",
                ]
                out, seconds, peak = watched(words)
            print(row(json.loads(out), seconds, peak), flush=True)


if __name__ == "__main__":
    main()
