"""Files that were damaged after they were written are set aside, never trusted."""

import json

import pandas as pd
import pyarrow as pa
import pytest
import torch

from kmebench.evaluation.frames import write_frame
from kmebench.io.checked_files import DamagedFileError, read_json, read_parquet, users_own
from kmebench.io.tensors import TensorFile, write_tensors

FORM = "test.v1"


def flip(path, place):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def tensors(path):
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(2, 2).bfloat16()}, FORM, {"x": 1})


def test_tensors_and_facts_come_back_and_bytes_repeat(tmp_path):
    tensors(tmp_path / "one")
    tensors(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    file = TensorFile.open(tmp_path / "one", FORM)
    assert file.facts == {"x": 1}
    assert torch.equal(file.tensor("a"), torch.arange(5.0))
    assert torch.equal(file.tensor("b"), torch.ones(2, 2).bfloat16())


@pytest.mark.parametrize("place", [-1, -9, -20])
def test_every_flipped_bit_of_a_tensor_is_found(place, tmp_path):
    path = tmp_path / "file"
    tensors(path)
    flip(path, place)
    file = TensorFile.open(path, FORM)
    with pytest.raises(DamagedFileError, match=r"file is damaged \(the checksum of [ab] differs\)"):
        [file.tensor(name) for name in file.digests]
    assert not path.exists()
    assert (tmp_path / "file.damaged").exists()


def parquet(path):
    schema = pa.schema([("x", pa.int64()), ("word", pa.string())])
    rows = pd.DataFrame({"x": range(1000), "word": [f"word {i}" for i in range(1000)]})
    write_frame(rows, schema, path)


def record(path):
    path.write_text(json.dumps({"seconds": 1.0}))


READERS = [
    (tensors, lambda path: TensorFile.open(path, FORM).tensor("a")),
    (parquet, read_parquet),
    (record, read_json),
]


@pytest.mark.parametrize(("write", "read"), READERS)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten"])
def test_a_file_that_cannot_be_parsed_is_set_aside(write, read, damage, tmp_path):
    path = tmp_path / "file"
    write(path)
    read(path)
    whole = path.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "emptied": b"", "overwritten": b"\xff" * 64}
    path.write_bytes(broken[damage])
    with pytest.raises(DamagedFileError, match=r"set aside as .*file\.damaged; run the same"):
        read(path)
    assert not path.exists()
    assert (tmp_path / "file.damaged").read_bytes() == broken[damage]


def test_a_flipped_bit_of_a_table_is_found(tmp_path):
    path = tmp_path / "file"
    parquet(path)
    flip(path, 200)  # in the compressed values of the first column
    with pytest.raises(DamagedFileError, match=r"file is damaged"):
        read_parquet(path)


@pytest.mark.parametrize("read", [read_parquet, read_json])
def test_a_missing_file_is_no_damage(read, tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "file")


def test_a_damaged_file_of_a_users_stays_where_and_as_it_is(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("{")
    with users_own(mine, None), pytest.raises(DamagedFileError, match=r"mine\.json is damaged \("):
        read_json(mine)
    assert mine.read_text() == "{"
    with pytest.raises(DamagedFileError, match="set aside"):
        read_json(mine)
    assert not mine.exists()
