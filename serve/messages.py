"""The protocol of a live session: what either side may say, as JSON. `docs/serving.md` tells it in words.

Every message is a JSON object with a `type`. Messages of the client are checked against these classes, and
those of the service are made of them: both have the schema that `schema()` gives and `/v1/protocol` serves.
An event with `parts` is followed by as many binary messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from forcingkv.serve.refusals import Code, RefusalError

VERSION = 1
"""Of the protocol. Another one is refused in the answer to `hello`."""

FramesAs = Literal["mp4", "jpeg", "rgb24"]
"""Frames as fragments of H.264 for a browser's MediaSource (one part a chunk, and one with `started`, its
head); as a JPEG each; as the bytes of all frames of a chunk."""
RecacheName = Literal["replay", "keep-sink", "empty-sink", "none", "cut"]
Ended = Literal["complete", "stopped", "slow_reader", "lost", "forgotten", "draining", "failed"]

Chunk = Annotated[int, Field(ge=0, le=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
"""Whole numbers that JavaScript has."""
Prompt = Annotated[str, Field(min_length=1, max_length=20_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
"""Of a bundle, a session or a state. It is looked up, and never becomes a path."""


class Message(BaseModel):
    """What one side says to the other. A name that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Hello(Message):
    """The first message of a client."""

    type: Literal["hello"]
    protocol: int
    token: Annotated[str, Field(max_length=1000)] | None = None
    """Where the service asks for one."""


class ScriptLine(Message):
    """A prompt of a script, from a chunk on."""

    chunk: Chunk
    prompt: Prompt


class Start(Message):
    """Begin a video. One socket has one session at a time."""

    type: Literal["start"]
    bundle: Name | None = None
    """None: the first of the service."""
    prompt: Prompt | None = None
    script: Annotated[list[ScriptLine], Field(max_length=1000)] = []
    """Prompts that the video switches to by itself."""
    seed: Seed = 0
    chunks: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """None: without end, until `stop`."""
    frames: FramesAs = "mp4"
    enlarge: Annotated[int, Field(ge=1, le=32)] = 1
    """How often each pixel is repeated, for tiny videos."""
    image: Annotated[int, Field(ge=1)] | None = None
    """Bytes of a picture to begin with, which is the next binary message."""
    state: Name | None = None
    """A state that `saved` named: the video goes on from there, to the bit, with its own prompt and seed."""


class Resume(Message):
    """Come back to a session whose socket was lost."""

    type: Literal["resume"]
    session: Name
    key: Annotated[str, Field(max_length=100)]
    after: Annotated[int, Field(ge=-1, le=2**53)] = -1
    """The last chunk that arrived whole: those after it are sent again."""


class SwitchPrompt(Message):
    """Another prompt, from the next chunk that is not yet begun, or from a chunk on."""

    type: Literal["switch"]
    prompt: Prompt
    at: Chunk | None = None
    recache: RecacheName | None = None
    fade: Annotated[int, Field(ge=0, le=1000)] = 0


class Pause(Message):
    """Make no more chunks for now."""

    type: Literal["pause"]


class Play(Message):
    """Go on after `pause`."""

    type: Literal["play"]


class Save(Message):
    """Keep the video's state, to begin from there again."""

    type: Literal["save"]


class Stop(Message):
    """End the video. The socket stays, and may start another."""

    type: Literal["stop"]


class Ack(Message):
    """A chunk arrived whole. The service has few on their way, and waits for this."""

    type: Literal["ack"]
    chunk: Chunk


FromClient: TypeAlias = Annotated[
    Hello | Start | Resume | SwitchPrompt | Pause | Play | Save | Stop | Ack, Field(discriminator="type")
]


class BundleInfo(Message):
    """A bundle of the service."""

    name: str
    model: str
    policy: str
    width: int
    height: int
    fps: float
    first_frames: int
    """Frames of the first chunk."""
    frames: int
    """Frames of every other one."""
    words: list[str]
    """The only words that prompts may have; empty: any."""
    prompts: list[str]
    """The only prompts there are embeddings for; empty: any."""
    example: str
    """A prompt that can be used."""
    picture: bool
    """Whether a video may begin with a picture."""
    recache: RecacheName
    """How the cache is made anew at a switch, where none is named."""
    runs_on: str
    session_bytes: int
    """What a session takes beside the weights."""
    kv_bytes: dict[str, int]
    """Keys and values that attention reads in the last phase, by role."""


