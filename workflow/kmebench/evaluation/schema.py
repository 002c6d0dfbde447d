"""Columns of the prediction files: one source of names, order and types."""

from pathlib import Path

import pyarrow as pa

from kmebench.errors import KMEBenchError

IDS = pa.list_(pa.int32())

_PROMPT = [
    ("case_id", pa.string()),
    ("position", pa.int32()),
    ("kind", pa.string()),
    ("prompt", pa.string()),
    ("target", pa.string()),
    ("target_ids", IDS),
]

#: The unedited model: original/{model}/{dataset}.parquet.
ORIGINAL = pa.schema(
    [
        *_PROMPT,
        ("ids", IDS),
        ("target_new_logprob", pa.float32()),
        ("target_true_logprob", pa.float32()),
        ("free_ids", IDS),
        ("wild", pa.string()),
    ]
)

#: A run: runs/.../predictions.parquet.
PREDICTIONS = pa.schema(
    [
        *_PROMPT,
        ("when", pa.string()),
        ("edits_done", pa.int32()),
        ("batch", pa.int32()),
        ("before_ids", IDS),
        ("after_ids", IDS),
        ("target_new_logprob_before", pa.float32()),
        ("target_new_logprob_after", pa.float32()),
        ("target_true_logprob_before", pa.float32()),
        ("target_true_logprob_after", pa.float32()),
        ("free_before_ids", IDS),
        ("free_after_ids", IDS),
        ("wild_before", pa.string()),
        ("wild_after", pa.string()),
    ]
)


#: What each call of an editor changed: runs/.../norms.parquet, a row for each parameter.
NORMS = pa.schema(
    [
        ("call", pa.int32()),
        ("requests", pa.int32()),
        ("parameter", pa.string()),
        ("norm", pa.float32()),  # Frobenius
    ]
)


def check_columns(found: pa.Schema, expected: pa.Schema, path: str | Path) -> None:
    """Refuse a file that lacks a column or has one of another type.

    Raises:
        KMEBenchError: names the file and the column.
    """
    for field in expected:
        if field.name not in found.names:
            raise KMEBenchError(
                f"{path} has no column {field.name!r}; it was made by another version: delete it "
                "and run the workflow again."
            )
        # Lists differ in the name of their items from writer to writer; the values count.
        kind = found.field(field.name).type
        if not (kind.equals(field.type) or (pa.types.is_list(kind) and field.type == IDS)):
            raise KMEBenchError(
                f"{path}: the column {field.name!r} is {kind}, expected {field.type}; delete the "
                "file and run the workflow again."
            )
