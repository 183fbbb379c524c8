"""A headless Chromium, told what to do over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A tab: what it shows, what it asked for, and what went wrong in it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.troubles: list[str] = []
        self.requests: list[str] = []
        for domain in ("Runtime", "Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=60))
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]
            self._note(said)

    def _note(self, said: dict[str, Any]) -> None:
        what, how = said.get("method"), said.get("params", {})
        if what == "Runtime.exceptionThrown":
            details = how["exceptionDetails"]
            self.troubles.append(details.get("exception", {}).get("description", details["text"]))
        elif what == "Runtime.consoleAPICalled" and how["type"] in ("error", "warning", "assert"):
            said_there = (str(one.get("value", one.get("description"))) for one in how["args"])
            self.troubles.append(" ".join(said_there))
        elif what == "Log.entryAdded" and how["entry"]["level"] == "error":
            self.troubles.append(f"{how['entry']['text']} {how['entry'].get('url', '')}")
        elif what == "Network.requestWillBeSent":
            self.requests.append(how["request"]["url"])
        elif what == "Network.webSocketCreated":
            self.requests.append(how["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of an expression; a promise's once it is there."""
        done = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, code: str, seconds: float = 30) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"still not: {code}; said: {self.run(SAID)}; {self.troubles}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **sizes, mobile=phone)

    def dark(self, on: bool) -> None:
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def key(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            said = {"text": text} if kind == "keyDown" and text else {}
            keys = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **keys, **said)

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shown["data"]))


SAID = "document.getElementById('said')?.textContent"


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one empty tab."""
    assert CHROMIUM
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--mute-audio",
        "--no-first-run",
        "--disable-background-networking",
        "--autoplay-policy=no-user-gesture-required",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(folder, process)
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
            tabs = json.load(answer)
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=2**27, open_timeout=20) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _port(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser listens, once it says so."""
    file, end = folder / "DevToolsActivePort", time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "the browser ended"
        if file.exists() and len(lines := file.read_text().splitlines()) > 1:
            return lines[0]
        time.sleep(0.05)
    raise AssertionError("the browser does not say where it listens")
