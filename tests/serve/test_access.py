"""Who may use the service, and what it says to those who may not."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import HTTPConnection
from websockets.exceptions import InvalidStatus

from forcingkv.headmaps.errors import InputError
from forcingkv.serve.access import Pace, check_client, client_of
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.settings import Settings, is_loopback
from tests.serve.served import LIMITS, PROMPT, TOKEN, Served, serving


@pytest.fixture(scope="module")
def guarded(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> object:
    settings = {"origins": ("https://studio.example",), "hosts": ("video.example",)}
    with serving(tmp_path_factory.mktemp("guarded"), small_bundles, token=TOKEN, **settings) as one:
        yield one


@pytest.fixture(scope="module")
def open_house(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> object:
    """Without a token, for this machine alone."""
    with serving(tmp_path_factory.mktemp("open"), small_bundles) as one:
        yield one


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "video.example", ""])
def test_others_can_reach_it_only_with_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="no token is given"):
        Settings(data=tmp_path, host=host)
    Settings(data=tmp_path, host=host, token=TOKEN)


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 characters"):
        Settings(data=tmp_path, token="abc")


@pytest.mark.parametrize(
    "token", ["0123456789abcdef ", "0123456789abc def", "0123456789abcdéf", "0" * 16 + "\n"]
)
def test_a_token_that_headers_and_messages_would_carry_differently_is_refused(
    tmp_path: Path, token: str
) -> None:
    with pytest.raises(InputError, match="not every client sends alike"):
        Settings(data=tmp_path, token=token)


@pytest.mark.parametrize(
    "origin",
    [
        *("studio.example", "https://studio.example/", "*", "https://a/b", "", "https://", "https://a:b"),
        *("https://me@studio.example", "https://studio.example?", "ftp://studio.example", "https://[::1"),
        *("https://studio.example #", "null"),
    ],
)
def test_what_is_no_origin_is_refused(tmp_path: Path, origin: str) -> None:
    with pytest.raises(InputError, match="is no origin"):
        Settings(data=tmp_path, origins=(origin,))


def test_origins_are_compared_as_browsers_say_them(tmp_path: Path) -> None:
    given = ("HTTPS://Studio.Example:443", "http://studio.example:80", "https://[2001:DB8::1]:8443")
    said = ("https://studio.example", "http://studio.example", "https://[2001:db8::1]:8443")
    assert Settings(data=tmp_path, origins=given).origins == said


@pytest.mark.parametrize(
    "name", ["https://video.example", "video.example:443", "", "a b", "video.example/", "[::1", "me@there"]
)
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no name of a machine"):
        Settings(data=tmp_path, hosts=(name,))


def test_names_are_compared_in_small_letters(tmp_path: Path) -> None:
    assert Settings(data=tmp_path, hosts=("Video.Example", "[2001:DB8::1]")).hosts == (
        "video.example",
        "2001:db8::1",
    )


@pytest.mark.parametrize(
    ("client", "token", "hosts", "refused"),
    [
        ("127.0.0.1", None, (), False),
        ("::1", None, (), False),
        ("192.0.2.7", None, (), True),
        ("192.0.2.7", TOKEN, (), False),
        ("192.0.2.7", None, ("localhost",), False),
    ],
)
def test_without_a_token_clients_of_other_machines_are_refused(
    tmp_path: Path, client: str, token: str | None, hosts: tuple[str, ...], refused: bool
) -> None:
    """Whatever stands before the service, such as Ray's proxy, may listen to others."""
    scope = {"type": "websocket", "client": (client, 9), "headers": [(b"host", b"localhost:8000")]}
    settings = Settings(data=tmp_path, token=token, hosts=hosts)
    with pytest.raises(RefusalError) if refused else nullcontext():
        check_client(settings, HTTPConnection(scope))


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("127.0.0.1.example", False),
    ],
)
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) == here


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer guess", f"Basic {TOKEN}", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", "Bearer é"],
)
def test_no_request_is_answered_without_the_token(guarded: Served, authorization: str) -> None:
    with guarded.http(Authorization=authorization.encode("latin-1")) as http:
        for method, path in (
            ("GET", "/v1/videos"),
            ("POST", "/v1/videos"),
            ("GET", "/v1/videos/x"),
            ("GET", "/v1/videos/x/content"),
            ("DELETE", "/v1/videos/x"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
        ):
            answer = http.request(method, path)
            assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer"), path


def test_the_token_opens_it(guarded: Served) -> None:
    with guarded.http() as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "pruned"
    with guarded.live() as talk:
        talk.start(chunks=1)
        assert len(talk.chunks()) == 1


def test_health_is_no_secret(guarded: Served) -> None:
    with guarded.http(Authorization="") as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("origin", "let_in"),
    [
        (None, True),
        ("https://studio.example", True),
        ("own", True),
        ("https://evil.example", False),
        ("http://studio.example", False),
        ("https://studio.example.evil", False),
        ("null", False),
        ("http://127.0.0.1:1", False),
    ],
)
def test_a_foreign_page_is_refused(guarded: Served, origin: str | None, let_in: bool) -> None:
    """Over both ways: a browser says of which page a request is."""
    origin = guarded.url if origin == "own" else origin
    with guarded.http(**({"Origin": origin} if origin else {})) as http:
        assert (http.get("/v1/videos").status_code == 200) == let_in
        sent = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1})
        assert (sent.status_code == 200) == let_in
    with nullcontext() if let_in else pytest.raises(InvalidStatus, match="403"), guarded.live(origin=origin):
        pass


