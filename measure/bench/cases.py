"""What is timed: bundles that are there, or layers of a preset with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.measure.bench.turns import BenchCase
from forcingkv.measure.nominal import check_map, map_with_counts, nominal_map
from forcingkv.measure.planner.session_memory import session_memory
from forcingkv.runtime import Bundle
from forcingkv.runtime.backends import default_backend
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.statistics import QueryStatistics
from forcingkv.runtime.memory import require_memory
from forcingkv.runtime.open_bundles import open_bundles
from forcingkv.runtime.spec import DecoderKind, ModelSpec

ONNXRUNTIME, TORCH = "onnxruntime", "torch"
WAYS = {ONNXRUNTIME: ("float32", "int8"), TORCH: ("float32", "bfloat16", "float16")}
"""Backends that presets are timed on -> what linear layers can multiply in there."""


def ways(backends: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Backends with each dtype that they have.

    Raises InputError for backends that presets are not timed on, and for one that has none of the dtypes.
    """
    found = []
    for backend in dict.fromkeys(backends):
        if backend not in WAYS:
            raise InputError(
                f"a model is not exported for {backend} to be timed",
                where="--backends",
                expected=" or ".join(WAYS),
                hint="Export it, and time the bundle: bench --bundle FOLDER --backend NAME.",
            )
        here = [(backend, dtype) for dtype in dict.fromkeys(dtypes) if dtype in WAYS[backend]]
        if not here:
            raise InputError(
                f"{backend} multiplies in none of {', '.join(dtypes)}",
                where="--dtypes",
                expected=" or ".join(WAYS[backend]),
            )
        found += here
    return found


def bundle_cases(
    paths: Sequence[Path], expect: Sequence[str] = (), backend: str | None = None
) -> list[BenchCase]:
    """Bundles of different policies, on the backend of that name or their own.

    Raises InputError for two of one policy, and as `open_bundles` does."""
    cases: dict[str, Bundle] = {}
    for path, bundle in zip(paths, open_bundles(paths, expect), strict=True):
        name = bundle.plan.policy.name
        if name in cases:
            raise InputError(
                f"has the policy {name}, as {cases[name].path} has",
                where=str(path),
                expected="one bundle a policy",
            )
        cases[name] = bundle
    return [_case(bundle, backend) for bundle in cases.values()]


def _case(bundle: Bundle, backend: str | None) -> BenchCase:
    chosen = backend or default_backend(bundle, torch_is_asked=False)
    return BenchCase(bundle, chosen, bundle.manifest.multiplies_in)


@contextmanager
def preset_cases(
    spec: ModelSpec,
    policies: Sequence[str],
    *,
    layers: int | None = None,
    resolution: str | None = None,
    headmap: HeadMap | None = None,
    decoder: str | None = "taehv",
    ways: Sequence[tuple[str, str]] = ((ONNXRUNTIME, "float32"),),
) -> Iterator[list[BenchCase]]:
    """A model with random weights under each policy: bundles in a folder that goes when this ends.

    Args:
        spec: the model.
        policies: names, or TOML files.
        layers: how many of its layers, typical ones (`typical_layers`); None: the whole model.
        resolution: "WxH" or a name; None for the model's default.
        headmap: for policies whose labels it has; for others, or None: `nominal_map`.
        decoder: its kind; for latents that are pixels nothing is asked.
        ways: backends, each with what it multiplies in (`ways`).

    Raises InputError for what cannot be exported.
    """
    from forcingkv.export import export_bundle
    from forcingkv.export.precision import ExportDtype
    from forcingkv.models.checkpoint import random_weights
    from forcingkv.models.decoders import decoder_for

    # Passes are timed, and no video is made: what goes through the VAE again is not asked for.
    spec = replace(spec, context_first="kept")
    kind = None if spec.decoder.kind == "pixels" else decoder
    spec, made = decoder_for(spec, kind, None, random=True)
    with TemporaryDirectory(prefix="forcingkv-bench-") as folder:
        cases = []
        for place, (part, policy, heads) in enumerate(_parts(spec, policies, layers, headmap)):
            bundles: dict[str | None, Bundle] = {}
            for backend, dtype in ways:
                # In float32 all run the same bundle, and torch makes of it what it multiplies in.
                stored = one_of(ExportDtype, dtype, "dtype") if dtype == "int8" else None
                if stored not in bundles:
                    export_bundle(
                        part,
                        random_weights(part),
                        policy,
                        out := Path(folder) / f"{place}-{stored}",
                        headmap=heads,
                        statistics=QueryStatistics.random(part),
                        resolution=resolution,
                        decoder=made,
                        dtype=stored,
                        target="onnx" if ONNXRUNTIME in dict(ways) else "torch",
                        verify=False,
                    )
                    bundles[stored] = Bundle.open(out)
                cases.append(BenchCase(bundles[stored], backend, dtype))
        yield cases


