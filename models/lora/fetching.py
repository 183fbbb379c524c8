"""LoRAs that lie on the Hugging Face hub: which file of a repository is meant, and fetching it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath

from forcingkv.headmaps.files import there
from forcingkv.models.hub import fetch, hub_place, list_files
from forcingkv.models.lora.request import EXPECTED, SUFFIXES, Lora, usual_file
from forcingkv.models.lora.scales import CONFIG


def on_this_machine(lora: Lora, progress: Callable[[str], None]) -> tuple[Lora, str | None]:
    """A LoRA on this machine, and what was taken of the hub, if anything, in a sentence.

    What is no file or folder here is looked for on the hub (`hub.FORM`). Of a repository, or a folder in it,
    the file is chosen as of a folder here; a configuration beside it is fetched too. `progress` is called
    with a line on what is fetched, before it is.

    Raises InputError where there is none, or several could be meant.
    """
    if there(lora.path):
        return lora, None
    listing = list_files(hub_place(lora.path, EXPECTED, "--lora"))
    place, names = listing.place, list(listing.sizes)
    file = place.path
    if file not in names:
        start = f"{file}/" if file else ""
        inside = [name for name in names if name.startswith(start) and name.lower().endswith(SUFFIXES)]
        beside = [name for name in inside if "/" not in name[len(start) :]]
        file = usual_file(beside or inside, str(place))
    config = (PurePosixPath(file).parent / CONFIG).as_posix()
    folder = fetch(listing, [name for name in (file, config) if name in names], progress)
    remark = f" ({listing.remark})" if listing.remark else ""
    said = f"{place.repository}, revision {listing.commit[:12]}{remark}: {file}"
    return replace(lora, path=folder / file), said
