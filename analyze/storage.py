"""Where statistics lie: a local folder, or any place that fsspec reaches (s3://, gs://, memory://).

A file appears whole or not at all, and carries what it was measured on, so a run can go on where it
was interrupted, and workers on several machines can write to one place.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import posixpath
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import numpy.typing as npt
import polars as pl
from fsspec.implementations.local import LocalFileSystem
from polars.exceptions import PolarsError

from forcingkv.analyze.recording import COLUMNS, METADATA_KEY, Recording
from forcingkv.headmaps import InputError
from forcingkv.headmaps.errors import first_line
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import parse_json
from forcingkv.headmaps.writing import (
    check_file,
    refuse_url,
    remove_free_locks,
    unwritable,
    write_bytes,
)

URL = "://"
"""What tells a URL from a folder."""
TRIAL = ".trial"
"""File that is written and removed, to see whether others can be."""
VERSIONS = "versions.json"
"""File beside the samples that says what recorded them: not in theirs, so equal samples stay equal."""
MEASURING = ("forcingkv", "torch", "numpy")
"""Packages that a sample depends on."""

Ints = npt.NDArray[np.int64]

_NAME = re.compile(r"^sample-(\d{4,})\.parquet$")


class Storage:
    """The files `sample-NNNN.parquet` of one place.

    Raises InputError where there is no file system for the URL.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        if URL not in self.place:
            refuse_url(self.place)
            # fsspec would take ~ and :: in the name of a folder for something else
            self._files, self._root = LocalFileSystem(), os.path.abspath(self.place)
        else:
            try:
                self._files, self._root = fsspec.core.url_to_fs(self.place)
            except (ValueError, ImportError) as error:
                expected = "a folder, or a URL that fsspec knows"
                raise InputError(
                    f"cannot be reached ({error})", where=self.place, expected=expected
                ) from error
        self._is_local = self._files.protocol[0] == "file"

    def samples(self) -> list[int]:
        """The samples that are there, in order."""
        self._files.invalidate_cache()
        try:
            names = [posixpath.basename(path) for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            what = f"cannot be listed ({error.strerror or error})"
            raise InputError(what, where=self.place, expected="a folder") from error
        return sorted(int(found[1]) for name in names if (found := _NAME.match(name)))

    def lacks(self, samples: int) -> bool:
        """Whether one of the samples 0 to `samples` - 1 is not there."""
        there = set(self.samples())
        return samples > len(there) or any(sample not in there for sample in range(samples))

    def path(self, sample: int) -> str:
        """The file of a sample, as people know it."""
        return posixpath.join(self.place, _name(sample))

    def write(self, rows: pl.DataFrame, recording: Recording) -> None:
        """Write the file of the sample that `recording` names. Raises InputError where that fails."""
        assert recording.sample is not None
        content = io.BytesIO()
        rows.write_parquet(content, metadata={METADATA_KEY: recording.to_text()})
        self._put(_name(recording.sample), content.getvalue())

    def note_versions(self) -> None:
        """Note what recorded the first sample: for `check_versions`, before others are added."""
        self._put(VERSIONS, (json.dumps(_installed(), indent=1) + "\n").encode())

    def check_versions(self) -> None:
        """Raise InputError where other versions recorded the samples that are there.

        Statistics that do not say are from before this was noted, and pass.
        """
        if not self.samples():
            return
        where = posixpath.join(self.place, VERSIONS)
        try:
            recorded = parse_json(self._files.cat_file(self._at(VERSIONS)), where)
        except FileNotFoundError:
            return
        except (OSError, InputError) as error:
            hint = "Measure everything anew with --restart."
            raise InputError(f"cannot be read ({first_line(error)})", where=where, hint=hint) from error
        current = _installed()
        if recorded != current:
            raise InputError(
                f"was recorded by {_listed(recorded)}",
                where=self.place,
                expected=f"{_listed(current)}, which are installed",
                hint="Samples of both do not belong in one map: choose another folder, or measure everything"
                " anew with --restart.",
            )

    def check_writable(self) -> None:
        """Raise InputError where no file can be written. Nothing is left of the trial."""
        if self._is_local:
            check_file(Path(self._at(TRIAL)))
            return
        try:
            self._put(TRIAL, b"")
        finally:
            with suppress(OSError):
                self._files.rm_file(self._at(TRIAL))

    def remove_leftovers(self) -> None:
        """Remove what killed processes left in a local folder, where that can be done."""
        if self._is_local:
            for name in ("sample-", VERSIONS):
                remove_free_locks(Path(self._root), name)

    def _put(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        if self._is_local:
            write_bytes(Path(self._at(name)), content)
            return
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._at(name), content)  # an object appears whole
        except OSError as error:
            raise unwritable(Path(self.place, name), error) from error

    def recording(self, sample: int) -> Recording:
        """What a file says it holds. Raises InputError for a damaged file, or another's."""
        where = self.path(sample)
        try:
            with self._files.open(self._at(_name(sample)), "rb") as file:
                metadata = pl.read_parquet_metadata(file)
                file.seek(0)
                columns = pl.read_parquet_schema(file)
        except (OSError, PolarsError) as error:
            raise _damaged(where, error) from error
        if METADATA_KEY not in metadata:
            raise InputError(
                "does not say what it holds",
                where=where,
                expected="statistics that this version of forcingkv recorded",
                hint="Record it anew: forcingkv analyze heads --restart",
            )
        recording = Recording.from_text(metadata[METADATA_KEY], where)
        if columns != COLUMNS:
            raise InputError(f"has the columns {dict(columns)}", where=where, expected=f"{dict(COLUMNS)}")
        if recording.sample != sample:
            raise InputError(f"holds sample {recording.sample}", where=where, expected=f"sample {sample}")
        return recording

    def scan(self, samples: Sequence[int]) -> pl.LazyFrame:
        """One lazy scan over those files."""
        files = [self._at(_name(sample)) for sample in samples]
        sources = files if self._is_local else [self._files.cat_file(file) for file in files]
        # Names of files, not patterns: brackets in a folder's name would match nothing, and * other folders.
        return pl.scan_parquet(sources, glob=False, hive_partitioning=False)

    def clear(self) -> None:
        """Delete all samples, and the note of what recorded them."""
        for sample in self.samples():
            self._files.rm_file(self._at(_name(sample)))
        if self._files.exists(self._at(VERSIONS)):
            self._files.rm_file(self._at(VERSIONS))

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name)


