"""What is timed: bundles that are there, or layers of a preset with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.nominal import map_with_counts, nominal_map
from forcingkv.runtime import Bundle
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.spec import ModelSpec


@dataclass(frozen=True)
class BenchCase:
    """A policy, and the bundle that runs it."""

    name: str
    bundle: Bundle


def bundle_cases(paths: Sequence[Path]) -> list[BenchCase]:
    """Bundles under the names of their policies. Raises InputError for two of one policy."""
    cases: dict[str, BenchCase] = {}
    for path in paths:
        bundle = Bundle.open(path)
        name = bundle.plan.policy.name
        if name in cases:
            raise InputError(
                f"has the policy {name}, as {cases[name].bundle.path} has",
                where=str(path),
                expected="one bundle a policy",
            )
        cases[name] = BenchCase(name, bundle)
    return list(cases.values())


@contextmanager
def preset_cases(
    spec: ModelSpec,
    policies: Sequence[str],
    *,
    layers: int | None = None,
    resolution: str | None = None,
    headmap: HeadMap | None = None,
    decoder: str | None = "taehv",
) -> Iterator[list[BenchCase]]:
    """A model with random weights under each policy: bundles in a folder that goes when this ends.

    Args:
        spec: the model.
        policies: names, or TOML files.
        layers: how many of its layers, typical ones (`typical_layers`); None: the whole model.
        resolution: "WxH" or a name; None for the model's default.
        headmap: for policies whose labels it has; None, or other labels: `nominal_map`.
        decoder: its kind, with random weights; for latents that are pixels nothing is asked.

    Raises InputError for what cannot be exported.
    """
    from forcingkv.export import export_bundle
    from forcingkv.models.checkpoint import random_weights
    from forcingkv.models.decoders import decoder_for

    kind = None if spec.decoder.kind == "pixels" else decoder
    spec, made = decoder_for(spec, kind, None, random=True)
    with TemporaryDirectory(prefix="forcingkv-bench-") as folder:
        cases = []
        for place, name in enumerate(dict.fromkeys(policies)):
            policy = load_policy(name)
            heads = _map_for(spec, policy, headmap)
            part, policy, heads = typical_layers(spec, policy, heads, layers or spec.layers)
            out = Path(folder) / str(place)
            export_bundle(
                part,
                random_weights(part),
                policy,
                out,
                headmap=heads,
                resolution=resolution,
                decoder=made,
                verify=False,
            )
            cases.append(BenchCase(policy.name, Bundle.open(out)))
        yield cases


def typical_layers(
    spec: ModelSpec, policy: Policy, headmap: HeadMap | None, layers: int
) -> tuple[ModelSpec, Policy, HeadMap | None]:
    """A model of fewer layers that stand for all of them.

    Layers that the policy leaves unsplit (the first of 30) are not among them; the others have labels in the
    shares of the whole map, and the first scores segments. All layers of a model are the model itself.

    Raises InputError for more layers than there are.
    """
    if not 1 <= layers <= spec.layers:
        raise InputError(
            f"is {layers}", where="layers", expected=f"1 to {spec.layers}, which {spec.name} has"
        )
    if layers == spec.layers:
        return spec, policy, headmap
    part = replace(spec, layers=layers)
    return (
        part,
        policy.in_any_layer(),
        headmap and map_with_counts(part, policy.groups, _split_counts(policy, headmap)),
    )


def _split_counts(policy: Policy, headmap: HeadMap) -> Mapping[str, int]:
    """Heads of each label in the layers that are split."""
    whole = policy.unsplit.layers if policy.unsplit else ()
    rows = [row for layer, row in enumerate(headmap.labels) if layer not in whole]
    return {label: sum(row.count(label) for row in rows) for label in policy.groups}


def _map_for(spec: ModelSpec, policy: Policy, headmap: HeadMap | None) -> HeadMap | None:
    if headmap and policy.needs_headmap and set(headmap.counts()) <= set(policy.groups):
        return headmap
    return nominal_map(spec, policy)
