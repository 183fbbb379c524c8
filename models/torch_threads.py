"""How many threads torch computes with."""

from __future__ import annotations

import torch

from forcingkv.runtime.threads import chosen_threads, cpu_threads


def use_threads(asked: int | None = None) -> None:
    """Have torch compute with so many threads. None: with as many as it does, but no more than this machine's
    CPU is good for (`cpu_threads`): torch sees no quota of a container."""
    most = chosen_threads(asked).number if asked else min(torch.get_num_threads(), cpu_threads().number)
    torch.set_num_threads(most)
