"""What a client says wrongly is answered with a sentence, and nothing else happens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosedError

from forcingkv.serve.messages import read_message
from forcingkv.serve.refusals import RefusalError
from tests.serve.served import LIMITS, PROMPT, TOKEN, Served, Talk, serving

DEEP = "[" * 5000 + "]" * 5000
BAD = {
    "no JSON": ("{", "json"),
    "no object": ("[]", "object"),
    "a number": ("7", "object"),
    "null": ("null", "object"),
    "deep": (DEEP, "recursion"),
    "deep inside": ('{"type": "start", "script": ' + DEEP + "}", "recursion"),
    "no type": ("{}", "type"),
    "another type": ('{"type": "begin"}', "begin"),
    "a list as type": ('{"type": []}', "type"),
    "a name that is not known": ('{"type": "stop", "now": true}', "now"),
    "no prompt": ('{"type": "switch"}', "prompt"),
    "an empty prompt": ('{"type": "switch", "prompt": ""}', "prompt"),
    "a number as prompt": ('{"type": "switch", "prompt": 5}', "prompt"),
    "text as number": ('{"type": "ack", "chunk": "5"}', "chunk"),
    "a fraction": ('{"type": "ack", "chunk": 5.5}', "chunk"),
    "true as number": ('{"type": "ack", "chunk": true}', "chunk"),
    "less than nothing": ('{"type": "ack", "chunk": -1}', "chunk"),
    "too large": ('{"type": "ack", "chunk": 1' + "0" * 400 + "}", "chunk"),
    "NaN": ('{"type": "ack", "chunk": NaN}', ""),
    "a surrogate": ('{"type": "switch", "prompt": "\\ud800"}', ""),
    "a path as state": ('{"type": "start", "state": "../../etc/passwd"}', "state"),
    "a path as bundle": ('{"type": "start", "bundle": "/etc"}', "bundle"),
    "other frames": ('{"type": "start", "frames": "avi"}', "frames"),
    "no chunks": ('{"type": "start", "prompt": "a", "chunks": 0}', "chunks"),
    "much enlarged": ('{"type": "start", "prompt": "a", "enlarge": 1000}', "enlarge"),
    "another recache": ('{"type": "switch", "prompt": "a", "recache": "all"}', "recache"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_says_what_is_wrong(name: str) -> None:
    text, word = BAD[name]
    with pytest.raises(RefusalError) as refused:
        read_message(text)
    assert refused.value.code == "bad_message"
    assert word in refused.value.message.lower()
    assert len(refused.value.message) <= 1000
    assert "pydantic" not in refused.value.message


def test_a_thousand_of_them_change_nothing(served: Served) -> None:
    """Of all kinds, in any order, with binary ones between; the same socket makes a video afterwards."""
    drawn = random.Random(0)
    texts = [text for text, _ in BAD.values()] + ["", "\0", "{}" * 99, json.dumps({"type": "x" * 9999})]
    early = [json.dumps({"type": kind}) for kind in ("stop", "pause", "play", "save", "hello")]
    with served.live() as talk:
        for number in range(1000):
            said: str | bytes = drawn.choice([*texts, *early])
            if number % 10 == 0:
                said = drawn.randbytes(drawn.randrange(2000))
            talk.socket.send(said)
            answer = talk.next()
            assert answer["type"] == "error", (said, answer)
            assert answer["code"] in ("bad_message", "not_now"), (said, answer)
            assert answer["message"].endswith(".")
            assert "Traceback" not in answer["message"]
        talk.start(chunks=1)
        assert len(talk.chunks()) == 1


WRONG_STARTS = {
    "a word that the model does not know": ({"prompt": "zebra"}, "bad_request", "zebra"),
    "a bundle that is not there": ({"bundle": "other"}, "not_found", "pruned, window"),
    "a state that is not there": ({"prompt": None, "state": "0" * 32}, "not_found", "state"),
    "no prompt": ({"prompt": None}, "bad_request", "prompt"),
    "a script that does not begin": (
        {"prompt": None, "script": [{"chunk": 2, "prompt": PROMPT}]},
        "bad_request",
        "0",
    ),
    "a script that falls": (
        {"script": [{"chunk": 4, "prompt": PROMPT}, {"chunk": 2, "prompt": PROMPT}]},
        "bad_request",
        "rise",
    ),
    "a script behind the end": (
        {"script": [{"chunk": 9, "prompt": PROMPT}], "chunks": 3},
        "bad_request",
        "behind the end",
    ),
    "a long prompt": ({"prompt": "a " * 1500}, "too_large", "3000"),
    "a large picture": ({"image": 2**40}, "too_large", "picture"),
}


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_what_cannot_be_begun_is_refused(served: Served, name: str) -> None:
    fields, code, word = WRONG_STARTS[name]
    with served.live() as talk:
        talk.say("start", **({"prompt": PROMPT} | fields))
        refused = talk.hear("error")
        assert (refused["code"], word in refused["message"]) == (code, True), refused
        talk.start(chunks=1)
        assert len(talk.chunks()) == 1


def test_a_wrong_switch_leaves_the_video_alone(served: Served) -> None:
    with served.live() as talk:
        talk.start(bundle="window")
        for fields, word in (
            ({"prompt": "zebra"}, "zebra"),
            ({"prompt": PROMPT, "at": 0}, "begun"),
            ({"prompt": PROMPT, "recache": "cut"}, "scene"),
        ):
            talk.say("switch", **fields)
            while (event := talk.hear("chunk", "error"))["type"] == "chunk":
                talk.say("ack", chunk=event["chunk"])
            assert (event["code"], word in event["message"]) == ("bad_request", True), event
        talk.say("stop")
        assert talk.hear("ended", skip=("chunk",))["reason"] == "stopped"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"type": "start", "prompt": PROMPT}, "bad_message"),
        ({"type": "hello", "protocol": 2}, "version"),
        ({"type": "hello", "protocol": 1, "token": "guess"}, "unauthorized"),
    ],
    ids=["no hello", "another version", "a wrong token"],
)
def test_who_does_not_say_hello_is_shown_out(
    small_bundles: dict[str, Path], tmp_path: Path, said: dict[str, object], code: str
) -> None:
    with serving(tmp_path, small_bundles, token=TOKEN) as served, served.socket() as socket:
        socket.send(json.dumps(said))
        assert Talk(socket).hear("error")["code"] == code
        with pytest.raises(ConnectionClosedError, match="1008"):
            socket.recv(timeout=10)


def test_who_says_nothing_is_shown_out(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with (
        serving(tmp_path, small_bundles, limits=replace(LIMITS, hello=0.2)) as served,
        served.socket() as socket,
    ):
        assert Talk(socket).hear("error")["code"] == "bad_message"
        with pytest.raises(ConnectionClosedError, match="1008"):
            socket.recv(timeout=10)
