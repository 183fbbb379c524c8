"""`forcingkv inspect`: what is in a bundle, and what memory a session of it needs. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from forcingkv.commands.console import AsJson, console, emit, must_end, need, say
from forcingkv.commands.models import ExpectDigest
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.headmap import size_in_words
from forcingkv.measure.tables import wrapped
from forcingkv.runtime import Bundle
from forcingkv.runtime.footprint import (
    EngineSet,
    engine_sets,
    footprint,
    grouped_by_need,
    named,
    part_notes,
    readable,
)
from forcingkv.runtime.kv.window import in_words

REMARKS = (
    "Activations are the most of prompt and step, which take turns, and those of decode.",
    "Not counted: CUDA's own context, code of kernels, rounding by allocators.",
)
"""On the memory of a session with engines."""


def inspect(
    bundle: Annotated[Path, Argument(help="Folder that export wrote.")],
    as_json: AsJson = False,
    picture: Annotated[
        Path | None, Option(help="Also draw where the memory goes, to this file (.png).")
    ] = None,
    expect_digest: ExpectDigest = None,
) -> None:
    """Check a bundle's digests and print what it holds, how its engines were built and what they need.

    Example: forcingkv inspect bundle --picture bytes.png
    """
    if picture is not None:
        need("analyze", "matplotlib")
        must_end(picture, ".png")
    opened = Bundle.open(bundle, expect=expect_digest)
    if picture is not None:
        from forcingkv.commands.bytes_picture import write_bytes_picture

        write_bytes_picture(opened, picture)
        console.print(f"{picture}: where the memory goes", soft_wrap=True)
    if as_json:
        emit(to_data(opened.manifest) | {"digest": opened.digest, "footprint": _footprints(opened)})
        return
    for number, section in enumerate(_sections(opened)):
        say(*([""] if number else []), *section)


def _footprints(opened: Bundle) -> list[dict[str, Any]]:
    """The memory of a session for each set of engines, for machines."""
    manifest, plan = opened.manifest, opened.plan
    found = []
    for one in engine_sets(manifest) or ((),):
        names = {name: getattr(one[0], name) if one else None for name in ("flavour", "version", "sm")}
        parts = footprint(manifest, plan, one)
        found.append(names | {"parts": parts, "total": sum(parts.values())})
    return found


def _sections(opened: Bundle) -> Iterator[list[str]]:
    sets = engine_sets(opened.manifest)
    yield list(_model(opened))
    yield list(_attention(opened))
    yield list(_phases(opened))
    for one in sets:
        yield list(_engines(opened, one))
    for group in grouped_by_need(sets) or ((),):
        yield list(_memory(opened, group))
    warnings = [line for warning in opened.manifest.warnings for line in wrapped("  ", warning)]
    yield ["warnings", *(warnings or ["  none"])]
    yield ["files", *_files(opened)]


def _model(opened: Bundle) -> Iterator[str]:
    manifest, plan = opened.manifest, opened.plan
    spec = manifest.model
    heads: Counter[str] = Counter()
    for groups in plan.layers:
        heads.update({group.label: group.heads for group in groups})
    counted = ", ".join(f"{count} {label}" for label, count in heads.items())
    yield str(opened.path)
    yield from _beside("digest", opened.digest)
    yield from _beside("model", f"{spec.name}, {size_in_words(spec.layers, spec.heads)}: {counted}")
    yield from _beside(
        "resolution",
        f"{plan.geometry.described}: {plan.frame_tokens:,} tokens a frame,"
        f" {spec.frames_per_chunk} frames a chunk",
    )
    yield from _beside("schedule", spec.passes_described)
    digest = f", head map {manifest.headmap[:12]}" if manifest.headmap else ""
    digest += f", statistics of queries {manifest.statistics[:12]}" if manifest.statistics else ""
    yield from _beside("policy", manifest.policy.name + digest)
    yield from _beside("positions", in_words(plan))
    for lora in manifest.loras or ():
        yield from _beside("lora", f"{lora.told}, sha256 {lora.sha256[:12]}")
    products = manifest.multiplies_in
    linears = "" if products == manifest.compute else f", linear layers of the blocks in {products}"
    yield from _beside("graphs", f"compute in {manifest.compute}{linears}")
    if manifest.strips:
        yield from _beside("decoding", f"each frame {manifest.strips.described}")
    if "recache" in manifest.graphs:
        yield from _beside("switches", "of prompts by keep-sink, empty-sink and replay on ONNX Runtime")
    for sentence in manifest.taken or ():
        yield from _beside("weights", sentence)
    kernels = manifest.kernels
    if kernels:
        names = ", ".join(dict.fromkeys(record.kernel for record in kernels))
        sms = ", ".join(f"sm_{sm}" for sm in sorted({record.sm for record in kernels}))
        most = max(record.registers for record in kernels)
        yield from _beside("kernels", f"{names} for {sms}; at most {most} registers")
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield from _beside("made by", made)


def _attention(opened: Bundle) -> Iterator[str]:
    """Keys and values by role: what attention reads, not how often it is held."""
    plan, dtype = opened.plan, opened.manifest.compute
    yield f"keys and values that a pass attends to, from chunk {plan.phases[-1].first_chunk} on, in {dtype}"
    yield from _shares(plan.kv_bytes_by_role(dtype), {})


def _phases(opened: Bundle) -> Iterator[str]:
    phases = opened.plan.phases
    yield f"{'cached tokens from chunk':<24}" + "".join(f"{phase.first_chunk:>8}" for phase in phases)
    for label, role, _ in phases[-1].tokens:
        counts = "".join(f"{phase.length(label, role):>8,}" for phase in phases)
        yield f"  {label + ' ' + role:<22}{counts}"


def _engines(opened: Bundle, one: EngineSet) -> Iterator[str]:
    """What the builds of a set reported; a column a graph, since graphs are few and figures many."""
    files = opened.manifest.files
    rows: list[tuple[str, list[str]]] = [
        ("graph", [engine.graph for engine in one]),
        ("file", [readable(files[engine.file].bytes) for engine in one]),
        ("sha256", [files[engine.file].sha256[:12] for engine in one]),
        ("layers", [f"{engine.layers:,}" for engine in one]),
        ("plugin nodes", [str(engine.plugin_layers) for engine in one]),
        ("phases", [str(engine.phases) for engine in one]),
        ("profiles", [str(len(engine.starts)) for engine in one]),
        ("weights", [readable(engine.weight_bytes) for engine in one]),
        ("activations", [readable(engine.activation_bytes) for engine in one]),
        ("of them scratch", [readable(engine.scratch_bytes) for engine in one]),
        ("built in", [f"{engine.seconds:.1f} s" for engine in one]),
        ("host memory, peak", [readable(engine.peak_bytes) for engine in one]),
    ]
    yield f"engines of {named([one])}"
    for name, cells in rows:
        yield f"  {name:<22}" + "".join(f"{cell:>16}" for cell in cells)


def memory_title(group: Sequence[EngineSet], parts: Mapping[str, int]) -> str:
    """What the parts of a session's memory (`footprint`) are of."""
    if group:
        return f"device memory of a session with {named(group)}"
    if "kv_current" in parts:
        return "memory of a session on torch"
    if "weights" in parts:
        return "memory of a session on ONNX Runtime"
    return "buffers of a session, without weights and activations: there are no engines"


