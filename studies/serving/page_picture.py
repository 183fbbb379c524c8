"""Pictures of the page as it plays, two policies side by side: for docs/serving.md, and to be looked at.

python -m studies.serving.page_picture --bundles demo-out/bundles --out docs/pictures
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.serve.browser import browser
from tests.serve.served import serving

PROMPT = "a 3 moving left and a 7 moving up"


def main() -> None:
    """Play for a while, take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=6.0)
    given = parser.parse_args()
    bundles = {name: given.bundles / name for name in ("forcing-kv", "full")}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), bundles) as served:
        for name, (width, height), dark, phone in (
            ("serve-page", (1280, 900), False, False),
            ("serve-page-dark", (1280, 900), True, False),
            ("serve-page-phone", (390, 844), False, True),
        ):
            with browser(Path(folder) / name) as page:
                page.size(width, height, phone=phone)
                page.dark(dark)
                page.open(f"{served.url}/")
                page.until("!document.getElementById('start').disabled")
                for field, value in {"prompt": PROMPT, "other": "full", "chunks": 60}.items():
                    page.run(f"document.getElementById({field!r}).value = {str(value)!r}")
                page.run("document.getElementById('start').click()")
                page.until("document.querySelectorAll('.chart').length === 3", 60)
                time.sleep(given.seconds)
                page.run("window.scrollTo(0, 0)")
                page.picture(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
