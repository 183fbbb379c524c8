"""How a service is run: where it listens, who may use it, and how much of the machine it gives away."""

from __future__ import annotations

import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from forcingkv.headmaps.errors import InputError

MOST_SESSIONS = 16
TOKEN = "FORCINGKV_TOKEN"
"""The environment variable of the token: what is on a command line others can read."""
PORTS = {"http": 80, "https": 443}
"""Those that browsers leave out."""
SHORTEST_TOKEN = 16
"""Characters of a token: 64 bits where it is drawn in hexadecimal."""


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them, may take. Times are in seconds."""

    prompt: int = 2000
    """Characters of a prompt."""
    text: int = 64 * 1024
    """Bytes of a text message."""
    body: int = 16 * 2**20
    """Bytes of a picture, a binary message, or the body of a request."""
    script: int = 100
    """Prompts of a script: a text encoder may take seconds for each."""
    messages_a_second: float = 50.0
    """Of one socket, on average; twice as many may come at once."""
    sessions_a_client: int = 16
    """Live sessions and unfinished jobs of one address."""
    waiting: int = 32
    """Sessions and jobs that may wait for a place."""
    jobs_kept: int = 1000
    """Jobs in the list, finished ones among them: the oldest finished ones go first."""
    states_kept: int = 64
    """Saved states: the oldest go first."""
    ahead: int = 4
    """Chunks that are on their way to a client which has not yet said that it has them."""
    reader: float = 60.0
    """How long a session waits for a client that takes nothing before it is dropped."""
    lost: float = 60.0
    """How long a client may come back to its session after its connection was lost."""
    idle: float = 120.0
    """How long a paused session keeps its place before it is saved to disk."""
    forgotten: float = 3600.0
    """How long a session that was saved so waits for its client to go on."""
    hello: float = 10.0
    """How long a new socket may say nothing."""
    drain: float = 30.0
    """How long videos may take to end when the service is told to stop."""
    last_words: float = 10.0
    """How long a session that was dropped, or that ends with the service, waits for its client to hear so."""
    seconds: float = 3600.0
    """Length of a video that is made as a job."""


@dataclass(frozen=True)
class Settings:
    """Of one service. Raises InputError for what would be unsafe: to be reached from elsewhere without a
    token."""

    data: Path
    """The folder of jobs, their videos, and saved states."""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: tuple[str, ...] = ()
    """Origins of pages elsewhere that may use the service, such as `https://studio.example`."""
    hosts: tuple[str, ...] = ()
    """Names by which the service is asked for, beside those of this machine; behind a proxy, its name."""
    sessions: int = MOST_SESSIONS
    """Sessions at a time, where memory allows as many."""
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    limits: Limits = Limits()
    memory: int | None = None
    """Bytes that weights and sessions may hold; None: what is free."""
    replica: str = ""
    """The name of this process, where several are one service (`serve/ray.py`) and share the folder."""
    secret: str = field(default="", repr=False)
    """What replicas tell each other apart from strangers by."""

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise InputError(
                f"has {len(self.token)} characters",
                where="the token",
                expected=f"{SHORTEST_TOKEN} or more",
                hint="Draw one: python -c 'import secrets; print(secrets.token_hex(16))'",
            )
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise InputError(
                "has spaces, or characters that not every client sends alike",
                where="the token",
                expected="letters, digits and signs of ASCII",
            )
        if self.token is None and not is_loopback(self.host):
            raise InputError(
                f"{self.host} can be reached from other machines, and no token is given",
                where="--host",
                expected="127.0.0.1, or a token",
                hint="Put one into the environment variable FORCINGKV_TOKEN, or a file: --token-file.",
            )
        object.__setattr__(self, "origins", tuple(map(_origin, self.origins)))
        object.__setattr__(self, "hosts", tuple(map(_name, self.hosts)))

    def knows(self, token: str | None) -> bool:
        """Whether that is the token, in a time that says nothing of it; True where none is asked for."""
        if self.token is None:
            return True
        return hmac.compare_digest((token or "").encode(), self.token.encode())


def _origin(text: str) -> str:
    """An origin as browsers say it: in small letters, without the port that is the scheme's own."""
    parts = split(text)
    if (
        parts is None
        or parts.scheme not in PORTS
        or not parts.hostname
        or (parts.username, parts.path, parts.query, parts.fragment) != (None, "", "", "")
        or text[-1] in "?#"
    ):
        expected = "scheme, host and port as a browser says them, such as https://studio.example"
        raise InputError(f"{text!r} is no origin", where="--origin", expected=expected)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _name(text: str) -> str:
    """A name of the service, as it is compared with that of a request: in small letters."""
    parts = split(f"//{text}")
    if (
        parts is None
        or parts.netloc != text
        or parts.hostname not in (text.lower(), text.lower().strip("[]"))
    ):
        what = f"{text!r} is no name of a machine"
        raise InputError(what, where="--name", expected="a name without scheme and port: video.example")
    return parts.hostname


def split(text: str) -> SplitResult | None:
    """The parts of an address; None: it is none."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - it is looked at here
    except ValueError:
        return None
    return None if any(sign.isspace() for sign in text) else parts


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of that name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
