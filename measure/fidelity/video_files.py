"""What is measured of video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import measure_pair, measure_video
from forcingkv.runtime.video_reader import open_video


def measure_file(path: Path, reference: Path | None, layout: ChunkLayout, top: int | None) -> dict[str, Any]:
    """The numbers of a video file, for JSON: of `measure_video`, and with a reference of `measure_pair`.

    Raises InputError where a file cannot be read, or the two differ in size or length.
    """
    with open_video(path) as (fps, frames):
        data = measure_video(frames, layout, fps, top=top, where=str(path))
    data |= {"video": str(path), "fps": fps}
    if reference is not None:
        with open_video(path) as (_, frames), open_video(reference) as (_, others):
            pair = measure_pair(frames, others, where=str(path))
        data |= pair | {"reference": str(reference), "values": pair["values"] | data["values"]}
    return data
