"""What each variant is run with: a head map, of recorded statistics or a control; statistics of queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from forcingkv.analyze import Analysis, Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.analysis import labels_of_rule
from forcingkv.analyze.labels import decide
from forcingkv.commands.models import text_inputs
from forcingkv.headmaps import HeadMap
from forcingkv.measure.nominal import nominal_map
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.models.query_statistics import measure_statistics
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.statistics import QueryStatistics, needs_statistics
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from studies.ablation.variants import Variant, control_map


@dataclass(frozen=True)
class VariantMaps:
    """Head maps of one model."""

    spec: ModelSpec
    weights: Weights
    prompts: tuple[str, ...]
    """That heads are measured on."""
    chunks: int
    stats: Path
    analysis: Analysis

    @classmethod
    def measured(
        cls, spec: ModelSpec, weights: Weights, prompts: list[str], chunks: int, threads: int, stats: Path
    ) -> VariantMaps:
        """Measure heads as `forcingkv analyze heads` does, a sample a prompt; what `stats` has is kept."""
        job = Job(spec, weights, text_inputs(spec, prompts, None), chunks=chunks, threads=threads)
        record_samples(job, stats, samples=len(prompts))
        return cls(spec, weights, tuple(prompts), chunks, stats, analyze_statistics(stats))

    def of(self, variant: Variant) -> HeadMap:
        """The map that a variant wants."""
        wanted, policy = variant.wanted, variant.policy
        unsplit = policy.unsplit.layers if policy.unsplit else ()
        if wanted.kind == "profiled":
            return self.analysis.headmap
        if wanted.kind == "dummy":
            return self._dummy
        if wanted.kind == "threshold":
            decision = decide(self.analysis.observations, "threshold", alpha=wanted.value or 0.0)
            return labels_of_rule(decision, self.analysis.observations, self.analysis.headmap.model)
        return control_map(wanted, self._controlled(variant), unsplit)

    def statistics_of(self, variant: Variant) -> QueryStatistics | None:
        """Statistics of the model's queries, for a variant that scores by them: measured once, on the same
        prompts as heads."""
        if not needs_statistics(variant.policy):
            return None
        file = self.stats / "queries.safetensors"
        if not file.is_file():
            plan = build_plan(self.spec, self.spec.geometry(), load_policy("full"))
            texts = [torch.from_numpy(encode_words(self.spec, prompt)) for prompt in self.prompts]
            model = build_model(self.spec, self.weights)
            measure_statistics(model, plan, texts, self.chunks, 0).write(file)
        return QueryStatistics.read(file)

    def _controlled(self, variant: Variant) -> HeadMap:
        """The map whose labels a control deals out anew."""
        if variant.wanted.kind == "shares":
            shares = nominal_map(self.spec, variant.policy)
            assert shares is not None, f"{variant.name} has no labels"
            return shares
        return self._dummy if variant.wanted.kind == "dummy-random" else self.analysis.headmap

    @property
    def _dummy(self) -> HeadMap:
        return analyze_statistics(self.stats, Labelling(rule="dummy")).headmap
