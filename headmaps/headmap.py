"""The head map: which heads of a model are static and which dynamic, how that was found, and of what."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, from_data, to_data
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.writing import write_text

SCHEMA: Literal["forcingkv.headmap/1"] = "forcingkv.headmap/1"
STATIC, DYNAMIC = "static", "dynamic"
EVIDENCE = ("scores", "confidence", "margins", "undecided")
"""What a map may say of each layer's heads, beside their labels."""
MOST = 4096
"""More layers or heads than any model has: a damaged number must not take the memory."""

Scores = tuple[tuple[float, ...], ...]


def size_in_words(layers: int, heads: int) -> str:
    """Such as "1 layer of 3 heads": of a model with so many heads in each layer."""
    return f"{layers} layer{'s' * (layers != 1)} of {heads} head{'s' * (heads != 1)}"


@dataclass(frozen=True)
class ModelIdentity:
    """The model a map was made for."""

    name: str
    layers: int
    heads: int
    weights: str | None = None
    """SHA-256 of the weights file, where known."""


@dataclass(frozen=True)
class Budget:
    """A target that the number of dynamic heads was chosen for."""

    policy: str
    resolution: str
    kv_bytes: int | None = None
    """Bytes of keys and values in the last phase, at most."""
    time_ratio: float | None = None
    """Predicted time of a chunk in the last phase over that under the policy `full`, at most."""


@dataclass(frozen=True)
class Rule:
    """How labels followed from scores. What a source does not say is None: unknown."""

    name: str
    reason: str | None = None
    """Why this rule, where a person or a program chose it."""
    alpha: float | None = None
    """Score from which a head is static, for the rule `threshold`."""
    static_per_layer: int | None = None
    """Heads made static in each layer, for the rule `quota`."""
    sink_frames: int | None = None
    """Frames whose mass is left out of the score's denominator (`docs/method.md`, "Head profile")."""
    recent_frames: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Newest key frames whose mass is the score's numerator."""
    retrieval_threshold: float | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Retrieval score from which a head is dynamic, for the rule `retrieval` (DuoAttention)."""
    dummy_heads: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Heads of the model made dummies, for the rule `dummy` (Dummy Forcing)."""
    static_center: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Mean log-ratios of the static cluster, for the rules `kmeans` and `mixture` (`analyze.labels`)."""
    dynamic_center: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Those of the dynamic cluster."""
    boundary: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Weights of the log-ratios, then the constant: a head is static where the sum is at least 0."""
    budget: Budget | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the rule `budget` had to meet."""
    undecided: Literal["kept", "dynamic"] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What became of undecided heads: they kept their label, or were made dynamic."""


@dataclass(frozen=True)
class Source:
    """The file of another project that a map was read from, so that nothing it said is lost."""

    format: str
    """The reader's name of the format: `forcing-kv-json`, `pyramid-forcing-csv`, `duo-attention-tsv`."""
    sha256: str
    """SHA-256 of the file."""
    fields: Mapping[str, Any] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the file says beside the layers, verbatim (Forcing-KV: format, profile, description, ...)."""
    layers: tuple[Mapping[str, Any], ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Its layers, verbatim, where the labels alone would not give them back: other names, another order."""
    table: Mapping[str, Any] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Its layers, verbatim, where they are a table by number in place of a list."""


@dataclass(frozen=True)
class Statistics:
    """What was measured."""

    samples: int
    chunks: int
    """Chunks of each sample that were scored."""
    steps: int
    """Denoising steps that were scored, by their timesteps; 0: clean passes alone."""
    seed: int
    policy: str
    rows: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Query rows measured of each pass; None: all."""
    resolution: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Pixels, WIDTHxHEIGHT."""
    passes: Literal["all", "denoise", "clean"] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Passes of a chunk that were scored; None: the file does not say, as before there was a choice: the
    denoising passes."""
    scored_chunks: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Which chunks were scored, from 0; None: the file does not say."""


@dataclass(frozen=True)
class _Layer:
    layer: int
    heads: dict[str, tuple[int, ...]]
    scores: tuple[float, ...] | None = None
    confidence: tuple[float, ...] | None = None
    margins: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    undecided: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)


@dataclass(frozen=True)
class _File:
    schema: Literal["forcingkv.headmap/1"]
    model: ModelIdentity
    rule: Rule
    layers: tuple[_Layer, ...]
    statistics: Statistics | None = None
    source: Source | None = field(default=None, metadata=LEFT_OUT_IF_NONE)


@dataclass(frozen=True)
class HeadMap:
    """Labels of all heads, [layer][head], with the evidence for them."""

    model: ModelIdentity
    labels: tuple[tuple[str, ...], ...]
    rule: Rule
    scores: Scores | None = None
    """Mean recency score of each head, 0 to 1."""
    confidence: Scores | None = None
    """Share of the observations in which each head has its label."""
    statistics: Statistics | None = None
    source: Source | None = None
    """The file of another project that this map was read from."""
    margins: Scores | None = None
    """How far each head is from the boundary of the rule, in the rule's own units: static from 0 on."""
    undecided: tuple[tuple[int, ...], ...] | None = None
    """For each layer the heads whose label the statistics do not settle (`analyze.stability`)."""

    @classmethod
    def read(cls, path: Path | str) -> HeadMap:
        """Read and check a file of schema `forcingkv.headmap/1` (`read_headmap` reads others too).

        Raises InputError for a file that cannot be read, a wrong field, a number that is not
        finite, or heads that do not cover every layer exactly once.
        """
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = "head map") -> HeadMap:
        """Build from parsed JSON, with the checks of `read`."""
        file = from_data(_File, data, where)
        model = file.model
        numbers = [layer.layer for layer in file.layers]
        if len(numbers) != model.layers or numbers != list(range(model.layers)):
            expected = f"each of the {model.layers} layers once, in order"
            raise InputError(f"lists the layers {numbers}", where=where, expected=expected)
        for layer in file.layers:
            for name in EVIDENCE[:3]:
                values = getattr(layer, name)
                if values is not None and len(values) != model.heads:
                    raise InputError(
                        f"layer {layer.layer} has {len(values)} {name}",
                        where=where,
                        expected=f"one for each of the {model.heads} heads",
                    )
            named = layer.undecided or ()
            if sorted(set(named)) != list(named) or not all(0 <= head < model.heads for head in named):
                raise InputError(
                    f"layer {layer.layer} calls the heads {list(named)[:40]} undecided",
                    where=where,
                    expected=f"heads 0 to {model.heads - 1}, in order, each once",
                )
        labels = tuple(labels_of(layer.layer, layer.heads, model.heads, where) for layer in file.layers)
        rows: dict[str, Any] = {
            name: tuple(getattr(layer, name) for layer in file.layers) for name in EVIDENCE
        }
        whole = {name: found for name, found in rows.items() if None not in found}
        return cls(model, labels, file.rule, statistics=file.statistics, source=file.source, **whole)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        layers = tuple(
            _Layer(
                layer=number,
                heads={
                    label: tuple(head for head, given in enumerate(labels) if given == label)
                    for label in self.counts()
                },
                **{name: getattr(self, name)[number] for name in EVIDENCE if getattr(self, name)},
            )
            for number, labels in enumerate(self.labels)
        )
        file = _File(SCHEMA, self.model, self.rule, layers, self.statistics, self.source)
        data: dict[str, Any] = to_data(file)
        return data

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises InputError where it cannot be written."""
        write_text(path, self.to_text())

    def to_text(self) -> str:
        """The file's text: the same map gives the same text."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of `to_text`."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Heads of each label."""
        return dict(sorted(Counter(itertools.chain(*self.labels)).items(), reverse=True))

    def letters(self) -> dict[str, str]:
        """A letter for each label, to draw the map with: its first that no other label has."""
        letters: dict[str, str] = {}
        for label in sorted(self.counts(), key=lambda label: (label != STATIC, label != DYNAMIC, label)):
            spare = [letter for letter in label.upper() + "0123456789" if letter not in letters.values()]
            letters[label] = next(iter(spare), "?")
        return letters

    def order(self, layer: int, labels: Sequence[str]) -> list[int]:
        """The layer's heads sorted by label, in the order of `labels`: old index at each new place."""
        row = self.labels[layer]
        return sorted(range(len(row)), key=lambda head: (labels.index(row[head]), head))

    def check_model(self, layers: int, heads: int, labels: set[str]) -> None:
        """Raise InputError unless the map is for a model of that size and uses only those labels."""
        if (self.model.layers, self.model.heads) != (layers, heads):
            raise InputError(
                f"is for {size_in_words(self.model.layers, self.model.heads)} ({self.model.name})",
                where="head map",
                expected=size_in_words(layers, heads),
                hint="Use the map made for this model, or analyze it: forcingkv analyze heads",
            )
        others = ", ".join(map(repr, sorted(set(self.counts()) - labels)))
        if others:
            expected = f"only {', '.join(sorted(labels))}"
            raise InputError(f"uses the label {others}", where="the head map", expected=expected)


