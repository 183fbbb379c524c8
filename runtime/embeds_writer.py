"""A file of text embeddings that grows prompt by prompt, and is gone on with where it was left.

Encoding takes seconds a prompt, so what was encoded is kept, whatever happens: the file has a temporary name
until it is whole, its header (prompts, encoder, shapes) is written first, and embeddings follow in order. A
temporary file with another header is of another command, and begun anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.renames import sync_folder
from forcingkv.headmaps.writing import (
    OURS,
    check_file,
    held_alone,
    parents_of,
    place_to_write,
    stem_of,
    unwritable_where,
)
from forcingkv.runtime.tensors import StoredTensor, file_start, read_header
from forcingkv.runtime.text import SCHEMA, embeds_metadata


class GrowingEmbeds:
    """Takes the embeddings of a file's prompts, in order.

    Attributes:
        done: how many are in the file, those of an earlier run among them.
        begun_anew: whether there was an unfinished file of another command, which is gone.
    """

    def __init__(self, file: BinaryIO, tensors: Sequence[StoredTensor], done: int, begun_anew: bool) -> None:
        self._file, self._tensors = file, tensors
        self.done, self.begun_anew = done, begun_anew

    def write(self, array: npt.NDArray[np.float32]) -> None:
        """Write the next embedding, (tokens, text_width) of the planned shape, and have the disk hold it.

        Raises ValueError for one of another shape, or one too many.
        """
        if self.done == len(self._tensors) or array.shape != self._tensors[self.done].shape:
            raise ValueError(f"embedding {self.done} of {len(self._tensors)} has the shape {array.shape}")
        self._file.write(np.ascontiguousarray(array, "<f4").tobytes())
        self._file.flush()
        # The length of the file says what is done: bytes first, then those of the next prompt.
        os.fsync(self._file.fileno())
        self.done += 1


@contextmanager
def growing_embeds(
    path: Path,
    prompts: Sequence[str],
    cleaned: Sequence[str],
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    model_text: Mapping[str, Any],
) -> Iterator[GrowingEmbeds]:
    """A file of text embeddings to be written one by one, or the rest of one that was left unfinished.

    Args:
        path: the file. It is there when the block ends well; else what is done stays beside it, hidden.
        prompts, cleaned, tokens: as in `embeds_metadata`.
        shapes: of each embedding, (tokens, text_width).
        model_text: what makes them. An unfinished file is gone on with only if all of this is the same.

    Raises InputError where another process is writing the file, or it cannot be written, ValueError where the
    block ends without all embeddings.
    """
    planned = {f"embeds.{place}": ("F32", tuple(shape)) for place, shape in enumerate(shapes)}
    start, tensors = file_start(planned, embeds_metadata(prompts, cleaned, tokens, model_text), str(path))
    place = place_to_write(path)
    partial = unfinished(place)
    with unwritable_where(path, place), parents_of(place), held_alone(place):
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            growing = _gone_on_with(file, start, list(tensors.values()))
            try:
                yield growing
            finally:
                if not growing.done:
                    partial.unlink()
            if growing.done < len(tensors):
                raise ValueError(f"{len(tensors) - growing.done} embeddings were not written")
        os.replace(partial, place)
        sync_folder(place.parent)


def unfinished(place: Path) -> Path:
    """The file beside a place that what is done is kept in, from run to run."""
    return place.with_name(f".{stem_of(place.name)}.growing{OURS}")


def _gone_on_with(file: BinaryIO, start: bytes, tensors: Sequence[StoredTensor]) -> GrowingEmbeds:
    """The file behind the last embedding that is whole; behind its header where it is of another command."""
    size = os.fstat(file.fileno()).st_size
    same = file.read(len(start)) == start
    if not same:
        file.seek(0)
        file.write(start)
    ends = [tensor.offset + tensor.bytes for tensor in tensors]
    done = sum(end <= size for end in ends) if same else 0
    file.seek(ends[done - 1] if done else len(start))
    file.truncate()
    return GrowingEmbeds(file, tensors, done, begun_anew=bool(size) and not same)


def check_place(path: Path) -> None:
    """Raise InputError unless `growing_embeds` can write there now, and replaces nothing but such a file."""
    check_file(path)
    place = place_to_write(path)
    if place.exists() and place.stat().st_size:
        try:
            is_ours = read_header(place)[1].get("schema") == SCHEMA
        except InputError:
            is_ours = False
        if not is_ours:
            what, expected = "is there, and would be replaced", "a new file, or one of embeddings"
            raise InputError(what, where=str(path), expected=expected, hint="Choose another --out.")
