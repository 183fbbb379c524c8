"""What is killed and what fills disks: each command that writes, on the smallest model, in one process.

Each writes result 0 or result 1, which differ, to one place, and says what it sees there.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.writing import is_ours
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.bundle import GRAPHS
from forcingkv.runtime.embeds_writer import growing_embeds
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words, read_embeds
from forcingkv.runtime.video import open_writer
from tests.conftest import headmap_of, nothing_drawn, random_model, small_spec
from tests.runtime.conftest import small_bundle

SPEC = small_spec(layers=2)
MAP = headmap_of(SPEC, [[0], [1]])
POLICIES = ("window", "forcing-kv")


class Task(ABC):
    """A command.

    Attributes:
        name: what it is called.
        atomic: whether there is the old result or the new, and nothing between; else parts are, each whole.
    """

    name: str
    atomic = True

    @abstractmethod
    def write(self, place: Path, result: int) -> None:
        """Write that result into a folder, as the command does."""

    @abstractmethod
    def whole(self, place: Path) -> str:
        """What a reader takes for whole in a folder: a digest, or "" for nothing.

        Raises AssertionError for what is taken for whole and is not.
        """

    def load(self) -> None:  # noqa: B027
        """Import and make what a process that is killed need not."""


def digest(*parts: bytes) -> str:
    """A digest of some bytes."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class Export(Task):
    """A bundle in the place of another. Graphs are those of `small_bundle`: tracing them takes seconds."""

    name = "export"

    def load(self) -> None:
        """Import the exporter, and make weights and graphs."""
        import onnx

        from forcingkv.export import bundle_parts, bundle_writer

        self.weights = random_model(SPEC).state_dict()
        self.graphs = {
            (policy, name): onnx.load(small_bundle(policy) / f"{name}.onnx", load_external_data=False)
            for policy in POLICIES
            for name in GRAPHS
        }
        self.parts, self.writer = bundle_parts, bundle_writer
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder), 0)  # torch imports 400 more modules when a model is first made

    def write(self, place: Path, result: int) -> None:
        """Export with another policy for each result."""
        import onnx

        policy = load_policy(POLICIES[result])

        def write_onnx(make: object, path: Path, *_: object, **options: object) -> onnx.ModelProto:
            model = self.graphs[policy.name, path.stem]
            onnx.save_model(model, path)
            return model

        headmap = MAP if policy.needs_headmap else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.parts, "write_onnx", write_onnx)
            self.writer.export_bundle(
                SPEC, self.weights, policy, place / "bundle", headmap=headmap, verify=False
            )

    def whole(self, place: Path) -> str:
        """The digest of the bundle."""
        if not (place / "bundle" / "manifest.json").exists():
            return ""
        return Bundle.open(place / "bundle").digest


class Analysis(Task):
    """Statistics of two samples, a head map and a report."""

    name = "analyze"
    atomic = False

    def load(self) -> None:
        """Import the analysis."""
        import seaborn
        import sklearn.cluster
        import sklearn.metrics
        import sklearn.mixture

        import forcingkv.analyze

        assert forcingkv.analyze
        assert seaborn
        assert sklearn

    def write(self, place: Path, result: int) -> None:
        """Record with another seed for each result, anew."""
        from forcingkv.analyze import Job, analyze_heads
        from forcingkv.analyze.storage import Storage
        from forcingkv.models.checkpoint import random_weights

        texts = [encode_words(SPEC, prompt) for prompt in ("a b", "c d")]
        job = Job(SPEC, random_weights(SPEC), texts, seed=5 + 50 * result, chunks=4)
        with nothing_drawn():
            storage = Storage(place / "heads" / "stats")
            there = storage.samples()
            restart = bool(there) and storage.recording(there[0]).seed != job.seed
            analyze_heads(job, place / "heads", samples=2, restart=restart, command=["x"])

    def whole(self, place: Path) -> str:
        """The digest of the head map; all samples that are there must be of one run, and whole."""
        from forcingkv.analyze.storage import read_statistics

        out = place / "heads"
        if any((out / "stats").glob("sample-*.parquet")):
            read_statistics(out / "stats").rows.collect()
        if not (out / "headmap.json").exists():
            return ""
        return HeadMap.read(out / "headmap.json").digest


class Encode(Task):
    """A file of embeddings that grows prompt by prompt."""

    name = "encode"

    def write(self, place: Path, result: int) -> None:
        """Write other embeddings for each result; encoding itself is left out."""
        prompts = [f"prompt {number}" for number in range(30)]
        shape = (16, 64)
        with growing_embeds(
            place / "e.safetensors", prompts, prompts, [16] * 30, [shape] * 30, {"encoder": str(result)}
        ) as growing:
            for number in range(growing.done, 30):
                growing.write(np.full(shape, 100 * result + number, np.float32))

    def whole(self, place: Path) -> str:
        """The digest of the embeddings, which must all be of one result."""
        if not (place / "e.safetensors").exists():
            return ""
        found = read_embeds(place / "e.safetensors")
        values = [float(value) for array in found.arrays for value in np.unique(array)]
        assert values in ([*range(30)], [*range(100, 130)]), values
        return digest((place / "e.safetensors").read_bytes())


class Save(Task):
    """A video that saves its state after each chunk, as pictures."""

    name = "generate --save"
    atomic = False

    bundle = Path()

    def load(self) -> None:
        """Make the bundle, and import what writes pictures."""
        import av  # noqa: F401

        self.bundle = small_bundle("window")

    def write(self, place: Path, result: int) -> None:
        """Generate with another seed for each result; the states take the place of each other."""
        with (
            Session.open(self.bundle, threads=1) as session,
            open_writer(place / "frames", fps=8) as writer,
        ):
            video = session.generate("a b", seed=3 + result, chunks=4)
            for chunk in video:
                writer.write(chunk.frames)
                video.save(place / "state")

    def whole(self, place: Path) -> str:
        """Which seed the state is of, and whether the pictures are a whole video; a state must restore."""
        state = ""
        if (place / "state" / "state.json").exists():
            with Session.open(self.bundle, threads=1) as session:
                state = f"{session.restore(place / 'state', chunks=9).seed}"
        record = place / "frames" / "frames.json"
        pictures = sorted((place / "frames").glob("*.png")) if record.exists() else []
        return digest(state.encode(), *(file.read_bytes() for file in pictures))


def hidden(place: Path) -> list[str]:
    """Locks and temporary names that are left."""
    found = (Path(at, name) for at, folders, names in os.walk(place) for name in (*folders, *names))
    return sorted(file.relative_to(place).as_posix() for file in found if is_ours(file.name))
