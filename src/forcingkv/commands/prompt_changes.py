"""The prompts of a video as `generate` is told them: --prompt and --switch, or --script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from forcingkv.commands.console import say
from forcingkv.commands.models import text_input
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.prompt_scripts import PromptScript, read_script
from forcingkv.runtime.prompts import shortened
from forcingkv.runtime.script import recache_of
from forcingkv.runtime.spec import ModelSpec, Recache
from forcingkv.runtime.text import TextInput


@dataclass(frozen=True)
class Prompts:
    """What the options say of the prompts of a video, and of how it goes from one to the next."""

    first: str | None
    """None: not given; of a file of embeddings its only one."""
    embeds: Path | None
    switches: Sequence[str]
    """Each "SECONDS:PROMPT"."""
    script: PromptScript | None
    recache: Recache | None
    """None: as the model was trained."""
    fade: int
    random: bool = False
    """Whether random numbers stand for text embeddings that are not given."""

    @property
    def after(self) -> tuple[str, ...]:
        """The prompts but the first."""
        if self.script:
            return self.script.prompts[1:]
        return tuple(switch.partition(":")[2].strip() for switch in self.switches)

    def say_how(self, spec: ModelSpec) -> None:
        """Say how the cache is made anew at each switch, where there are any."""
        if self.after:
            by = "" if self.recache else f", the way of {spec.name}"
            say(f"recache {recache_of(spec, self.recache)}{by}", error=True)

    def changes(
        self, spec: ModelSpec, chunks_for: Callable[[float], int]
    ) -> list[tuple[int, TextInput, Recache]]:
        """The changes of the prompt, in order: each the index of a chunk, its new prompt, and how the cache
        is made anew.

        Of --switch with the first chunk that begins at that second or later, of a script at that latent
        frame. `chunks_for` has the chunks of so many seconds. The first chunk of a scene that is cut to has
        the model's prefix before its prompt (`ModelSpec.scene_prefix`).

        Raises InputError for a switch that is not of that form, or whose prompt cannot be used, and for two
        with one chunk.
        """
        told = self._of_script(spec) if self.script else self._of_switches(chunks_for)
        how, begun = recache_of(spec, self.recache), {chunk for chunk, _ in told}
        prefix = spec.scene_prefix if how == "cut" else ""
        made: list[tuple[int, TextInput, Recache]] = []
        for chunk, prompt in told:
            made.append((chunk, self._text(spec, prefix if chunk else "", prompt), how))
            if prefix and chunk and chunk + 1 not in begun:
                made.append((chunk + 1, self._text(spec, "", prompt), "none"))
        return made

    def _text(self, spec: ModelSpec, prefix: str, prompt: str) -> TextInput:
        try:
            return text_input(spec, prefix + prompt, self.embeds, random=self.random)
        except InputError as error:
            if not (prefix and self.embeds):
                raise
            hint = (
                f"The first chunk of a scene has {prefix!r} before its prompt: encode that line too, or"
                " switch with --recache replay or none."
            )
            raise InputError(error.what, where=error.where, expected=error.expected, hint=hint) from error

    def _of_script(self, spec: ModelSpec) -> list[tuple[int, str]]:
        assert self.script is not None
        size, chunks = spec.frames_per_chunk, self.script.chunks(spec.frames_per_chunk)
        for frame, chunk, prompt in zip(self.script.frames, chunks, self.after, strict=True):
            if frame != chunk * size:
                begins = f"begins with frame {chunk * size}, the first of chunk {chunk}, not with {frame}"
                say(f"note: {shortened(prompt)} {begins}: one switch a chunk, where it begins", error=True)
        return list(zip(chunks, self.after, strict=True))

    def _of_switches(self, chunks_for: Callable[[float], int]) -> list[tuple[int, str]]:
        changes: dict[int, tuple[str, str]] = {}
        for option in self.switches:
            start, colon, prompt = option.partition(":")
            try:
                seconds = float(start)
            except ValueError:
                seconds = 0.0
            if not colon or not 0 < seconds < math.inf:
                raise InputError(
                    f"has no time above 0 in {option!r}", where="--switch", expected='"SECONDS:PROMPT"'
                )
            chunk = chunks_for(seconds)
            if chunk in changes:
                what = f"has {changes[chunk][0]!r} and {option!r}, which both begin with chunk {chunk}"
                raise InputError(what, where="--switch", expected="one prompt for each chunk")
            changes[chunk] = option, prompt.strip()
        return [(chunk, prompt) for chunk, (_, prompt) in sorted(changes.items())]


def told_prompts(
    prompt: str | None,
    embeds: Path | None,
    switches: Sequence[str] | None,
    script: Path | None,
    script_line: int | None,
    recache: str | None,
    no_recache: bool,
    fade: int,
    *,
    random: bool,
) -> Prompts:
    """The options of a video's prompts. Raises InputError for those that exclude each other, and for a script
    that cannot be read."""
    if script and (prompt is not None or switches):
        raise InputError("use either --script or --prompt and --switch, not both")
    if script_line is not None and not script:
        raise InputError("is of no use without --script", where="--script-line")
    if recache and no_recache:
        raise InputError("use either --recache or --no-recache, not both")
    known = get_args(Recache)
    if recache and recache not in known:
        raise InputError(f"is {recache!r}", where="--recache", expected=" or ".join(map(repr, known)))
    how: Recache | None = "none" if no_recache else recache  # type: ignore[assignment]
    told = read_script(script, script_line) if script else None
    if told:
        prompt = told.prompts[0]
    return Prompts(prompt, embeds, switches or (), told, how, fade, random=random)
