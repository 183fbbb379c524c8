"""Digests of what the product makes of the demo model: proof that a change of the code changes nothing else.

    python studies/digests.py --out before.json          # before the change
    python studies/digests.py --against before.json      # after it: lists what differs; exit code 1 if any

Everything goes through the command line, in a folder of its own: statistics and head maps, the graphs and
weights of a bundle for each policy, the frames of one seeded video with a switch of prompts, and engines for
one GPU. Digests compare on one machine with one set of versions only: other versions of torch or ONNX Runtime
round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

POLICIES = ("full", "window", "dummy-forcing", "forcing-kv")
PROMPT, OTHER = "a 3 moving left and a 7 moving up", "a 1 moving up and a 4 moving right"


def forcingkv(*words: object) -> None:
    """Run a command of the product; its words are shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "forcingkv", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"forcingkv {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(folder: Path) -> None:
    """Everything whose digests are taken."""
    heads, dummy = folder / "heads", folder / "dummy"
    forcingkv("analyze", "heads", "--model", "demo", "--samples", 4, "--out", heads)
    forcingkv("analyze", "heads", "--model", "demo", "--samples", 4, "--rule", "dummy", "--out", dummy)
    for policy in POLICIES:
        headmap = (dummy if policy == "dummy-forcing" else heads) / "headmap.json"
        bundle = folder / policy
        forcingkv("export", "--model", "demo", "--headmap", headmap, "--policy", policy, "--out", bundle)
        forcingkv(
            "generate",
            "--bundle",
            bundle,
            "--prompt",
            PROMPT,
            "--switch",
            f"2.5:{OTHER}",
            "--seconds",
            5,
            "--seed",
            7,
            "--out",
            folder / f"{policy}.rgb",
        )
    forcingkv(
        "export",
        "--model",
        "demo",
        "--headmap",
        heads / "headmap.json",
        "--target",
        "tensorrt-rtx",
        "--sm",
        89,
        "--out",
        folder / "engines",
    )


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path within the folder; of frames that are in no file, none."""
    return {
        str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def main() -> None:
    """Make, digest, and compare or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the digests, as JSON")
    parser.add_argument("--against", type=Path, help="digests to compare with")
    parser.add_argument("--keep", type=Path, help="make the files here and keep them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        folder = given.keep or Path(room)
        make(folder)
        found = digests(folder)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.against:
        before = json.loads(given.against.read_text(encoding="utf-8"))
        differing = sorted(name for name in found | before if found.get(name) != before.get(name))
        print(f"{len(found)} files, {len(differing)} differ from {given.against}", *differing, sep="\n  ")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