@dataclass(frozen=True)
class Recorded:
    """The statistics of a run."""

    rows: pl.LazyFrame
    """See `analyze.recording`."""
    recording: Recording
    """What all samples have in common."""
    samples: tuple[int, ...]
    place: str


def read_statistics(place: str | Path) -> Recorded:
    """The statistics in a folder or at a URL, read lazily; what the files say of themselves is checked.

    Raises InputError where there are none, a file is damaged, of another version, or not of the same
    run (model, weights, policy, seed, ...) as the first.
    """
    storage = Storage(place)
    samples = storage.samples()
    if not samples:
        raise InputError(
            "holds no statistics",
            where=storage.place,
            expected="files sample-NNNN.parquet",
            hint="Record them with: forcingkv analyze heads",
        )
    first = storage.recording(samples[0]).common()
    for sample in samples[1:]:
        check_same(storage.recording(sample).common(), first, storage.path(sample))
    return Recorded(storage.scan(samples), first, tuple(samples), storage.place)


def check_same(found: Recording, wanted: Recording, where: str) -> None:
    """Raise InputError, naming what differs, unless two recordings are of one run."""
    if found == wanted:
        return
    differing = [name for name in vars(wanted) if getattr(found, name) != getattr(wanted, name)]
    name = differing[0]
    expected, instead = (one.recorded if name == "passes" else getattr(one, name) for one in (wanted, found))
    of_model = f" (the model {found.model.name})" if name in ("model", "spec") else ""
    raise InputError(
        f"is of another run: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}{of_model}",
        where=where,
        expected=f"{name} {shown(expected, 80)}, not {shown(instead, 80)}",
        hint="Choose another folder, or measure everything anew with --restart.",
    )


def collect(rows: pl.LazyFrame, place: str) -> pl.DataFrame:
    """Run a query over statistics. Raises InputError for a file that turns out to be damaged."""
    try:
        return rows.collect()
    except (OSError, PolarsError) as error:
        raise _damaged(place, error) from error


def by_frame(rows: pl.DataFrame) -> tuple[Ints, Ints, npt.NDArray[np.float64]]:
    """Each key frame of each row, one after the other: the row's index, the frame, and the mass on it."""
    lengths = rows["key_frame"].list.len().to_numpy()
    frames, mass = (rows[name].explode().to_numpy() for name in ("key_frame", "mass"))
    return np.repeat(np.arange(len(rows)), lengths), frames.astype(np.int64), mass.astype(np.float64)


def _damaged(where: str, error: Exception) -> InputError:
    return InputError(
        f"cannot be read ({first_line(error)})",
        where=where,
        expected="a whole Parquet file",
        hint="Delete it, and run the analysis again: that sample is then recorded anew.",
    )


def _name(sample: int) -> str:
    return f"sample-{sample:04d}.parquet"


def _installed() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in MEASURING}


def _listed(versions: object) -> str:
    if not isinstance(versions, dict):
        return shown(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items())
