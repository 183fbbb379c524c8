"""Making the cache anew when the prompt is switched, in the way that was asked for (`spec.Recache`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.chunks import ChunkMaker, NoiseSource
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import Encoding, encoding, replayed
from forcingkv.runtime.kv.scenes import check_cut
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.script import ENCODED, Script
from forcingkv.runtime.spec import Recache


def check_recache(maker: ChunkMaker, how: Recache, made: Iterable[int], there: Callable[[int], bool]) -> None:
    """Raise InputError where a session, policy or video lacks a way, after any of those numbers of chunks.

    `there` says of which chunks the latents will be there then, of those that may be asked for.
    """
    check_way(maker.cache.plan, how)
    if how == "cut":
        check_cut(maker.cache.plan)
    if how not in ENCODED:
        return
    if not maker.lane.recaches:
        raise _without_graph(f"is {how}", "recache")
    plan = maker.cache.plan
    for chunks in filter(None, made):
        needed = chunks_of(plan, encoding(plan, chunks, keep_sink=how == "keep-sink"), chunks)
        if missing := [chunk for chunk in needed if not there(chunk)]:
            raise InputError(
                f"does not have the latents of chunk {missing[0]}, which recache {how} encodes anew",
                where="the state that the video goes on from",
                hint="It is of an earlier version: switch with recache replay, or some chunks later.",
            )


def check_way(plan: CachePlan, how: Recache) -> None:
    """Raise InputError for a way of a model whose cache is made anew before each chunk in any case."""
    if plan.recomputes and how != "none":
        raise InputError(
            f"is {how}, and the cache of {plan.spec.name} is made anew before each chunk, under its prompt",
            where="recache",
            expected="none, or nothing said",
        )


def check_restored(maker: ChunkMaker, script: Script, *, hollow: bool, where: str) -> None:
    """Raise InputError where a saved video needs a pass over newest frames, now or later, and the session has
    none: states of the backend torch may be gone on with by others."""
    for switch, _ in script.due.values():
        check_way(maker.cache.plan, switch.recache)
    if maker.lane.recaches:
        return
    to_come = [switch for switch, _ in script.due.values()]
    to_come += script.made[-1:] if script.fading else []
    for how in (switch.recache for switch in to_come if switch.recache in ENCODED):
        raise _without_graph(f"has a switch to come with recache {how}", where)
    if hollow:
        raise _without_graph("was saved just after a switch with recache empty-sink", where)


def _without_graph(what: str, where: str) -> InputError:
    return InputError(
        f"{what}, for which this session has no graph",
        where=where,
        expected="replay or none",
        hint="For ONNX Runtime export the model again with --recache-graph; the backend torch needs none, and"
        " engines have none: there switch with --recache replay.",
    )


def make_anew(
    maker: ChunkMaker, how: Recache, latents: Mapping[int, Floats], made: int, noise: NoiseSource
) -> None:
    """Make the cache anew after `made` chunks, under the prompt that passes follow now.

    `latents` are those of the chunks that are kept, by index.
    """
    plan = maker.cache.plan
    if how == "none" or not made:
        return
    if how == "cut":
        maker.cut()
        return
    if how == "replay":
        maker.cache.restart()
        for index in replayed(plan, made):
            maker.replay(index, latents[index], noise, plan.spec.schedule.redraw_from)
        return
    one = encoding(plan, made, keep_sink=how == "keep-sink")
    newest = np.concatenate([latents[chunk] for chunk in chunks_of(plan, one, made)], 2)
    maker.encode(one, newest[:, :, newest.shape[2] - one.frames :])


def chunks_of(plan: CachePlan, one: Encoding, made: int) -> range:
    """The chunks whose frames a pass encodes, the newest among them in any case."""
    return range(min(one.first // plan.spec.frames_per_chunk, made - 1), made)
