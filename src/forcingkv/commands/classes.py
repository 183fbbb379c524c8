"""`forcingkv generate --classes online`: heads of a video labelled by what they attend to in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from forcingkv.commands.console import say
from forcingkv.commands.models import text_input
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.measure.nominal import in_words
from forcingkv.runtime import Session

if TYPE_CHECKING:
    from forcingkv.commands.generate import Asked

Classes = Annotated[
    str,
    Option(
        help="map: heads as the head map labels them; online: found anew in this video's first chunks, as"
        " Dummy Forcing is released (torch, policies dummy-forcing and dummy-forcing-6)."
    ),
]


def found_online(classes: str, **others: Path | None) -> bool:
    """Whether classes are found in the video. Raises InputError for a word that is not known, and for options
    of `others` that such a video cannot have."""
    if one_of(("map", "online"), classes, "way to classes of heads") == "map":
        return False
    for name, given in others.items():
        if given is not None:
            what = (
                "is of no use to a video whose first chunks are made ahead, and whose heads it does not say"
            )
            raise InputError(what, where=f"--{name}", hint=f"Leave out --{name}, or --classes online.")
    return True


def classified(session: Session, asked: Asked) -> Session:
    """The session for the video that the options ask for, with classes found in it; the other is closed."""
    prompts = asked.prompts
    text = text_input(session.spec, prompts.first, prompts.embeds, random=prompts.random)
    noise, start = asked.given.read(session.plan)
    if start is None:
        start = asked.begin.latents(session, asked.fps or session.spec.fps)
    found = session.classified(text, seed=asked.seed or 0, noise=noise, start=start)
    session.close()
    assert found.bundle.headmap is not None
    say(f"classes of this video: {in_words(found.bundle.headmap)}", error=True)
    return found
