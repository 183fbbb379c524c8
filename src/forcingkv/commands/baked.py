"""`forcingkv generate --model`: a model baked into the cache, as a bundle for torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from forcingkv.commands.console import need, progress_bar, say
from forcingkv.commands.models import (
    CacheFilledBy,
    Checkpoint,
    Key,
    Layers,
    Loras,
    NoPresetLora,
    RandomWeights,
    Resolution,
    check_layers,
    weights_for,
    with_context,
)
from forcingkv.headmaps import HeadMap, read_headmap
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.nominal import in_words, nominal_map, shipped_map
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.statistics import QueryStatistics, needs_statistics, required_statistics
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words, read_embeds

if TYPE_CHECKING:
    from forcingkv.export.cached_bundle import CachedBundle
    from forcingkv.models.encoders import StreamingEncoder

POLICY = "forcing-kv"


@dataclass(frozen=True)
class ModelOptions:
    """What a user said of a model to run without a bundle. None and False: nothing."""

    model: Annotated[
        str | None,
        Option(
            help="In place of --bundle: preset or spec file (.toml), baked into the cache the first time, for"
            " --backend torch."
        ),
    ] = None
    checkpoint: Checkpoint = None
    key: Key = None
    lora: Loras = None
    no_preset_lora: NoPresetLora = False
    random_weights: RandomWeights = False
    headmap: Annotated[
        Path | None, Option(help="With --model: head map to bake in; default: the one that ships, if any.")
    ] = None
    statistics: Annotated[
        Path | None,
        Option(help="With --model: statistics of its queries, for policies that score tokens by them."),
    ] = None
    policy: Annotated[str | None, Option(help=f"With --model: cache policy; default: {POLICY}.")] = None
    context: CacheFilledBy = None
    resolution: Resolution = None
    decoder: Annotated[
        str | None, Option(help="With --model: wan-vae, taehv or lighttae; default: the model's.")
    ] = None
    vae: Annotated[Path | None, Option(help="With --model: weights of the decoder.")] = None
    encoder: Annotated[
        Path | None,
        Option(
            help="With --model: the VAE that encodes --image, --start, --video, or (krea-14b-served) the"
            " first frame again; default: --vae's."
        ),
    ] = None
    layers: Layers = None

    def check(self, bundle: Path | None) -> None:
        """Raise InputError unless a bundle alone is given, or a model with what belongs to it."""
        if (self.model is None) == (bundle is None):
            raise InputError(
                "needs a bundle or a model, and not both",
                where="generate",
                expected="--bundle FOLDER, or --model NAME",
            )
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False, [])]
        if bundle is not None and given:
            words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(
                f"has what {words} would say already",
                where="--bundle",
                hint=f"Leave out {words}, or take --model in place of --bundle.",
            )
        check_layers(self.layers, self.random_weights)


def bake_model(
    options: ModelOptions,
    run: LaneOptions,
    embeds: Path | None,
    prompts: Iterable[str | None],
    *,
    encodes: bool = False,
    online: bool = False,
) -> CachedBundle:
    """The bundle of a model, from the cache; what was chosen and done is said on standard error.

    All that a session would refuse is refused before anything is fetched or read.

    Args:
        options: the model.
        run: what is to run it.
        embeds: the text embeddings that were given.
        prompts: every prompt that will be asked for.
        encodes: whether pictures or videos are to be encoded.
        online: whether labels will be found in the video, so that any map will do until then.

    Raises InputError for what does not fit, and as `cached_bundle` does.
    """
    assert options.model is not None
    if run.backend != "torch":
        raise InputError(
            "cannot run a model that was not exported",
            where=f"--backend {run.backend}",
            expected="--backend torch, or none",
            hint="Export the model for it (forcingkv export), and give the bundle.",
        )
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.export.cached_bundle import Recipe, cached_bundle, check_memory_to_run, sizes_in_cache
    from forcingkv.measure.bench.cases import typical_layers
    from forcingkv.models.decoders import decoder_for
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.backends.torch_classes import check_classes
    from forcingkv.runtime.backends.torch_lane import device_for

    device_for(run)
    spec = with_context(load_spec(options.model), options.context)
    policy = load_policy(options.policy or POLICY)
    _check_prompts(spec, embeds, prompts, random=options.random_weights)
    spec.geometry(options.resolution)
    given = read_headmap(options.headmap) if options.headmap else None
    headmap = heads_to_bake(spec, policy, given, random=options.random_weights, online=online)
    statistics = statistics_to_bake(policy, options.statistics)
    if options.layers:
        spec, policy, headmap = typical_layers(spec, policy, headmap, options.layers)
    statistics = statistics or (random_statistics(spec, policy) if options.random_weights else None)
    spec, decoder = decoder_for(spec, options.decoder, options.vae, random=options.random_weights)
    encodes = encodes or spec.context_first == "encoded"
    encoder = _encoder(options, spec) if encodes and spec.decoder.kind != "pixels" else None
    plan = build_plan(spec, spec.geometry(options.resolution), policy, headmap, statistics)
    required_statistics(plan)
    if online:
        check_classes(plan, run)
    recipe = Recipe(plan, headmap, decoder, run.dtype or spec.dtype, encoder)
    check_memory_to_run(recipe, run.device)
    weights = weights_for(
        spec,
        options.checkpoint,
        options.key,
        options.lora,
        options.no_preset_lora,
        options.random_weights,
    )
    with progress_bar() as shown:
        task = shown.add_task(f"baking {spec.name}", total=None)

        def progress(doing: str) -> None:
            shown.update(task, description=doing)

        cached = cached_bundle(recipe, weights, progress=progress, note=_note)
    if headmap and not given and not options.random_weights and headmap.model.weights != weights.digest:
        _note(f"the head map that ships with {spec.name} was measured on other weights than these")
    path = cached.bundle.path
    if cached.baking is None:
        say(f"using {path}, baked before", error=True)
        return cached
    sizes = sizes_in_cache()
    size, whole = readable(sizes.get(path.name, 0)), readable(sum(sizes.values()))
    say(f"baked {spec.name} into {path} in {cached.baking:.1f} s ({size})", error=True)
    if len(sizes) > 1:
        _note(f"{path.parent} holds {len(sizes)} folders of {whole}: any may be removed, and is baked again")
    return cached


def _encoder(options: ModelOptions, spec: ModelSpec) -> StreamingEncoder:
    """What encodes pictures and videos. Raises InputError where no weights of a VAE are given."""
    from forcingkv.models.encoders import encoder_for

    path = options.encoder or (options.vae if spec.decoder.kind == "wan-vae" else None)
    if path is None and not options.random_weights:
        raise InputError(
            "the weights of the encoder are not given",
            where="--encoder",
            expected=f"the VAE of {spec.name}'s latents, such as --encoder Wan2.1_VAE.pth",
        )
    return encoder_for(spec, path)


def heads_to_bake(
    spec: ModelSpec, policy: Policy, given: HeadMap | None, *, random: bool, online: bool = False
) -> HeadMap | None:
    """The head map to bake in, and a word on which it is. Raises InputError where there is none."""
    if not policy.needs_headmap:
        if given:
            _note(f"the policy {policy.name} treats all heads alike, and uses no head map")
        return None
    if given:
        return given
    if online:
        return nominal_map(spec, policy)
    if random:  # which head has which label means nothing then
        headmap = nominal_map(spec, policy)
        assert headmap is not None
        _note(f"no head map is given: {in_words(headmap)} heads, as `bench` has them")
        return headmap
    shipped = shipped_map(spec, policy)
    if shipped is None:
        raise InputError(
            f"needs a head map, and none ships with {spec.name}",
            where=f"the policy {policy.name}",
            expected="--headmap FILE",
            hint="Measure one (forcingkv analyze heads), convert a published one (forcingkv headmap convert),"
            " or do without pruning: --policy full.",
        )
    _note(f"head map: the one that ships with {spec.name} ({in_words(shipped)})")
    return shipped


def statistics_to_bake(policy: Policy, given: Path | None) -> QueryStatistics | None:
    """Those of a file, and a word on what they are of; None where nothing is given or the policy reads none.
    Raises InputError for a file of anything else."""
    if given is None:
        return None
    from forcingkv.models.query_statistics import read_statistics

    if not needs_statistics(policy):
        _note(f"the policy {policy.name} scores by no statistics of queries, and uses none")
        return None
    found = read_statistics(given)
    _note(f"statistics of queries: {found.source}")
    return found


def random_statistics(spec: ModelSpec, policy: Policy) -> QueryStatistics | None:
    """Such as go with random weights, and a word on it; None where the policy reads none."""
    if not needs_statistics(policy):
        return None
    _note("no statistics of queries are given: random numbers, as the weights are")
    return QueryStatistics.random(spec)


def _check_prompts(
    spec: ModelSpec, embeds: Path | None, prompts: Iterable[str | None], *, random: bool
) -> None:
    """Raise InputError for a prompt that could not be used once the model is baked."""
    known = read_embeds(embeds) if embeds else None
    for prompt in prompts:
        if known:
            known.get(prompt, spec)
        elif spec.text.kind == "words" or not random:
            encode_words(spec, prompt or "")


def _note(text: str) -> None:
    say(f"note: {text}", error=True)
