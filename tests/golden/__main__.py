"""The command: run the product over golden files, every variant and every chunk.

    python -m tests.golden PATH... [--backend torch|onnxruntime|loop] [--variant NAME ...] [--json]

PATH is a file or a folder of them. Prints `file variant: max relative difference` and the chunk where it is;
of a decoder's file the largest absolute difference and the call. Exit code 0 where all hold; 1 where a chunk
is further from the file than 1e-5, a decoder's call than 5e-5 (VAE) or 2e-5 (tiny), or a variant could not be
run; 2 for paths that are no golden files. Files of later work are named and passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.golden.compare import Compared, compare
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.product import RUNNERS
from tests.golden.rivals import no_yardstick


def main(words: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a golden file, or a folder of them"
    )
    parser.add_argument(
        "--backend",
        choices=RUNNERS,
        default="torch",
        help="a session on that backend (default torch), or the loop of models.generate",
    )
    parser.add_argument("--variant", action="append", help="only this one; may be given again")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    given = parser.parse_args(words)
    try:
        files = [GoldenFile(path) for path in _files(given.paths)]
        known = {name for file in files if not file.later for name in file.variants}
        if unknown := sorted(set(given.variant or ()) - known):
            raise GoldenError(f"no file has the variant {unknown[0]!r}; there are {', '.join(sorted(known))}")
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results, passed_over = [], {}
    for file in files:
        if file.later:
            passed_over[file.name] = file.later
            _say(f"{file.name}: passed over: {file.later}", quiet=given.json)
            continue
        for variant in file.variants:
            if given.variant and variant not in given.variant:
                continue
            if why := no_yardstick(file.kind, file.variants[variant]):
                passed_over[f"{file.name} {variant}"] = why
                _say(f"{file.name} {variant}: passed over: {why}", quiet=given.json)
            else:
                results.append(compare(file, variant, given.backend))
                _say(results[-1].line, quiet=given.json)
    if given.json:
        print(json.dumps(_report(given.backend, results, passed_over), indent=1))
    return 0 if all(one.holds for one in results) else 1


def _files(paths: list[Path]) -> list[Path]:
    """The files of all paths, each once. Raises GoldenError for a path where there is none."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise GoldenError(f"there is no golden file at {path}")
        found |= dict.fromkeys(inside)
    return list(found)


def _report(backend: str, results: list[Compared], passed_over: dict[str, str]) -> dict[str, object]:
    return {
        "backend": backend,
        "holds": all(one.holds for one in results),
        "results": [one.as_json() for one in results],
        "passed_over": passed_over,
    }


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
