"""Whether what a saved state says goes together, and fits what is given to go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.given import GivenNoise, start_digest
from forcingkv.runtime.spec import ENCODED

if TYPE_CHECKING:
    from forcingkv.runtime.snapshot import Snapshot

STATE = "state.json"


def check_given(state: Snapshot, folder: Path, noise: GivenNoise | None, start: Array | None) -> None:
    """Raise InputError unless a saved video goes on with the noise and the start that it had."""
    where = str(folder / STATE)
    if noise is None and state.noise is not None:
        raise InputError(
            f"was saved of a video whose noise came in a file (digest {state.noise[:12]}...)",
            where=where,
            hint="Give the same file again (--noise).",
        )
    if noise is not None and noise.digest != state.noise:
        has = "noise of the seed" if state.noise is None else f"noise of the digest {state.noise[:12]}..."
        raise InputError(
            f"is other noise ({noise.digest[:12]}...), and the saved video has {has}",
            where=noise.path,
            expected="the noise that the video was begun with",
            hint="A saved video goes on as it began; to make another, leave out --restore.",
        )
    if start is not None and start_digest(start) != state.start:
        raise InputError(
            "is another start than that of the saved video",
            where="start",
            expected="the latents that it began with, or none: the state has them",
        )


def check_counts(state: Snapshot, bundle: Bundle, path: Path) -> None:
    """Refuse a state that no video can have."""
    calls = bundle.plan.spec.frames_per_chunk // bundle.manifest.graphs["decode"].inputs["latents"].shape[2]
    ready = [one.index - state.index for one in state.ready]
    made, planned = ([switch.chunk for switch in of or ()] for of in (state.switches, state.planned))
    last, cuts = (state.switches or ())[-1:], state.cuts or ()
    # A cache of newest frames that were encoded anew may stand where a longer video's does.
    encoded = any(one.recache in ENCODED for one in state.switches or ())
    ahead = bundle.plan.phases[-1].first_chunk if encoded else 0
    if not (
        state.index >= 0
        and ready == list(range(len(ready)))
        and state.made == state.index + len(ready)
        and 0 <= state.passes <= state.made + ahead
        and (state.passes > 0 or not state.hollow)
        and list(cuts) == sorted({*cuts})
        and all(0 < cut <= state.passes for cut in cuts)
        and (not state.fading or any(one.chunk <= state.made <= one.last_blended + 1 for one in last))
        and state.decoder_calls == state.made * calls
        and (state.given or 0) >= 0
        and (state.given is None or state.start is not None)
        and made == sorted(made)
        and planned == sorted(set(planned))
        and all(0 <= chunk <= state.made for chunk in made)
        and all(chunk >= state.made for chunk in planned)
    ):
        raise InputError(
            f"has numbers that do not go together (index {state.index}, {len(ready)} ready,"
            f" made {state.made}, passes {state.passes}, decoder_calls {state.decoder_calls},"
            f" switches at {made} and {planned})",
            where=str(path),
            hint="The file was changed: save the state again.",
        )
