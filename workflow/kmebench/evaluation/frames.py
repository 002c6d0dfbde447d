"""Predictions as tables on disk: the unedited model's, and a run's with both beside it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kmebench.data.records import EditRequest
from kmebench.errors import DataError
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt, prompts_of
from kmebench.evaluation.schema import ORIGINAL
from kmebench.io.checked_files import read_parquet
from kmebench.io.files import atomic_path
from kmebench.io.parts import Parts
from kmebench.models.editable import EditableModel

#: What identifies a prompt of a request.
KEY = ["case_id", "kind", "prompt", "target"]
#: Columns that exist before and after an edit.
_PREDICTED = ["ids", "target_new_logprob", "target_true_logprob", "free_ids", "wild"]
_REQUESTS_AT_ONCE = 50


def predicted_frame(
    model: EditableModel, prompts: Sequence[Prompt], settings: Settings, *, decode: bool
) -> pd.DataFrame:
    """Predict prompts; one row each."""
    shown = pd.DataFrame([asdict(p) for p in prompts]).drop(columns=["target_new", "target_true"])
    columns = predict(model, prompts, settings, decode=decode)
    return shown.assign(**{name: pd.Series(values) for name, values in columns.items()})


def original_frame(
    model: EditableModel, requests: Sequence[EditRequest], settings: Settings, first: int = 0
) -> pd.DataFrame:
    """Predict every prompt of ``requests``, of which the first is number ``first``."""
    numbered = enumerate(requests, start=first)
    prompts = [prompt for position, r in numbered for prompt in prompts_of(r, position)]
    return predicted_frame(model, prompts, settings, decode=True)


def write_original(
    parts: Parts, model: EditableModel, requests: Sequence[EditRequest], settings: Settings
) -> None:
    """Write what the unedited model says of every prompt, going on behind ``parts``."""

    def write(path: Path, items: slice) -> None:
        frame = original_frame(model, requests[items], settings, items.start)
        write_frame(frame, ORIGINAL, path)

    what = "prompts of the unedited model"
    files = parts.files(len(requests), _REQUESTS_AT_ONCE, write, what)
    frame = pd.concat([read_parquet(file) for file in files], ignore_index=True)
    write_frame(frame, ORIGINAL, parts.path)
    parts.clear()


def beside_original(
    after: pd.DataFrame, original: pd.DataFrame, file: str | Path = "its predictions"
) -> pd.DataFrame:
    """Join a run's predictions ("after") with the unedited model's ("before").

    Raises:
        DataError: a prompt of the run was never asked of the unedited model; names the ``file`` of
            its predictions.
    """
    # A record may hold the same prompt twice; its prediction is the same.
    before = original[[*KEY, *_PREDICTED]].drop_duplicates(KEY)
    joined = after.merge(before, on=KEY, how="left", suffixes=("_after", "_before"), validate="m:1")
    missing = joined["ids_before"].isna()
    if missing.any():
        row = joined[missing].iloc[0]
        raise DataError(
            f"The unedited model has no prediction for {row['kind']} prompt {row['prompt']!r} of "
            f"request {row['case_id']!r}; delete {file} and run the workflow again."
        )
    columns = {f"{name}_{state}": _renamed(name, state) for name in _PREDICTED for state in STATES}
    return joined.rename(columns=columns)


#: Of the model: unedited, edited.
STATES = ("before", "after")


def _renamed(name: str, state: str) -> str:
    """``free_ids`` -> ``free_before_ids``; ``wild`` -> ``wild_before``."""
    stem, _, last = name.rpartition("_")
    if last != "ids":
        return f"{name}_{state}"
    return f"{stem}_{state}_ids" if stem else f"{state}_ids"


def write_frame(frame: pd.DataFrame, schema: pa.Schema, path: str | Path) -> None:
    """Write a table of predictions: fixed columns and types, so equal rows give equal bytes."""
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(None),
            temporary,
            compression="zstd",
            write_page_checksum=True,
        )
