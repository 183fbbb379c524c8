"""Running everything once before the first video, on devices where the first run of a kind is slow."""

from __future__ import annotations

import numpy as np

from forcingkv.runtime.chunks import ChunkMaker


def warm_up(maker: ChunkMaker) -> None:
    """Run the prompt, passes of each phase of the cache, and the decoder. What comes out means nothing.

    Afterwards the memory is as a new session has it: the cache is empty, and so are those of the decoder.
    """
    main, cache = maker.lane.main, maker.cache
    try:
        for tensor in (*maker._text.values(), *maker._latents):
            tensor.clear(main)
        maker._prompt.run()
        maker._write_positions(0)
        # Where graphs make all outputs in every pass, all passes of a phase are the same work.
        for phase in cache.plan.phases:
            cache.passes = phase.first_chunk
            for tensor in cache.held().values():
                tensor.clear(main)
            maker.bound(maker.levels(phase.first_chunk)[0], 0).run()
            if maker._skips_caches:
                maker.bound(*maker.filling(phase.first_chunk)).run()
        maker.decoder.decode(np.zeros(maker.latent_shape, np.float32), 0)
    finally:
        for name, tensor in maker.state().items():
            tensor.clear(maker.queue_of(name))
        maker.restart()
