"""How many threads torch computes with."""

from __future__ import annotations

import threading

import torch

from forcingkv.runtime.threads import chosen_threads, cpu_threads


def use_threads(asked: int | None = None) -> None:
    """Have torch compute with so many threads. None: with as many as it does, but no more than this machine's
    CPU is good for (`cpu_threads`): torch sees no quota of a container."""
    most = chosen_threads(asked).number if asked else min(torch.get_num_threads(), cpu_threads().number)
    torch.set_num_threads(most)


class _Told(threading.local):
    """What the thread that asks was told last."""

    number: int | None = None


_told = _Told()


def in_this_thread(number: int) -> None:
    """Have torch compute with so many threads when the calling thread asks it to.

    The libraries below torch count for each thread that calls them, and a product of matrices asks them
    before torch has told a new thread of the number: it would have as many as there are.
    """
    if _told.number != number or torch.get_num_threads() != number:
        torch.set_num_threads(number)
        _told.number = number
