"""The head map that each variant is run with: of recorded statistics, or a control that looks at none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from forcingkv.analyze import Analysis, Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.analysis import labels_of_rule
from forcingkv.analyze.labels import decide
from forcingkv.commands.models import text_inputs
from forcingkv.headmaps import HeadMap
from forcingkv.measure.nominal import nominal_map
from forcingkv.models.checkpoint import Weights
from forcingkv.runtime.spec import ModelSpec
from studies.ablation.variants import Variant, control_map


@dataclass(frozen=True)
class VariantMaps:
    """Head maps of one model."""

    spec: ModelSpec
    stats: Path
    analysis: Analysis

    @classmethod
    def measured(
        cls, spec: ModelSpec, weights: Weights, prompts: list[str], chunks: int, threads: int, stats: Path
    ) -> VariantMaps:
        """Measure heads as `forcingkv analyze heads` does, a sample a prompt; what `stats` has is kept."""
        job = Job(spec, weights, text_inputs(spec, prompts, None), chunks=chunks, threads=threads)
        record_samples(job, stats, samples=len(prompts))
        return cls(spec, stats, analyze_statistics(stats))

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
