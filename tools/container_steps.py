"""The steps of the Dockerfile without a container engine: wheel, fresh environment, another user, one folder.

    python -m tools.container_steps --bundle bundle [--index-options "--find-links wheels"]

Builds the wheel from this checkout, installs it with the extra `serve` in a new environment, and runs its
entry point as the Dockerfile does: with a token, at all addresses, as a user that may write the volume and
nothing else (where this is run by root; else as whoever runs it). Asks for its health, lets it make a video,
ends it with SIGTERM, and says what was written where. Exit code 1 where a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
USER = 10001
"""As in the Dockerfile."""


def install(folder: Path, options: list[str]) -> Path:
    """The wheel in a new environment; its Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").replace("**/", "").split()
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*ignored))
    source = str(folder / "source")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "wheel"), source], check=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    print(f"built {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    subprocess.run([*words, f"{wheel}[serve]"], check=True)
    size = sum(path.lstat().st_size for path in (folder / "env").rglob("*") if path.is_file())
    print(f"installed: {size / 1e6:.0f} MB")
    return python


def entry_point() -> list[str]:
    """What the Dockerfile runs."""
    found = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert found, "the Dockerfile has an ENTRYPOINT"
    words: list[str] = json.loads(found[1])
    return words


def ask(port: int, path: str, token: str, body: dict[str, Any] | None = None) -> bytes:
    """The answer to a request."""
    given = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", given)
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    with opener.open(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def run(python: Path, bundle: Path, data: Path) -> None:
    """Serve, make a video, end."""
    token, port = secrets.token_hex(16), 18000 + secrets.randbelow(1000)
    words = [str(data) if word == "/data" else word for word in entry_point()]
    words[0] = str(python.parent / words[0])
    words += ["--bundle", str(bundle), "--port", str(port)]
    environment = {"HOME": str(data), "XDG_CACHE_HOME": str(data / "cache"), "FORCINGKV_TOKEN": token}
    environment |= {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    other = os.getuid() == 0
    if other:
        os.chown(data, USER, USER)
    began = time.monotonic()
    user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if other else {}
    process = subprocess.Popen(words, cwd=data, env=environment, **user)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"it ended with {process.returncode}")
            try:
                ask(port, "/healthz", token)
                break
            except OSError:
                if time.monotonic() - began > 60:
                    raise SystemExit("no answer within 60 s, the health check's start period") from None
                time.sleep(0.2)
        print(f"healthy after {time.monotonic() - began:.1f} s, as user {USER if other else os.getuid()}")
        model = json.loads(ask(port, "/v1/models", token))["data"][0]["id"]
        body = {"prompt": "a 3 moving left and a 7 moving up", "seconds": 2, "model": model}
        job = json.loads(ask(port, "/v1/videos", token, body))
        while job["status"] in ("queued", "in_progress"):
            if time.monotonic() - began > 300:
                raise SystemExit("the video is not made within 5 minutes")
            time.sleep(0.1)
            job = json.loads(ask(port, f"/v1/videos/{job['id']}", token))
        if job["status"] != "completed":
            raise SystemExit(f"the video: {job['error']}")
        content = ask(port, f"/v1/videos/{job['id']}/content", token)
        print(f"a video of {len(content):,} bytes")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit("it does not end within 60 s of SIGTERM") from None
    print(f"ended with {code} after SIGTERM")
    if code:
        raise SystemExit(1)
    print("written:", ", ".join(sorted(str(path.relative_to(data)) for path in data.iterdir())))


def main() -> None:
    """Read the options, do all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--index-options", default="", help="for pip install")
    given = parser.parse_args()
    # Where another user can reach it; the bundle is copied there as a volume is mounted.
    with tempfile.TemporaryDirectory(prefix="forcingkv-container-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        shutil.copytree(given.bundle, folder / "bundle")
        (folder / "data").mkdir()
        run(install(folder, shlex.split(given.index_options)), folder / "bundle", folder / "data")


if __name__ == "__main__":
    main()
