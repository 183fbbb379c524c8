"""The bundles of a service: opened once, with sessions for clients on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Bundle, Prompt, Session
from forcingkv.runtime.frame_encoder import has_encoder
from forcingkv.runtime.script import recache_of
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import Embeds, TextInput, prompt_input, read_embeds
from forcingkv.serve.messages import BundleInfo
from forcingkv.serve.refusals import RefusalError

Encode = Callable[[ModelSpec, str], Prompt]
"""Words to what a model takes, by a text encoder that the service has loaded."""
OF_WEIGHTS = ("weights", "cuda")
"""Parts of a session's memory that all sessions on the same weights share."""


@dataclass(frozen=True)
class BundleChoice:
    """A bundle that a service is to offer."""

    name: str
    folder: Path
    embeds: Path | None = None
    """Embeddings of the prompts that clients may ask for, for a model that does not take words."""
    example: str = ""
    """A prompt that can be used."""
    digest: str | None = None
    """That the bundle has to have, as somebody said whom you trust."""


class ServedBundle:
    """A bundle whose weights are loaded, and which gives sessions on them.

    Args:
        choice: which, and how prompts are read.
        weights: a session on it. It is the first that is given.
        encode: a text encoder, where the model needs one and the service has it.

    Attributes:
        name: what clients call it.
        session_bytes: what each session holds beside the weights.
        chunk_bytes: of the frames of a chunk, as uint8 RGB.
    """

    def __init__(self, choice: BundleChoice, weights: Session, encode: Encode | None = None) -> None:
        self.name, self.bundle = choice.name, weights.bundle
        self._weights, self._runs_on, self._encode = weights, weights.runs_on, encode
        self._embeds: Embeds | None = read_embeds(choice.embeds) if choice.embeds else None
        self._example = choice.example or (self._embeds.prompts[0] if self._embeds else "")
        self._free = [weights]
        self._turn = Lock()
        parts = weights.footprint
        self.session_bytes = sum(size for part, size in parts.items() if part not in OF_WEIGHTS)
        plan = self.bundle.plan
        width, height = self.bundle.manifest.frame_size
        most = max(plan.spec.frames_of(1), plan.spec.frames_of(2) - plan.spec.frames_of(1))
        self.chunk_bytes = most * width * height * 3
        self.weight_bytes = sum(size for part, size in parts.items() if part in OF_WEIGHTS)
        if self.bundle.plan.spec.text.kind != "words" and not self._embeds and encode is None:
            raise InputError(
                f"{self.bundle.plan.spec.name} takes text embeddings, and there is nothing that makes them",
                where=f"the bundle {choice.name}",
                hint="Give a file of them (--embeds NAME=FILE), or a text encoder (--text-encoder).",
            )

    @property
    def encodes(self) -> bool:
        """Whether the text encoder of the service makes its prompts."""
        return self._encode is not None and not self._embeds and self.bundle.plan.spec.text.kind != "words"

    @property
    def info(self) -> BundleInfo:
        """What clients are told of it."""
        plan, spec = self.bundle.plan, self.bundle.plan.spec
        width, height = self.bundle.manifest.frame_size
        first, second = spec.frames_of(1), spec.frames_of(2)
        return BundleInfo(
            name=self.name,
            model=spec.name,
            policy=plan.policy.name,
            width=width,
            height=height,
            fps=spec.fps,
            first_frames=first,
            frames=second - first,
            words=list(spec.text.vocabulary) if spec.text.kind == "words" else [],
            prompts=list(self._embeds.prompts[:1000]) if self._embeds else [],
            example=self._example,
            picture=has_encoder(self.bundle.manifest.graphs, plan),
            recache=recache_of(spec, None),
            runs_on=self._runs_on,
            session_bytes=self.session_bytes,
            kv_bytes={name: size for name, size in self.kv_bytes(None).items() if size},
        )

    def kv_bytes(self, chunk: int | None) -> dict[str, int]:
        """Keys and values that attention reads for a chunk, by role; None: once caches are as long as they
        get."""
        return self.bundle.plan.kv_bytes_by_role(self.bundle.manifest.compute, chunk)

    def prompt(self, words: str, longest: int) -> Prompt:
        """A client's words as what the model takes.

        Raises RefusalError (too_large) for more characters than the limit, and InputError for words that the
        model does not know, or that there is no embedding of.
        """
        if len(words) > longest:
            raise RefusalError(
                "too_large", f"The prompt has {len(words)} characters; {longest} are the most."
            )
        spec = self.bundle.plan.spec
        if self._embeds:
            return TextInput(words, self._embeds.get(words, spec))
        if self._encode and self.encodes:
            return self._encode(spec, words)
        prompt_input(spec, words)
        return words

    def take(self) -> Session:
        """A session, for one video at a time. Raises what `Session.sibling` raises for want of memory."""
        with self._turn:
            if self._free:
                return self._free.pop()
        return self._weights.sibling()

    def give_back(self, session: Session) -> None:
        """A session that nobody uses any more."""
        if session is not self._weights:
            session.close()
            return
        with self._turn:
            self._free.append(session)

    def close(self) -> None:
        """Give back its memory; that of sessions which still run goes with them."""
        self._weights.close()


def open_bundles(
    choices: Iterable[BundleChoice],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    encode: Encode | None = None,
) -> dict[str, ServedBundle]:
    """Open all of them, by name.

    Raises InputError for two of the same name, and what `Session.open` raises; nothing stays open then.
    """
    opened: dict[str, ServedBundle] = {}
    try:
        for choice in choices:
            if choice.name in opened:
                raise InputError(
                    f"two bundles are called {choice.name}",
                    where="--bundle",
                    expected="names that differ",
                    hint="Name one: --bundle NAME=FOLDER.",
                )
            bundle = Bundle.open(choice.folder, expect=choice.digest)
            session = Session.open(bundle, backend=backend, device=device, threads=threads)
            try:
                opened[choice.name] = ServedBundle(choice, session, encode)
            except BaseException:
                session.close()
                raise
    except BaseException:
        for one in opened.values():
            one.close()
        raise
    return opened