def check_memory_of_presets(
    spec: ModelSpec,
    policies: Sequence[str],
    *,
    layers: int | None = None,
    resolution: str | None = None,
    headmap: HeadMap | None = None,
    decoder: str = "taehv",
) -> None:
    """Raise InputError, with what is needed by part, where a session of `preset_cases` would have too little
    memory: before anything is exported, which takes minutes.

    Weights, keys and values, decoder caches, text and latents are counted, in float32 as ONNX Runtime holds
    them. Activations are an estimate, of fused attention; what a graph needs is checked when it is there.
    """
    if spec.decoder.kind != "pixels":
        kind = one_of(DecoderKind, decoder, "decoder")
        spec = replace(spec, decoder=replace(spec.decoder, kind=kind))
    for part, policy, heads in _parts(spec, policies, layers, headmap):
        plan = build_plan(part, part.geometry(resolution), policy, heads)
        parts: dict[str, float] = dict(session_memory(plan, "float32").parts)
        # One after the other on a CPU, in the same memory.
        parts["activations"] = max(parts["activations"], parts.pop("decode_activations"))
        require_memory(
            f"a session of {policy.name} at {plan.geometry.width}x{plan.geometry.height} with"
            f" {part.layers} layer{'s' * (part.layers != 1)} of {part.name}",
            {name.replace("_", " "): size for name, size in parts.items() if size},
            "Take fewer --layers, a smaller --geometry, other --policies, or a larger machine.",
        )


def _parts(
    spec: ModelSpec, policies: Sequence[str], layers: int | None, headmap: HeadMap | None
) -> Iterator[tuple[ModelSpec, Policy, HeadMap | None]]:
    """For each policy the layers that stand for the model, the policy, and their head map."""
    loaded = [load_policy(name) for name in dict.fromkeys(policies)]
    if headmap:
        check_map(spec, loaded, headmap)
    for policy in loaded:
        fits = headmap and policy.needs_headmap and set(headmap.counts()) <= set(policy.groups)
        heads = headmap if fits else nominal_map(spec, policy)
        yield typical_layers(spec, policy, heads, layers or spec.layers)


def typical_layers(
    spec: ModelSpec, policy: Policy, headmap: HeadMap | None, layers: int
) -> tuple[ModelSpec, Policy, HeadMap | None]:
    """A model of fewer layers that stand for all of them.

    Layers that the policy leaves unsplit (the first of 30) are not among them; the others have labels in the
    shares of the whole map, and the first scores segments. All layers of a model are the model itself.

    Raises InputError for more layers than there are, and for a map of another model.
    """
    if not 1 <= layers <= spec.layers:
        raise InputError(
            f"is {layers}", where="layers", expected=f"1 to {spec.layers}, which {spec.name} has"
        )
    if layers == spec.layers:
        return spec, policy, headmap
    part = replace(spec, layers=layers)
    if headmap is None:
        return part, policy.in_any_layer(), None
    headmap.check_model(spec.layers, spec.heads, set(policy.groups))
    whole = policy.unsplit.layers if policy.unsplit else ()
    split = [row for layer, row in enumerate(headmap.labels) if layer not in whole]
    counts = {label: sum(row.count(label) for row in split) for label in policy.groups}
    return part, policy.in_any_layer(), map_with_counts(part, policy.groups, counts)