class Welcome(Message):
    """The answer to `hello`."""

    type: Literal["welcome"] = "welcome"
    protocol: int = VERSION
    version: str
    """Of forcingkv."""
    bundles: list[BundleInfo]
    sessions: int
    """How many fit at a time."""
    ahead: int
    """Chunks that may be on their way without `ack`."""
    lost_seconds: float
    """How long a lost socket may come back."""


class Queued(Message):
    """All places are taken. Said again whenever the place changes."""

    type: Literal["queued"] = "queued"
    session: str
    key: str
    place: int
    """1: the next."""
    wait_seconds: float | None
    """What the sessions of late make one expect; None: nothing is known."""


class Started(Message):
    """The video begins, or goes on where another socket had it. With `mp4` one part follows: the head."""

    type: Literal["started"] = "started"
    session: str
    key: str
    """With both a lost socket is resumed."""
    bundle: str
    prompt: str
    seed: int
    chunks: int | None
    next_chunk: int
    """The first one that will be sent."""
    frames: FramesAs
    codec: str | None = None
    """Of `mp4`, as MediaSource is told it."""
    width: int
    height: int
    """As they are sent: enlarged, and of `mp4` even."""
    fps: float
    parts: int = 0


class Seconds(Message):
    """What a chunk took: `docs/runtime.md`, Timing."""

    denoise: float
    clean: float
    decode: float
    total: float


class ChunkEvent(Message):
    """A chunk. `parts` binary messages follow: its frames."""

    type: Literal["chunk"] = "chunk"
    chunk: int
    first_frame: int
    frames: int
    seconds: Seconds
    every: float
    """Seconds since the chunk before was made, waiting left out: what the service makes at most."""
    kv_bytes: dict[str, int]
    """Keys and values that attention read for it, by role."""
    prompt: str
    given: bool
    parts: int
    bytes: int


class Switched(Message):
    """A switch was taken: its first chunk."""

    type: Literal["switched"] = "switched"
    chunk: int
    prompt: str


class Paused(Message):
    """No more chunks are made."""

    type: Literal["paused"] = "paused"


class Playing(Message):
    """Chunks are made again."""

    type: Literal["playing"] = "playing"


class Saved(Message):
    """The state is kept."""

    type: Literal["saved"] = "saved"
    state: str
    chunk: int
    """That comes next."""


class Asleep(Message):
    """The session was paused for long: it is on disk, and `play` waits for a place again."""

    type: Literal["asleep"] = "asleep"


class EndedEvent(Message):
    """The video is over."""

    type: Literal["ended"] = "ended"
    reason: Ended
    chunks: int
    """That were made."""
    message: str
    state: str | None = None
    """Kept for whoever goes on elsewhere, where the service stops."""


class ErrorEvent(Message):
    """A message was refused. What was on its way goes on."""

    type: Literal["error"] = "error"
    code: Code
    message: str
    retry_after: float | None = None


Event: TypeAlias = (
    Welcome
    | Queued
    | Started
    | ChunkEvent
    | Switched
    | Paused
    | Playing
    | Saved
    | Asleep
    | EndedEvent
    | ErrorEvent
)
FromService: TypeAlias = Annotated[Event, Field(discriminator="type")]
Command: TypeAlias = SwitchPrompt | Pause | Play | Save | Stop

_CLIENT: TypeAdapter[Any] = TypeAdapter(FromClient)
_SERVICE: TypeAdapter[Any] = TypeAdapter(FromService)


def read_message(text: str | bytes) -> Any:
    """A message of a client. Raises RefusalError (bad_message) that says which field is wrong, and how."""
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        raise RefusalError("bad_message", in_words(error)) from error


SAID = 200
"""Characters of a fault that are said."""


def shortened(text: str, longest: int) -> str:
    """A text, cut where it is longer."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def in_words(error: ValidationError) -> str:
    """What is wrong with a message, in a sentence; of several faults the first three."""
    faults = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
        place = ".".join(shortened(str(part), 40) for part in fault["loc"][:6])
        said = shortened(fault["msg"][0].lower() + fault["msg"][1:], SAID)
        faults.append(f"{place}: {said}" if place else said)
    more = error.error_count() - len(faults)
    return f"The message is not of the protocol: {'; '.join(faults)}{f'; and {more} more' if more else ''}."[
        :1000
    ]


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of both directions."""
    return {
        "protocol": VERSION,
        "from_client": _CLIENT.json_schema(),
        "from_service": _SERVICE.json_schema(mode="serialization"),
    }
