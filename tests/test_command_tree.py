"""The command line against the one of commit d2fcad5 (golden/commands.json): nothing changes unnoticed.

The file was written by `python tests/command_tree.py` with that commit on the path. Choices such as the
names of policies are checked by the commands themselves; the tests of each command have them.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.command_tree import Tree, tree

GOLDEN = Path(__file__).with_name("golden") / "commands.json"

_WAYS = "new: the same model on several backends and in several dtypes, in turns"
_SEVERAL = "may be given again, each with its strength: users add LoRAs to a preset's own"
_WITHOUT = "new: a preset's own LoRA stays where a user adds others, unless it is left out"
_DIGESTS = "new: a bundle is a program, and a digest from someone you trust says whose it is"

_AS_SAVED = "not given is not the default: --restore has its own, and refuses another"

_AT_MOST = "more than 100,000 hung or took all memory before anything was said"

_BAKED = "new: a model is run without a bundle of the user's, by torch"

_WHERE = "new: there are backends that can choose where and in what they compute"

_GIVEN = "new: noise and latents that were made elsewhere: the only way to a video of the authors' seed"
_QUERIES = "new: policies that score tokens by statistics of a model's queries are given a file of them"
_PASSES = "new: the clean pass is recorded too, and what is scored of a recording can be chosen"

_DOCTOR = "new: what a machine can run, and what is wrong with it"

_STRIPS = "new: a frame may be decoded in strips, which takes less memory"

_SWITCHES = "prompts are switched as public code does it too: by which way is a word, not yes or no"

_STARTS = "new: videos that begin with a picture or a clip, or are drawn from one"

_POLICIES = "new: what the policies show heads, what that takes, and where they come from"
_CONTEXT = "new: the pass that fills the cache is a choice"
_SERVED = "new: bundles over the network"
_MANY = "new: many videos with one command, on one machine or spread over workers"
CHANGED: dict[str, str] = {
    **dict.fromkeys(
        ("generate --prompts", "generate --seeds", "generate --ray", "generate --workers"), _MANY
    ),
    "serve": _SERVED,
    "serve --backend": _SERVED,
    "serve --bundle": _SERVED,
    "serve --data": _SERVED,
    "serve --device": _SERVED,
    "serve --embeds": _SERVED,
    "serve --expect-digest": _SERVED,
    "serve --host": _SERVED,
    "serve --log-level": _SERVED,
    "serve --name": _SERVED,
    "serve --open": _SERVED,
    "serve --origin": _SERVED,
    "serve --port": _SERVED,
    "serve --sessions": _SERVED,
    "serve --text-encoder": _SERVED,
    "serve --threads": _SERVED,
    "serve --token-file": _SERVED,
    **dict.fromkeys((f"{name} --context" for name in ("export", "generate", "plan", "bench")), _CONTEXT),
    "policies": _POLICIES,
    "policies --headmap": _POLICIES,
    "policies --heads": _POLICIES,
    "policies --json": _POLICIES,
    "policies --model": _POLICIES,
    "policies --picture": _POLICIES,
    "policies --resolution": _POLICIES,
    "policies name": _POLICIES,
    "export --decode-strips": _STRIPS,
    "plan --decode-strips": _STRIPS,
    "doctor": _DOCTOR,
    "doctor --bundle": _DOCTOR,
    "doctor --json": _DOCTOR,
    "generate --backend": "not given, it is chosen: torch runs bundles without graphs",
    "generate --compile": _WHERE,
    "demo --compile": _WHERE,
    "demo --device": _WHERE,
    "demo --dtype": _WHERE,
    "demo --provider": _WHERE,
    "evaluate --compile": _WHERE,
    "evaluate --device": _WHERE,
    "evaluate --dtype": _WHERE,
    "evaluate --provider": _WHERE,
    "evaluate --backend": "not given, it is chosen: torch runs bundles without graphs",
    "generate --bundle": "not needed any more: --model takes its place",
    "generate --checkpoint": _BAKED,
    "generate --decoder": _BAKED,
    "generate --headmap": _BAKED,
    "generate --key": _BAKED,
    "generate --layers": _BAKED,
    "generate --lora": _BAKED,
    "generate --model": _BAKED,
    "generate --no-preset-lora": _BAKED,
    "generate --policy": _BAKED,
    "generate --random-weights": _BAKED,
    "generate --resolution": _BAKED,
    "generate --vae": _BAKED,
    "generate --classes": "new: Dummy Forcing as it is released finds classes of heads in each video",
    "generate --device": _WHERE,
    "generate --dtype": _WHERE,
    "generate --provider": _WHERE,
    "bench --backend": "not given, it is chosen: torch runs bundles without graphs",
    "bench --backends": _WAYS,
    "bench --compile": _WHERE,
    "bench --cuda-graphs": _WHERE,
    "bench --device": _WHERE,
    "bench --dtypes": _WAYS,
    "bench --provider": _WHERE,
    "bench --expect-digest": _DIGESTS,
    "evaluate --expect-digest": _DIGESTS,
    "generate --expect-digest": _DIGESTS,
    "inspect --expect-digest": _DIGESTS,
    "analyze heads --samples": _AT_MOST,
    "analyze heads --workers": _AT_MOST,
    "bench --rounds": _AT_MOST,
    "demo --prompts": _AT_MOST,
    "demo --samples": _AT_MOST,
    "evaluate --seeds": _AT_MOST,
    "analyze heads --lora": _SEVERAL,
    "analyze heads --no-preset-lora": _WITHOUT,
    "analyze heads --latents-out": _GIVEN,
    "analyze heads --noise": _GIVEN,
    "evaluate --latents-out": _GIVEN,
    "evaluate --noise": _GIVEN,
    "generate --latents-out": _GIVEN,
    "generate --noise": _GIVEN,
    "generate --start-latents": _GIVEN,
    "analyze heads --passes": _PASSES,
    "analyze heads --recent-frames": _PASSES,
    "analyze heads --score-chunks": _PASSES,
    "analyze report --passes": _PASSES,
    "analyze report --recent-frames": _PASSES,
    "analyze report --score-chunks": _PASSES,
    "demo --backend": "new: what runs bundles may have to be named; not given, it is chosen",
    "export --layers": "new: so many typical layers of a model of random weights, as generate has them",
    "export --lora": _SEVERAL,
    "export --no-preset-lora": _WITHOUT,
    "headmap convert --heads": "0 heads were taken for a number that was not given",
    "export --encoder": "bundles that make latents of pictures and videos",
    "export --recache-graph": _SWITCHES,
    "export --statistics": _QUERIES,
    "analyze queries": _QUERIES,
    "analyze queries --checkpoint": _QUERIES,
    "analyze queries --chunks": _QUERIES,
    "analyze queries --device": _QUERIES,
    "analyze queries --dtype": _QUERIES,
    "analyze queries --embeds": _QUERIES,
    "analyze queries --json": _QUERIES,
    "analyze queries --key": _QUERIES,
    "analyze queries --lora": _QUERIES,
    "analyze queries --model": _QUERIES,
    "analyze queries --no-preset-lora": _QUERIES,
    "analyze queries --out": _QUERIES,
    "analyze queries --prompts": _QUERIES,
    "analyze queries --random-weights": _QUERIES,
    "analyze queries --resolution": _QUERIES,
    "analyze queries --samples": _QUERIES,
    "analyze queries --seed": _QUERIES,
    "analyze queries --threads": _QUERIES,
    "generate --statistics": _QUERIES,
    "generate --encoder": _STARTS,
    "generate --fade": _SWITCHES,
    "generate --fit": _STARTS,
    "generate --image": _STARTS,
    "generate --start": _STARTS,
    "generate --strength": _STARTS,
    "generate --video": _STARTS,
    "generate --no-recache": _SWITCHES,
    "generate --recache": _SWITCHES,
    "generate --script": _SWITCHES,
    "generate --script-line": _SWITCHES,
    "generate --enlarge": _AS_SAVED,
    "generate --seed": _AS_SAVED,
}
"""What was added, removed or changed on purpose since: "command" or "command --option", and why."""


def flat(commands: Tree) -> dict[str, object]:
    """Each command by its name, each parameter by the command's name and its own."""
    parameters = {f"{name} {shown}": facts for name, of in commands.items() for shown, facts in of.items()}
    return dict.fromkeys(commands, "command") | parameters


def test_commands_and_options_are_those_of_before_but_for_the_changes_listed() -> None:
    before, now = flat(json.loads(GOLDEN.read_text(encoding="utf-8"))), flat(tree())
    changed = {name for name in before | now if before.get(name) != now.get(name)}
    unlisted = {name: {"before": before.get(name), "now": now.get(name)} for name in changed - CHANGED.keys()}
    assert unlisted == {}, "list it in CHANGED with its reason if this is on purpose"
    assert CHANGED.keys() - changed == set(), "listed as changed, but as it was"


def test_every_listed_change_has_a_reason() -> None:
    assert [name for name, why in CHANGED.items() if not why.strip()] == []
