"""A bundle: the folder that export writes and the runtime opens."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import Literal, TypeVar

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, from_data, to_data
from forcingkv.headmaps.files import FileRecord, inside, record_file, verify_file
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.headmaps.reading import parse_json, read_content
from forcingkv.runtime.bundle_check import check_digest, check_files, check_sizes, map_checked, read_checked
from forcingkv.runtime.bundle_files import HEADMAP, MANIFEST, STATISTICS, no_bundle
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.engines import EngineRecord, KernelRecord
from forcingkv.runtime.graph_check import check_graph
from forcingkv.runtime.graph_records import (
    ALL_GRAPHS,
    STRIP,
    Layout,
    check_records,
    encode_layouts,
    sizes_of,
)
from forcingkv.runtime.graph_records import CLEAN as CLEAN
from forcingkv.runtime.graph_records import GRAPHS as GRAPHS
from forcingkv.runtime.graph_records import next_name as next_name
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.statistics import QueryStatistics, required_statistics
from forcingkv.runtime.loras import LoraRecord
from forcingkv.runtime.spec import Dtype, Linear, ModelSpec
from forcingkv.runtime.tensor_records import GraphRecord as GraphRecord
from forcingkv.runtime.tensor_records import TensorRecord as TensorRecord
from forcingkv.runtime.tensor_records import as_records as as_records
from forcingkv.runtime.tensor_records import tensor_records as tensor_records

T = TypeVar("T")

SCHEMA = "forcingkv.bundle/1"


@dataclass(frozen=True)
class PlanRecord:
    """What the cache plan comes to. Derived: checked against the plan when the bundle is opened."""

    kv_bytes: int
    """In the dtype the graphs compute in, batch 1, last phase, current chunk included."""
    phases: tuple[dict[str, int], ...]
    """For each phase its first chunk and the cached tokens of each group and role."""
    layers: tuple[dict[str, int], ...]
    """For each layer the heads of each group."""

    @classmethod
    def of(cls, plan: CachePlan, compute: Dtype = "float32") -> PlanRecord:
        """The record of a plan whose graphs compute in that dtype."""
        return cls(
            kv_bytes=plan.kv_bytes(compute),
            phases=tuple(
                {"first_chunk": phase.first_chunk} | {f"{label}.{role}": n for label, role, n in phase.tokens}
                for phase in plan.phases
            ),
            layers=tuple({group.label: group.heads for group in groups} for groups in plan.layers),
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """What the scales of inputs in FP8 were found with: every pass of some chunks for some texts."""

    texts: Literal["prompts", "embeddings", "random"]
    prompts: tuple[str, ...]
    chunks: int
    seed: int
    """Of the first text's noise; each text has the next."""
    resolution: tuple[int, int]
    largest: dict[str, float]
    """Name of each linear layer in FP8 -> the largest absolute value seen to go into it."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    schema: Literal["forcingkv.bundle/1"]
    model: ModelSpec
    resolution: tuple[int, int]
    policy: Policy
    plan: PlanRecord
    graphs: dict[str, GraphRecord]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    headmap: str | None = None
    """SHA-256 of the head map's text."""
    verification: dict[str, float] = field(default_factory=dict)
    """Largest absolute difference between each graph and torch, seen at export. `step.fp8` and
    `step.int8` are of x0 with inputs rounded, by root mean square, in units of what rounding changes."""
    compute: Dtype = "float32"
    """What the graphs compute in."""
    engines: tuple[EngineRecord, ...] = ()
    kernels: tuple[KernelRecord, ...] = ()
    """Of the DynamicPrune plugin, for each GPU."""
    warnings: tuple[str, ...] = ()
    calibration: CalibrationRecord | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Where linear layers multiply in FP8."""
    taken: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What was chosen of the checkpoint, in sentences; None where there was nothing to choose."""
    loras: tuple[LoraRecord, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What was merged into the weights; None: nothing, or nobody knows."""
    crop: tuple[int, int] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Width and height of the frames, where they are less than `resolution`, which is computed."""
    linear: Linear | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What linear layers of the blocks multiply in, where that is another than `compute`."""

    origin: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """SHA-256 of all that decided what it is, of a bundle in the cache (`export/cached_bundle.py`)."""
    strips: Strips | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """In which a frame is decoded; None: as a whole."""
    statistics: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Digest of the statistics of queries that tokens are scored by (`QueryStatistics`), if they are."""

    @property
    def frames_record(self) -> TensorRecord | None:
        """The output that is frames: of a whole latent frame, or of a strip of one."""
        graph = self.graphs.get(STRIP) if self.strips else self.graphs["decode"]
        return graph.outputs.get("frames") if graph else None

    @property
    def graph_names(self) -> list[str]:
        """The graphs that it has, in the order in which they are made."""
        return [name for name in ALL_GRAPHS if name in self.graphs]

    @property
    def engine_graphs(self) -> list[str]:
        """The graphs that engines are looked for of: those every bundle has, and what engines it has more."""
        built = {engine.graph for engine in self.engines}
        return [name for name in self.graph_names if name in GRAPHS or name in built]

    @property
    def has_graphs(self) -> bool:
        """Whether there are ONNX files; without them torch alone can run it."""
        return all(record.file is not None for record in self.graphs.values())

    @property
    def multiplies_in(self) -> str:
        """What linear layers multiply in."""
        # Bundles made before int8 was there do not say `linear`.
        return self.linear or ("fp8" if self.calibration else self.compute)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the frames that sessions give."""
        return self.crop or self.resolution

    def to_text(self) -> str:
        """The file's text."""
        return json.dumps(to_data(self), indent=1) + "\n"


class Bundle:
    """An opened bundle: every file checked against the manifest's digests, every graph looked through.

    Attributes:
        path: the folder.
        manifest: what it says.
        headmap: the head map, if the policy uses one.
        statistics: those of the model's queries, if the policy uses them.
        plan: the cache plan.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        headmap: HeadMap | None,
        statistics: QueryStatistics | None = None,
    ) -> None:
        self.path, self.manifest, self.headmap, self.statistics = path, manifest, headmap, statistics
        self._graphs: dict[str, bytes] = {}

    @classmethod
    def open(cls, path: Path | str, *, expect: str | None = None) -> Bundle:
        """Open and check a bundle. Nothing of it runs, and ONNX Runtime sees none of it before this returns.

        Args:
            path: its folder.
            expect: the digest that it has to have (`digest`), as someone said whom you trust.

        Raises InputError where something is missing, changed, outside the folder, does not fit, or is not as
        export writes it (`graph_check`), and for another digest than expected.
        """
        folder = Path(path)
        content = _manifest_content(folder)
        digest, where = hashlib.sha256(content).hexdigest(), str(folder / MANIFEST)
        check_digest(folder, digest, expect)
        manifest = _read_manifest(folder, content)
        for name, record in manifest.files.items():
            verify_file(folder, name, record)
        headmap = HeadMap.read(folder / HEADMAP) if manifest.headmap else None
        if headmap and headmap.digest != manifest.headmap:
            raise InputError("is not the one the bundle was baked with", where=str(folder / HEADMAP))
        statistics = QueryStatistics.read(folder / STATISTICS) if manifest.statistics else None
        if statistics and statistics.digest != manifest.statistics:
            raise InputError("is not what the bundle was exported with", where=str(folder / STATISTICS))
        bundle = cls(folder, manifest, headmap, statistics)
        required_statistics(bundle.plan)
        bundle.digest = digest  # of what was opened, though the folder may be exported anew
        if PlanRecord.of(bundle.plan, manifest.compute) != manifest.plan:
            raise InputError(
                "its cache plan does not follow from its model, policy and head map",
                where=where,
                hint="Export the bundle again with this version of forcingkv.",
            )
        bundle._check_sizes()
        check_records(manifest.graphs, bundle.plan, manifest.compute, where, manifest.strips)
        if manifest.has_graphs:
            for graph in manifest.graph_names:
                bundle.graph_content(graph)
        return bundle

    def computing_in(self, dtype: Dtype | None) -> Bundle:
        """The bundle as torch runs it, in a dtype of its own choice (None: that of the export). It has the
        same digest, and no graphs."""
        compute, records = dtype or self.manifest.compute, self.manifest.graphs
        decoder = sizes_of(records, self.manifest.strips)
        graphs = {
            name: replace(records[name].for_torch, inputs=made[0], outputs=made[1])
            for name, made in tensor_records(self.plan, compute, decoder).items()
        }
        if encode := records.get("encode"):
            held = {name: Layout(compute, record.shape) for name, record in encode.carried.items()}
            ends = as_records(encode_layouts(self.plan, compute, held))
            graphs["encode"] = replace(encode.for_torch, inputs=ends[0], outputs=ends[1])
        made = PlanRecord.of(self.plan, compute)
        manifest = replace(self.manifest, compute=compute, graphs=graphs, plan=made)
        bundle = Bundle(self.path, manifest, self.headmap, self.statistics)
        bundle.digest = self.digest
        return bundle

    def _check_sizes(self) -> None:
        """Raise InputError unless the sizes that are computed and shown go together, in the graphs too."""
        geometry, manifest = self.plan.geometry, self.manifest
        width, height = manifest.frame_size
        frames = manifest.frames_record
        made = frames.shape[1:3] if frames else ()
        rows = manifest.strips.pixel_rows if manifest.strips else height
        if (geometry.width, geometry.height) != manifest.resolution or made != (rows, width):
            raise InputError(
                "its frames are not of the size that it says",
                where=str(self.path / MANIFEST),
                expected=f"frames of {geometry.described}",
                hint="Export the bundle again with this version of forcingkv.",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has the digests of all other files: what the bundle is."""
        return record_file(self.path / MANIFEST).sha256

    @cached_property
    def plan(self) -> CachePlan:
        """The cache plan."""
        width, height = self.manifest.frame_size
        model, policy = self.manifest.model, self.manifest.policy
        geometry = model.geometry(f"{width}x{height}")
        return build_plan(model, geometry, policy, self.headmap, self.statistics)

    def require_graphs(self) -> None:
        """Raise InputError for a bundle without graphs."""
        if not self.manifest.has_graphs:
            raise InputError(
                "has no graphs: it was exported for torch",
                where=str(self.path),
                expected="--backend torch",
                hint="For ONNX Runtime or TensorRT export the model with their --target.",
            )

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph. Raises InputError for a bundle without graphs."""
        return inside(self.path, self._file(name))

    def _file(self, graph: str) -> str:
        self.require_graphs()
        file = self.manifest.graphs[graph].file
        assert file is not None
        return file

    def graph_content(self, name: str) -> bytes:
        """The bytes of a graph's ONNX file, once they are known to be a graph as export writes it.

        Raises InputError for any other (`graph_check.check_graph`), and for a bundle without graphs.
        """
        if name not in self._graphs:
            manifest, record = self.manifest, self.manifest.graphs[name]
            content = self.content(self._file(name))
            check_graph(
                content,
                str(self.path / self._file(name)),
                name,
                record,
                self.plan,
                runs=manifest.compute == "float32",
                weights=manifest.files[record.weights].bytes if record.weights else None,
            )
            self._graphs[name] = content
        return self._graphs[name]

    def content(self, file: str) -> bytes:
        """The content of a file, equal to what was checked. Raises InputError if it was changed since."""
        return read_checked(self.path, file, self.manifest.files)

    def mapped(self, file: str) -> AbstractContextManager[mmap]:
        """The content of a file that may be too large to read whole, as `content`; it is not in memory of the
        process's own. Raises InputError where it was changed by the end of the block too."""
        return map_checked(self.path, file, self.manifest.files)

    def weights(self, name: str) -> Path | None:
        """The file that a graph's weights lie in, if it has any."""
        file = self.manifest.graphs[name].weights
        return inside(self.path, file) if file else None


def read_data(kind: type[T], path: Path) -> T:
    """The dataclass `kind` from a file of JSON. Raises InputError where it cannot be read or does not fit."""
    return from_data(kind, parse_json(read_content(path), str(path)), str(path))


def _manifest_content(folder: Path) -> bytes:
    path = inside(folder, MANIFEST)
    if not path.is_file():
        raise no_bundle(folder)
    return read_content(path)


def _read_manifest(folder: Path, content: bytes) -> Manifest:
    path = folder / MANIFEST
    manifest = from_data(Manifest, parse_json(content, str(path)), str(path))
    for name in manifest.files:
        inside(folder, name)
    named: set[str | None] = {HEADMAP} if manifest.headmap else set()
    named |= {STATISTICS} if manifest.statistics else set()
    for graph in GRAPHS:
        if graph not in manifest.graphs:
            raise InputError(f"has no graph {graph!r}", where=str(path))
    for record in manifest.graphs.values():
        named |= {record.file, record.weights}
    named |= {engine.file for engine in manifest.engines} | {kernel.file for kernel in manifest.kernels}
    if len({record.file is None for record in manifest.graphs.values()}) > 1:
        raise InputError("has files of some graphs only", where=str(path), expected="of all, or of none")
    unrecorded = sorted(name for name in named - set(manifest.files) if name is not None)
    if unrecorded:
        raise InputError(f"has no digest of {', '.join(unrecorded)}", where=str(path))
    check_files(manifest, HEADMAP, str(path))
    check_sizes(manifest, str(path))
    return manifest
