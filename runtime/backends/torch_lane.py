"""torch: one code on a CPU and on every GPU that torch has a device for. It needs no graphs, only weights.

The model is the one that export traces (`models.wan`), so this is what other backends are compared with. A
lane has the queues of its device, memory of its own and the weights that its siblings share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.backends import LaneOptions, Pass, Queue, Tensor
from forcingkv.runtime.bundle import CLEAN, GRAPHS, Bundle, next_name
from forcingkv.runtime.faults import DeviceError, SessionError
from forcingkv.runtime.graph_records import FEATURES, FIRST, GIVEN_FRAMES, STREAMING, STRIP, TOP, TURN
from forcingkv.runtime.kv.plan import PARTS, CachePlan
from forcingkv.runtime.spec import Dtype

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "models") from error

from forcingkv.models.decoders import frames_of, to_frames
from forcingkv.models.decoders.strips import begin_frame, finish_strip
from forcingkv.models.encoders import pixels_of
from forcingkv.models.generate import level_of_frames, next_latents
from forcingkv.models.kv_roles import Turn
from forcingkv.models.streaming import InPlace
from forcingkv.models.torch_threads import in_this_thread, use_threads
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.backends.torch_cache import JoinedCache
from forcingkv.runtime.backends.torch_device import (
    Queues,
    TorchQueue,
    describe,
    faults,
    find_device,
    give_back,
    name_of,
)
from forcingkv.runtime.backends.torch_graphs import Captured, graph_pool
from forcingkv.runtime.backends.torch_model import Loaded, load, with_heads
from forcingkv.runtime.backends.torch_tensors import TorchTensor

Work = Callable[[], None]
Tensors: TypeAlias = Mapping[str, torch.Tensor]


def open_lane(bundle: Bundle, options: LaneOptions) -> TorchLane:
    """Load the weights of a bundle, whatever it was exported for, on the device that the options name.

    Raises InputError for a device that is not there, for options that are of no use to it, and for weights
    that torch does not run.
    """
    device = device_for(options)
    threads = None
    if device.type == "cpu":
        use_threads(options.threads)
        threads = torch.get_num_threads()
    loaded = load(bundle, device, threads=threads, compiled=options.compiled)
    return TorchLane(bundle, loaded, cuda_graphs=options.cuda_graphs)


def device_for(options: LaneOptions) -> torch.device:
    """The device that the options name. Raises InputError where it is not there, and for options that are of
    no use to it."""
    options.refuse("provider")
    device = find_device(options.device)
    if options.cuda_graphs and device.type != "cuda":
        raise InputError(f"are of no use on the device {device}", where="CUDA graphs", expected="cuda")
    return device


class TorchLane:
    """The model on a device, and memory of one session."""

    def __init__(self, bundle: Bundle, loaded: Loaded, *, cuda_graphs: bool) -> None:
        self._bundle, self._cuda_graphs = bundle, cuda_graphs
        self._pool = graph_pool() if cuda_graphs else None
        self._loaded: Loaded | None = loaded
        self._cache: JoinedCache | None = None
        self._tensors: list[TorchTensor] = []
        """Held until the queues are done: what nobody holds torch gives to others, though streams still
        write to it."""
        self._queues = Queues.on(loaded.device)
        self.main: Queue = self._queues.main
        self.side: Queue = self._queues.side
        self.lookahead = int(self._queues.beside)
        self.recaches = self.in_place = self.copies = True
        self.runs_on = f"{describe(loaded.device, loaded.threads)}, in {name_of(loaded.compute)} (torch)"

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        made = TorchTensor.make(tuple(shape), dtype, self._weights().device)
        self._tensors.append(made)
        return made

    def cache(self, plan: CachePlan, dtype: Dtype) -> JoinedCache:
        self._cache = JoinedCache(plan, self, dtype, self._weights().device)
        return self._cache

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        """`step` reads and writes keys and values where the cache that this lane made has them, as they lie
        in that phase; a clean pass leaves them as they lie after it (`JoinedCache.key`)."""
        loaded, queue = self._weights(), self._queues.side if graph in STREAMING else self._queues.main
        given = {name: _own(tensor) for name, tensor in inputs.items()}
        taken = {name: _own(tensor) for name, tensor in outputs.items()}
        what = f"{graph} in phase {phase}"
        captured = None
        if graph == GRAPHS[0]:
            made = _prompt_work(loaded, given, taken)
        elif graph == "step":
            assert self._cache is not None, "a session takes its cache first"
            if self._pool is not None and self._comes_again(taken):
                captured = Captured(queue, what, self._pool)
            made = _step_work(loaded, self._cache, phase, given, taken, captured)
        elif graph == "recache":
            assert self._cache is not None, "a session takes its cache first"
            made = _encoding_work(loaded, self._cache, phase, given)
        elif graph == "encode":
            made = _encode_work(loaded, given, taken)
        else:
            made = _decode_work(loaded, self._bundle, graph, given, taken)
        return TorchPass(queue, made, what, loaded.threads, captured)

    def _comes_again(self, taken: Tensors) -> bool:
        """Whether a pass does the same each time it runs, with what lies on the device alone.

        A clean pass that leads to another phase does not, nor one that draws its segments on the host.
        """
        assert self._cache is not None
        if len(taken) == 1:  # no clean one
            return True
        before, after = self._cache.key
        choice = self._bundle.plan.choice
        return before == after and (choice is None or choice.role.choose == "least-similar")

    def warm(self, passes: Work) -> None:
        """What torch makes at a first run it makes in the first chunks."""

    def sibling(self) -> TorchLane:
        return type(self)(self._bundle, self._weights(), cuda_graphs=self._cuda_graphs)

    def regrouped(self, bundle: Bundle, orders: Sequence[Sequence[int]]) -> TorchLane:
        """A lane for the same model whose heads lie in another order (`torch_model.with_heads`)."""
        return type(self)(bundle, with_heads(self._weights(), orders), cuda_graphs=self._cuda_graphs)

    def close(self) -> None:
        """Memory goes with what holds it: the weights with the last lane on them. What torch keeps of it for
        itself it is asked to give back."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        with suppress(SessionError):  # what was in the queues failed: nobody waits for it any more
            self._queues.wait()
        device, self._cache = loaded.device, None
        self._tensors.clear()
        del loaded
        give_back(device)

    def _weights(self) -> Loaded:
        loaded = self._loaded  # once: another thread may close the lane
        if loaded is None:
            raise DeviceError("the lane is closed")
        return loaded


