"""What torch holds while it decodes and encodes: found without computing, against torch's own allocator."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from forcingkv.export.live_memory import LiveMemory, streaming_bytes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import strips_of
from forcingkv.runtime import Bundle
from forcingkv.runtime.footprint import footprint, torch_activations
from forcingkv.runtime.graph_records import STRIP
from forcingkv.runtime.spec import Geometry
from tests.models.test_decoders import small_taehv, small_vae
from tests.runtime.conftest import small_bundle

pytest.importorskip("diffusers")

from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.models.encoders.wan_vae import WanVaeEncoder

KIB = 1024
SIZE = Geometry(192, 128, 24, 16, patch=1)


def most(work: Callable[[Tensor], object], given: Tensor) -> int:
    memory = LiveMemory()
    memory.own(given)
    with memory:
        work(given)
    return memory.most


def test_what_is_let_go_counts_no_longer() -> None:
    given = torch.empty(256, device="meta")  # 1 KiB

    def work(x: Tensor) -> Tensor:
        x = x + 1
        x = x * 2
        x = x.view(16, 16).T
        return torch.cat([x, x])

    assert most(work, given) == 3 * KIB, "what is joined, and twice as much"


def test_of_a_convolution_what_it_reads_and_gives_counts_twice() -> None:
    given = torch.empty(1, 1, 16, 16, device="meta")
    weight = torch.empty(2, 1, 1, 1, device="meta")
    assert most(lambda x: F.conv2d(x, weight), given) == 2 * KIB + (1 + 2) * KIB


def allocated(decoder: StreamingDecoder, height: int, width: int) -> int:
    """The most that torch's allocator had handed out in a real call."""
    size = 1, decoder.latent_channels, 1, height, width
    state, latents = decoder.empty_state(height, width), torch.zeros(size)
    gc.collect()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made = decoder(latents, torch.ones(1), state)
    assert made
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    in_order = sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in in_order))


def test_a_real_call_takes_about_as_much() -> None:
    """Tiny decoders alone: on a CPU torch unfolds what small convolutions over frames read."""
    decoder = small_taehv()
    found = streaming_bytes(SIZE, decoder)["decode"]
    assert allocated(decoder, SIZE.latent_height, SIZE.latent_width) == pytest.approx(found, rel=0.1)


def test_strips_and_encoding_are_counted_by_graph() -> None:
    vae = small_vae()
    decoder, encoder = WanVaeDecoder(vae), WanVaeEncoder(vae)
    whole = streaming_bytes(SIZE, decoder)
    strips = streaming_bytes(SIZE, decoder, encoder, strips_of(decoder, SIZE, 4))
    assert list(whole) == ["decode"]
    assert list(strips) == ["decode", STRIP, "encode"]
    assert max(strips["decode"], strips[STRIP]) < whole["decode"]
    assert strips["encode"] > 4 * 3 * SIZE.width * SIZE.height * 4, "at least the frames"
    assert streaming_bytes(SIZE, None) == {}


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(small_bundle("taehv", "torch"))


def test_a_session_on_torch_counts_it(bundle: Bundle) -> None:
    decode = bundle.manifest.graphs["decode"]
    needed = decode.torch_bytes
    assert needed is not None
    assert needed > torch_activations(bundle.plan, "float32"), "decoding takes more than a pass"
    assert footprint(bundle.manifest, bundle.plan)["activations"] == needed
    half = bundle.computing_in("bfloat16")
    copies = sum(4 * math.prod(record.shape) for record in decode.carried.values())
    assert footprint(half.manifest, half.plan)["activations"] == needed + copies, "float32 on a CPU"
    assert footprint(half.manifest, half.plan, on_cpu=False)["activations"] == needed // 2


def test_a_bundle_that_does_not_say_counts_its_passes(bundle: Bundle) -> None:
    graphs = {name: replace(graph, torch_bytes=None) for name, graph in bundle.manifest.graphs.items()}
    parts = footprint(replace(bundle.manifest, graphs=graphs), bundle.plan)
    assert parts["activations"] == torch_activations(bundle.plan, "float32")
