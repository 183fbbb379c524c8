"""Statistics that somebody changed: rows of what there is not, or without a value, are no evidence."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from forcingkv.analyze import Job, record_samples
from forcingkv.analyze.recording import METADATA_KEY
from forcingkv.analyze.scores import observe
from forcingkv.analyze.scoring import Scoring
from forcingkv.analyze.storage import read_statistics
from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.text import encode_words
from tests.conftest import small_spec

SPEC = small_spec()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stats")
    job = Job(SPEC, random_weights(SPEC), [encode_words(SPEC, "a b")], seed=5, chunks=4)
    record_samples(job, place, samples=1)
    return place / "sample-0000.parquet"


CHANGES = {
    "has rows without a layer": pl.lit(None, pl.Int32()).alias("layer"),
    "has rows without a mass": pl.lit(None, pl.List(pl.Float32)).alias("mass"),
    "has rows without a key_frame": pl.col("key_frame")
    .list.eval(pl.lit(None, pl.Int32()))
    .alias("key_frame"),
    "has a row of the layer 4; expected 0 to 3": pl.col("layer") + 1,
    "has a row of the head -1; expected 0 to 2": pl.col("head") - 1,
    "has a row of the step 2; expected 0 to 1": pl.col("step") + 1,
    "has a row of the query_frame 102; expected 0 to 2": pl.col("query_frame") + 100,
    "has a row of the key_frame 1011; expected 0 to 11": pl.col("key_frame").list.eval(pl.element() + 1000),
    "has a row of the key_frame -1; expected 0 to 11": pl.col("key_frame").list.eval(pl.element() - 1),
    "has a row with more frames than masses": pl.col("mass").list.head(2),
}


@pytest.mark.parametrize("message", CHANGES)
def test_rows_of_what_there_is_not_are_refused(message: str, recorded: Path, tmp_path: Path) -> None:
    rows, metadata = pl.read_parquet(recorded), pl.read_parquet_metadata(recorded)
    changed = rows.with_columns(CHANGES[message].cast(rows.schema[CHANGES[message].meta.output_name()]))
    changed.write_parquet(tmp_path / recorded.name, metadata={METADATA_KEY: metadata[METADATA_KEY]})
    assert observe(read_statistics(recorded.parent), Scoring()).scores.size
    with pytest.raises(InputError, match=message):
        observe(read_statistics(tmp_path), Scoring())