class TorchPass:
    """A function of torch on fixed tensors, which may be captured once and replayed from then on."""

    def __init__(
        self, queue: TorchQueue, work: Work, what: str, threads: int | None, captured: Captured | None
    ) -> None:
        self._queue, self._work, self._what = queue, work, what
        self._threads, self._captured = threads, captured

    def run(self) -> None:
        """Raises MemoryShortError, or DeviceError for any other failure."""
        if self._threads is not None:
            in_this_thread(self._threads)
        with faults(f"a pass ({self._what})"), torch.no_grad(), self._queue.work():
            if self._captured is None:
                self._work()
            else:
                self._captured.run(self._work)


def _prompt_work(loaded: Loaded, given: Tensors, taken: Tensors) -> Work:
    def work() -> None:
        made = loaded.model.prompt(given["text"].to(loaded.compute))
        for layer, kv in enumerate(made):
            for part, tensor in zip(PARTS, kv, strict=True):
                taken[f"cross.{layer}.{part}"].copy_(tensor)

    return work


def _step_work(
    loaded: Loaded,
    cache: JoinedCache,
    phase: int,
    given: Tensors,
    taken: Tensors,
    captured: Captured | None,
) -> Work:
    """A pass: with caches among its outputs the clean one."""
    model, spec, compute = loaded.model, loaded.model.spec, loaded.compute
    prompt = [KeysValues(*(given[f"cross.{layer}.{part}"] for part in PARTS)) for layer in range(spec.layers)]
    is_clean = CLEAN in given and len(taken) > 1

    def each_chunk() -> bool:
        return captured is None or not captured.capturing

    turn = Turn(*(given[name] for name in TURN)) if cache.plan.relative else None
    rotary, noise = (given["cosines"], given["sines"]), given.get("noise")
    attend = cache.attend(phase, cache.key[1] if is_clean else None, turn, rotary, each_chunk=each_chunk)
    latents = given["latents"]
    sigma, sigma_next = (level_of_frames(given[name]) for name in ("sigma", "sigma_next"))
    renoise = spec.schedule.renoise

    def work() -> None:
        flow = model.flow(latents.to(compute), given["time"].to(compute), rotary, prompt, attend)
        following = next_latents(renoise, latents, flow.to(latents), sigma, sigma_next, noise)
        taken["next_latents"].copy_(following)

    return work


