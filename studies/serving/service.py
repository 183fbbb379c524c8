"""A service in a process of its own, as `forcingkv serve` runs it, with other times for clients to be lost.

    python -m studies.serving.service --bundle B --data D --lost 1 --reader 5

Prints its port once it answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import psutil

from forcingkv.serve.bundles import BundleChoice
from forcingkv.serve.listening import listening
from forcingkv.serve.run import make_server, open_service
from forcingkv.serve.settings import Limits, Settings


@dataclass(frozen=True)
class Running:
    """A service in another process."""

    port: int
    process: psutil.Process

    @property
    def memory(self) -> int:
        """Resident bytes of its process."""
        return int(self.process.memory_info().rss)

    @property
    def sessions(self) -> int:
        """Places that are taken."""
        said = httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=30).json()
        return int(said["sessions"]) + int(said["waiting"])


@contextmanager
def running(bundle: Path, *, lost: float = 60.0, reader: float = 60.0) -> Iterator[Running]:
    """A service of that bundle, until the block ends."""
    with tempfile.TemporaryDirectory() as data:
        words = [sys.executable, "-m", "studies.serving.service", "--bundle", str(bundle), "--data", data]
        words += ["--lost", str(lost), "--reader", str(reader)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        try:
            yield Running(int(process.stdout.readline()), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    """Run it until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lost", type=float, default=60.0)
    parser.add_argument("--reader", type=float, default=60.0)
    given = parser.parse_args()
    limits = Limits(lost=given.lost, reader=given.reader, sessions_a_client=64)
    settings = Settings(data=given.data, limits=limits)
    with listening("127.0.0.1", 0, 120.0) as opened:
        service = open_service(settings, [BundleChoice("bundle", given.bundle)])
        port = opened.getsockname()[1]
        make_server(service, lambda: print(port, flush=True)).run(sockets=[opened])


if __name__ == "__main__":
    main()