def _memory(opened: Bundle, group: Sequence[EngineSet]) -> Iterator[str]:
    """What a session holds: of sets that need the same, or without engines."""
    parts = footprint(opened.manifest, opened.plan, group[0] if group else ())
    yield from wrapped("", memory_title(group, parts))
    manifest = opened.manifest
    notes = part_notes(opened.plan, joined=not manifest.has_graphs, strips=manifest.strips is not None)
    yield from _shares(parts, notes)
    for remark in REMARKS if group else ():
        yield from wrapped("  ", remark)


def _shares(parts: Mapping[str, int], notes: Mapping[str, str]) -> Iterator[str]:
    """Bytes by part, each with its share and its note, and the total."""
    total = sum(parts.values())
    for name, size in parts.items():
        if size:
            yield f"  {name:<16}{readable(size):>9}{size / total:>7.1%}  {notes.get(name, '')}".rstrip()
    yield f"  {'total':<16}{readable(total):>9}"


def _files(opened: Bundle) -> Iterator[str]:
    files = opened.manifest.files
    longest = max(len(name) for name in files)
    for name, record in files.items():
        yield f"  {name:<{longest}}{readable(record.bytes):>9}  sha256 {record.sha256[:12]}"


def _beside(name: str, text: str) -> list[str]:
    return wrapped(f"  {name:<12}", text)
