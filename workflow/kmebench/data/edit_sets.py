"""Data files of edit records, as they are published or written by hand, to edit requests."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from kmebench.data.forms import Twice, parse
from kmebench.data.records import BadRecord, EditRequest
from kmebench.errors import DataError

#: How compressed files begin: gzip, zip, bzip2, xz, zstd.
_PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLANKS = re.compile(r"[ \t\n\r]*")  # of JSON
#: What a parser cannot read at the end of JSON that is cut off inside a word, number or escape.
_CUT = re.compile(r"t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|[eE][-+]?|\\?u?[0-9a-fA-F]{0,4}")


def read_records(
    path: str | Path, schema: str, on_bad_record: str = "error", name: str | None = None
) -> tuple[list[tuple[int, EditRequest]], list[BadRecord]]:
    """Read an edit set: a JSON list or JSON lines, in a form of :data:`~.forms.SCHEMAS`.

    ``name`` is what messages call the file (its path by default). Returns the usable records
    with their index in the file, and the bad ones (``on_bad_record="skip"``).

    Raises:
        DataError: the file is no such list, or (``"error"``) a record is bad; names file,
            index, case_id and key.
    """
    name = str(path if name is None else name)
    records, bad, seen = [], [], set()
    for index, raw in enumerate(_raw_records(path, name)):
        try:
            request = parse(raw, schema, index)
            if request.case_id in seen:
                raise ValueError("its case_id stands in the file twice")
            seen.add(request.case_id)
            records.append((index, request))
        except ValueError as error:
            given = raw.get("case_id") if isinstance(raw, dict) else None
            case_id = given if isinstance(given, str) else str(index)
            case_id = case_id.encode(errors="backslashreplace").decode()
            bad.append(BadRecord(index, case_id, str(error)))
            if on_bad_record == "error":
                raise DataError(
                    f"{name}: record {index} (case_id {case_id}) cannot be used: {error}; mend "
                    "the file, or set on_bad_record: skip for this data set."
                ) from error
    return records, bad


def _raw_records(path: str | Path, name: str) -> list[Any]:
    """Return the records of a JSON list, or of JSON lines, as they stand there."""
    text = _decoded(Path(path).read_bytes(), name)
    if not text.strip():
        raise DataError(f"{name} is empty, expected a list of records, or a record on each line.")
    try:
        values = _json_values(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}){_hint(text, error)}."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply, expected a list of records.") from error
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    if len(values) == 1 and not isinstance(values[0], dict):
        raise DataError(f"{name} holds neither a list of records nor a record on each line.")
    return values


def _decoded(content: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    if content.startswith(_PACKED):
        raise DataError(f"{name} is a compressed file; unpack it.")
    # JSON begins with a character of ASCII, which UTF-16 and UTF-32 fill up with zeros.
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        raise DataError(f"{name} is UTF-16 or UTF-32 text; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error


def _json_values(text: str) -> list[Any]:
    """Parse one JSON value after another; numbers become texts, as they are written."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, object_pairs_hook=_record)
    values: list[Any] = []
    place = _after_blanks(text, 0)
    while not values or place < len(text):
        value, place = decoder.raw_decode(text, place)
        values.append(value)
        place = _after_blanks(text, place)
    return values


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; plain JSON would lose the first value of a key that stands twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        record |= {key: Twice() for key, count in counts.items() if count > 1}
    return record


def _after_blanks(text: str, place: int) -> int:
    blanks = _BLANKS.match(text, place)
    return blanks.end() if blanks else place


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """Say what is wrong with the text, if that is clear."""
    here = text[error.pos : error.pos + 1]
    if _ends_early(text[error.pos :], error):
        return "; it ends early and may be truncated"
    before_end = here in ("]", "}") and text[: error.pos].rstrip().endswith(",")
    if before_end or (here == "," and "delimiter" not in error.msg):  # between lines of JSON lines
        return "; take out the comma"
    if error.pos == _after_blanks(text, 0):
        return "; it must hold a list of records, or a record on each line"
    return ""


def _ends_early(rest: str, error: json.JSONDecodeError) -> bool:
    """Say whether the text stops where JSON, valid so far, would go on."""
    unfinished = error.msg.startswith("Unterminated string")
    return unfinished or _CUT.fullmatch(rest.rstrip()) is not None