@pytest.mark.parametrize(
    ("host", "let_in"),
    [
        ("127.0.0.1:1", True),
        ("localhost", True),
        ("[::1]:80", True),
        ("video.example", True),
        ("evil.example", False),
    ],
)
def test_a_name_that_a_page_gave_this_machine_is_refused(
    small_bundles: dict[str, Path], tmp_path: Path, host: str, let_in: bool
) -> None:
    """DNS rebinding: there is no token, so the name in the request must be known."""
    with serving(tmp_path, small_bundles, hosts=("video.example",)) as served, served.http(Host=host) as http:
        answer = http.get("/v1/videos")
        assert answer.status_code == (200 if let_in else 403)


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "]", "127.0.0.1:x", "[zz]", "", "127.0.0.1:70000"])
@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_names_that_are_none_are_refused_without_a_fault(open_house: Served, header: str, host: str) -> None:
    text = f"http://{host}" if header == "Origin" else host
    with open_house.http(**{header: text}) as http:
        answer = http.get("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("there", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("unknown", "unknown"),
        (None, "local"),
    ],
)
def test_by_which_address_a_client_is_counted(there: str | None, counted: str) -> None:
    """Whoever has one address of IPv6 has 2^64 of them."""
    scope = {"type": "http", "client": there and (there, 9), "headers": []}
    assert client_of(HTTPConnection(scope)) == counted


def test_a_large_body_is_refused_before_it_is_read(guarded: Served) -> None:
    def parts() -> object:
        for _ in range(64):
            yield b"x" * 2**20

    with guarded.http() as http:
        for body in (b"x" * (17 * 2**20), parts()):
            answer = http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_client_has_so_many_sessions_and_no_more(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    limits = replace(LIMITS, sessions_a_client=1)
    with (
        serving(tmp_path, small_bundles, limits=limits) as served,
        served.live() as one,
        served.live() as other,
    ):
        one.start()
        other.say("start", prompt=PROMPT)
        assert other.hear("error")["code"] == "too_many"
        one.say("stop")
        one.chunks()  # what it has acknowledged is held no longer
        time.sleep(0.3)
        other.start(chunks=1)
        assert len(other.chunks()) == 1


def test_the_page_loads_nothing_from_elsewhere(guarded: Served) -> None:
    with guarded.http(Authorization="") as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name in ("main.js", "live.js", "player.js", "charts.js", "style.css"):
            file = http.get(f"/{name}")
            assert file.status_code == 200
            assert "://" not in file.text.replace("http://www.w3.org/2000/svg", "")


def test_no_answer_has_a_path_of_this_machine(guarded: Served) -> None:
    here = str(guarded.service.settings.data)
    with guarded.live() as talk, guarded.http() as http:
        talk.say("start", prompt=None, state="0" * 32)
        said = [str(talk.hear("error")), str(talk.welcome)]
        said += [
            http.get(path).text
            for path in ("/v1/videos/x", "/metrics", "/openapi.json", "/nothing", "/v1/models")
        ]
    for text in said:
        assert here not in text
        assert "/root" not in text
        assert "Traceback" not in text


def test_messages_beyond_the_pace_wait() -> None:
    """Twice the rate may come at once; what follows comes at the rate."""

    async def times() -> list[float]:
        pace, began, found = Pace(50.0), time.monotonic(), []
        for _ in range(120):
            await pace.take()
            found.append(time.monotonic() - began)
        return found

    found = asyncio.run(times())
    assert found[95] < 0.2
    assert found[119] > 19 / 50 * 0.9
