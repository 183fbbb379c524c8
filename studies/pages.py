"""Tables that studies write into pages of docs/, each between its own marks."""

from __future__ import annotations


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a table of that name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def page_with(page: str, name: str, table: str) -> str:
    """The page with that table between its marks; they are added at its end where it has none."""
    begin, end = marks(name)
    if begin not in page or end not in page:
        page += f"\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{table}{end}{rest.split(end, 1)[1]}"
