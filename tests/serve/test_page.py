"""The page, in a headless Chromium: plays, switches, comes back, compares; on a phone, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forcingkv.models.demo.judge import read
from tests.serve.browser import CHROMIUM, Page, browser
from tests.serve.served import Served, serving

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"),
]
PROMPT, OTHER = "a 3 moving left and a 7 moving up", "a 1 moving right and a 5 moving down"

LOOK = """(() => {
  const video = document.querySelectorAll('video')[%d];
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [48, 32];
  const context = canvas.getContext('2d');
  context.drawImage(video, 0, 0, 48, 32);
  return [...context.getImageData(0, 0, 48, 32).data].filter((_, i) => i %% 4 === 0);
})()"""
"""What a player shows: the first channel of 48 x 32 pixels."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, demo_bundles: dict[str, Path]) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), demo_bundles) as one:
        yield one


@pytest.fixture
def page(served: Served, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as page:
        page.size(1200, 900)
        page.open(f"{served.url}/")
        page.until("!document.getElementById('start').disabled")
        yield page
        assert page.troubles == []
        host = f"127.0.0.1:{served.port}"
        assert {url for url in page.requests if host not in url and not url.startswith("blob:")} == set()


def fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        page.run(f"document.getElementById({name!r}).value = {str(value)!r}")


def click(page: Page, name: str) -> None:
    page.run(f"document.getElementById({name!r}).click()")


def shown(page: Page, player: int = 0) -> int:
    """The chunk that a player shows."""
    text = page.run(f"document.querySelectorAll('figcaption')[{player}].textContent")
    found = text.partition("chunk ")[2].partition(" ")[0]
    return int(found) if found.isdigit() else -1


def test_it_plays_and_a_new_prompt_is_seen_where_it_said(page: Page) -> None:
    fill(page, prompt=PROMPT)
    click(page, "start")
    page.until("document.querySelector('figcaption').textContent.includes('chunk 2 of')")
    assert seen(page, (3, 7), until=6)
    fill(page, prompt=OTHER)
    click(page, "switch")
    said = page.until(
        "document.getElementById('said').textContent.match(/takes effect with chunk (\\d+)/)?.[1]"
    )
    page.until(
        "Number(document.querySelector('figcaption').textContent.match(/chunk (\\d+) of/)?.[1])"
        f" >= {said} + 1"
    )
    assert seen(page, (1, 5), until=int(said) + 2)
    names = page.run("[...document.querySelectorAll('#prompts li')].map((item) => item.textContent)")
    assert names == [f"from chunk 0{PROMPT}", f"from chunk {said}{OTHER}"]


def seen(page: Page, expected: tuple[int, int], until: int) -> bool:
    """Whether both digits are read from some frame up to that chunk: the judge misreads one in ten."""
    while shown(page) <= until:
        if digits(page) == expected:
            return True
    return False


def digits(page: Page) -> tuple[int | None, int | None]:
    """The digits that are on the screen, left and right."""
    return read(np.array(page.run(LOOK % 0)).reshape(1, 32, 48) / 127.5 - 1)


def test_two_policies_side_by_side_switch_with_the_same_chunk(page: Page) -> None:
    fill(page, prompt=PROMPT, other="full", chunks=30)
    click(page, "start")
    page.until("document.querySelectorAll('.chart').length === 3")
    page.until(
        "[...document.querySelectorAll('figcaption')].every((one) => one.textContent.includes('s a chunk'))"
    )
    first = [np.array(page.run(LOOK % player)) for player in (0, 1)]
    assert all(one.max() > 100 for one in first)
    fill(page, prompt=OTHER)
    click(page, "switch")
    page.until("document.querySelectorAll('#prompts li').length === 2")
    names = page.run(
        "[...document.querySelectorAll('figcaption')].map((one) => one.textContent.split(' ')[0])"
    )
    assert names == ["forcing-kv", "full"]


def test_it_comes_back_when_the_socket_is_lost(page: Page, served: Served) -> None:
    fill(page, prompt=PROMPT, chunks=400)
    click(page, "start")
    page.until("document.querySelector('figcaption').textContent.includes('chunk 2 of')")
    before = page.run("document.querySelector('video').currentTime")
    served.cut()
    page.until("!document.querySelector('.wait').hidden")
    page.until("document.querySelector('.wait').hidden")
    page.until(f"document.querySelector('video').currentTime > {before} + 2")
    chunks = page.run("document.querySelector('video').buffered.length")
    assert chunks == 1  # without a gap


def test_what_is_said_while_the_socket_is_lost_is_said_after(page: Page, served: Served) -> None:
    fill(page, prompt=PROMPT, chunks=400)
    click(page, "start")
    page.until("document.querySelector('figcaption').textContent.includes('chunk 2 of')")
    served.cut()
    page.until("!document.querySelector('.wait').hidden")
    click(page, "stop")
    page.until("document.getElementById('said').textContent.includes('was stopped')")
    assert page.run("document.getElementById('stop').disabled")


def test_a_second_click_on_start_starts_nothing_else(page: Page, served: Served) -> None:
    before = served.service.engine.places.held  # those of pages that were closed
    fill(page, prompt=PROMPT)
    page.run("document.getElementById('start').click(), document.getElementById('start').click()")
    page.until("document.querySelector('figcaption').textContent.includes('chunk 1 of')")
    click(page, "stop")
    page.until("document.getElementById('said').textContent.includes('was stopped')")
    assert served.service.engine.places.held <= before


def test_pause_play_save_stop_and_download(page: Page) -> None:
    fill(page, prompt=PROMPT)
    click(page, "start")
    page.until("document.querySelector('figcaption').textContent.includes('chunk 1 of')")
    click(page, "pause")
    page.until("document.querySelector('video').paused")
    assert page.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    click(page, "pause")
    page.until("!document.querySelector('video').paused")
    click(page, "save")
    page.until("document.getElementById('said').textContent.includes('is kept as')")
    click(page, "stop")
    page.until("document.getElementById('said').textContent.includes('was stopped')")
    assert page.run("document.getElementById('stop').disabled")
    assert not page.run("document.getElementById('download').disabled")


def test_a_wrong_prompt_is_said(page: Page) -> None:
    fill(page, prompt="a zebra")
    click(page, "start")
    page.until("document.getElementById('said').textContent.includes('zebra')")
    assert page.run("document.getElementById('said').className") == "trouble"
    assert page.run("document.getElementById('stop').disabled")
    assert page.run("document.getElementById('start').textContent") == "Start"


def test_it_is_used_by_keyboard(page: Page) -> None:
    page.run("document.getElementById('prompt').focus()")
    fill(page, prompt=PROMPT, chunks=3)
    seen = []
    for _ in range(12):
        page.key("Tab", 9)
        seen.append(page.run("document.activeElement.id"))
        if seen[-1] == "start":
            page.key("Enter", 13, "\r")
            break
    assert seen == ["bundle", "other", "seed", "chunks", "picture", "start"]
    page.until("document.getElementById('said').textContent.includes('complete')")


def test_everything_has_a_name_to_be_read_out(page: Page) -> None:
    nameless = page.run(
        "[...document.querySelectorAll('input, select, textarea, button, video')].filter((one) =>"
        " !one.labels?.length && !one.textContent.trim() && !one.getAttribute('aria-label')).length"
    )
    assert nameless == 0
    assert page.run("document.getElementById('said').getAttribute('aria-live')") == "polite"
    assert page.run("document.documentElement.lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(320, 640), (390, 844), (1200, 900)])
def test_it_fits_the_screen_in_light_and_dark(page: Page, width: int, height: int, dark: bool) -> None:
    page.dark(dark)
    page.size(width, height, phone=width < 500)
    page.open(page.run("location.href"))
    page.until("!document.getElementById('start').disabled")
    assert page.run("document.documentElement.scrollWidth") <= width
    small = page.run(
        "[...document.querySelectorAll('button')]"
        ".filter((one) => one.offsetParent && one.offsetHeight < 44).length"
    )
    assert small == 0
    back = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 300) == dark