def _encoding_work(loaded: Loaded, cache: JoinedCache, after: int, given: Tensors) -> Work:
    """A pass that encodes newest frames anew, from the phase in which it is bound."""
    model, spec, compute = loaded.model, loaded.model.spec, loaded.compute
    prompt = [KeysValues(*(given[f"cross.{layer}.{part}"] for part in PARTS)) for layer in range(spec.layers)]
    rotary = given["cosines"], given["sines"]
    rows = {name: tensor for name, tensor in given.items() if tensor.dtype == torch.int32}
    turn = Turn(*(given[name] for name in TURN)) if cache.plan.relative else None
    attend = cache.encode(cache.phase, after, rows, turn)

    def work() -> None:
        model.flow(given["latents"].to(compute), given["time"].to(compute), rotary, prompt, attend)

    return work


def _decode_work(loaded: Loaded, bundle: Bundle, graph: str, given: Tensors, taken: Tensors) -> Work:
    """A pass of decoding, in which each layer's caches are replaced once that layer has read them."""
    decoder, kind = loaded.decoder, loaded.decodes_in
    geometry, strips = bundle.plan.geometry, bundle.manifest.strips

    def pixels() -> None:
        taken["frames"].copy_(frames_of(given["latents"], geometry))

    if decoder is None:
        return pixels
    carried = [name for name in given if next_name(name) in taken]

    def work() -> None:
        held = InPlace({name: given[name].to(kind) for name in carried})
        first = given[FIRST].to(kind)
        # cuDNN would take float32 for TF32 unless it is told.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if strips is None:
                made, following = decoder(given["latents"].to(kind), first, held)
            elif graph == STRIP:
                features, top = given[FEATURES].to(kind), given[TOP]
                made, following = finish_strip(decoder, strips, geometry.height, features, first, top, held)
            else:
                features, following = begin_frame(decoder, given["latents"].to(kind), first, held)
                taken[FEATURES].copy_(features)
        if graph == STRIP:
            taken["frames"].copy_(to_frames(made[..., : geometry.shown[0]].float()))
        elif strips is None:
            taken["frames"].copy_(frames_of(made.float(), geometry))
        for name in carried:
            _put(taken[next_name(name)], following[name])

    return work


def _encode_work(loaded: Loaded, given: Tensors, taken: Tensors) -> Work:
    encoder, kind = loaded.encoder, loaded.decodes_in
    assert encoder is not None, "its bundle has the graph"
    carried = [name for name in given if name not in (GIVEN_FRAMES, FIRST)]

    def work() -> None:
        held = InPlace({name: given[name].to(kind) for name in carried})
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            made, following = encoder(pixels_of(given[GIVEN_FRAMES]).to(kind), given[FIRST].to(kind), held)
        taken["latents"].copy_(made.float())
        for name in carried:
            _put(taken[next_name(name)], following[name])

    return work


def _put(there: torch.Tensor, made: torch.Tensor) -> None:
    """Copy what was made to where it is wanted, unless it was made there."""
    if made.data_ptr() != there.data_ptr():
        there.copy_(made)


def _own(tensor: Tensor) -> torch.Tensor:
    assert isinstance(tensor, TorchTensor)
    return tensor.tensor