def labels_of(number: int, groups: Mapping[str, Sequence[int]], heads: int, where: str) -> tuple[str, ...]:
    """The label of each head of layer `number`, from the heads of each label.

    Raises InputError, naming the layer and the heads, unless each of the `heads` heads is given once.
    """
    found: dict[int, str] = {}
    for label, members in groups.items():
        for head in members:
            if not 0 <= head < heads:
                expected = f"0 to {heads - 1}"
                raise InputError(f"layer {number} names head {head}", where=where, expected=expected)
            if head in found:
                twice = f"layer {number} gives head {head} twice ({found[head]} and {label})"
                raise InputError(twice, where=where, expected="each head exactly once")
            found[head] = label
    if len(found) < heads:
        # Not all of them: a damaged number of heads must not take the memory.
        missing = itertools.islice((head for head in range(heads) if head not in found), 40)
        absent = f"layer {number} leaves out head {', '.join(map(str, missing))}"
        raise InputError(absent, where=where, expected="each head exactly once")
    return tuple(found[head] for head in range(heads))


def uniform(model: ModelIdentity, label: str) -> HeadMap:
    """A map that gives every head the same label."""
    rows = ((label,) * model.heads,) * model.layers
    return HeadMap(model, rows, Rule("uniform"))


@dataclass(frozen=True)
class Choices:
    """Answers to what a file leaves open. None: not answered, so the file must say it, or is refused."""

    model: str | None = None
    """Name of the model the map is for."""
    layers: int | None = None
    heads: int | None = None
    """Layers of the model and heads of a layer: needed where the file gives no counts, else checked."""
    threshold: float | None = None
    """Retrieval score from which a head is dynamic (DuoAttention); its own default where not given."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """New label for each class or label of the file: {"-1": "static", "anchor": "dynamic"}."""
    missing_layers: str | None = None
    """Label of all heads of layers that the file leaves out (Forcing-KV)."""


def size_limit(count: int, what: str, where: str) -> int:
    """A number of layers or heads that can be true. Raises InputError for any other."""
    if not 1 <= count <= MOST:
        raise InputError(f"{what} is {count}", where=where, expected=f"1 to {MOST}")
    return count
