"""Rows and the bytes behind references, in containers that the reference writers made; local and
through fsspec.
"""

import json
import os

import fsspec
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from evlm_jax.data import video
from evlm_jax.data.containers import files, footer, rows, tar
from evlm_jax.data.features import content_key
from evlm_jax.data.image import ImageError
from evlm_jax.data.samples import ImageRef, SampleError
from evlm_jax.data.source import Source
from tests.data.made import png, shows, write_tar
from tests.data.test_images import write_video


def test_indices_of_large_files_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SMALL", 0)
    path = write_tar(tmp_path / "a.tar", range(3))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": "ü"}', "utf-8")
    first = [*rows.open_rows(path)], [*rows.open_rows(str(tmp_path / "a.jsonl"))]
    monkeypatch.setattr(tar, "headers", None)  # the index is not made again
    assert ([*rows.open_rows(path)], [*rows.open_rows(str(tmp_path / "a.jsonl"))]) == first
    assert [row["a"] for row in first[1]] == [1, "ü"]
    monkeypatch.undo()
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SMALL", 0)
    write_tar(tmp_path / "a.tar", range(5))
    assert len(rows.open_rows(path)) == 5
    assert len(list((tmp_path / "cache/index").iterdir())) == 3


def write_parquet(path):
    """Columns of all kinds, pictures as in the Image feature of Hugging Face datasets, row groups
    of 3.
    """
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def picture(i):
        return {"bytes": png(i), "path": f"{i}.png"}

    columns = {
        "key": pa.array([f"k{i}" for i in range(8)]),
        "jpg": pa.array([png(i) for i in range(8)], pa.binary()),
        "image": pa.array([picture(10 + i) for i in range(8)], image),
        "images": pa.array(
            [[picture(20 + i + j) for j in range(i % 3)] for i in range(8)], pa.list_(image)
        ),
        "odd/name::of%it": pa.array([png(30 + i) for i in range(8)], pa.binary()),
        "bare": pa.array([[png(40 + i)] * (i % 2) for i in range(8)], pa.list_(pa.binary())),
        "boxes": pa.array([[[0.5 * i, 1.0]] for i in range(8)], pa.list_(pa.list_(pa.float64()))),
        "qa": pa.array(
            [[{"q": f"q{i}", "a": None}] for i in range(8)],
            pa.list_(pa.struct([("q", pa.string()), ("a", pa.string())])),
        ),
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def test_ranges_are_whole_where_the_system_reads_less_at_once(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(
        files.os, "pread", lambda file, size, start: pread(file, min(size, 7), start)
    )  # as Linux does at 2 GiB
    assert files.read_range(str(tmp_path / "a"), 3, 50) == bytes(range(3, 53))
    assert files.read_range(str(tmp_path / "a"), 3, 0) == b""
    with pytest.raises(ValueError, match="the file ends before byte 101"):
        files.read_range(str(tmp_path / "a"), 51, 50)


def test_a_file_that_was_replaced_is_read_anew_by_who_opens_it(tmp_path):
    """And what was opened before keeps to the file that its places are of."""
    before = rows.open_rows(write_tar(tmp_path / "a.tar", range(3)))
    assert (first := before[0])["txt"]
    write_tar(tmp_path / "b.tar", range(7, 12))
    os.replace(tmp_path / "b.tar", tmp_path / "a.tar")
    assert before[0] == first
    after = rows.open_rows(str(tmp_path / "a.tar"))
    assert len(after) == 5 and after[0] != first and rows.open_ref(after[0]["png"]).read() == png(7)


def test_parquet_rows(tmp_path):
    found = rows.open_rows(write_parquet(tmp_path / "a.parquet"))
    expected = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(found) == len(expected) == 8
    for i in (7, 0, 3, 5):
        row = found[i]
        for name in ("key", "boxes", "qa"):
            assert row[name] == expected[i][name]
        assert row["image"]["path"] == expected[i]["image"]["path"]
        assert [shows(row[name]) for name in ("jpg", "odd/name::of%it")] == [i, 30 + i] and shows(
            row["image"]["bytes"]
        ) == 10 + i
        assert [shows(ref) for ref in row["bare"]] == [40 + i] * (i % 2)
        assert [shows(image["bytes"]) for image in row["images"]] == [
            20 + i + j for j in range(i % 3)
        ]


def test_pictures_are_not_read_with_their_rows(tmp_path, monkeypatch):
    found = rows.open_rows(write_parquet(tmp_path / "a.parquet"))
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1:]) or original(*a, **k)
    )
    row = found[4]
    assert [group for group, _ in read] == [1] and not [
        name for name in read[0][1] if "bytes" in name or name == "jpg"
    ]
    assert shows(row["jpg"]) == 4 and read[1] == (1, ["jpg"])


@pytest.mark.parametrize("told", [True, False, ["id", "jpg"]])
def test_null_counts_of_a_footer_are_those_of_pyarrow(tmp_path, told):
    table = pa.table(
        {
            "id": [1, None, 3, None, None],
            "jpg": [b"a", None, b"b", b"c", b"d"],
            "images": [[{"bytes": b"a", "path": None}], [], None, [{"bytes": None}], None],
            "facts": pa.array([[("a", 1)], [], None, None, []], pa.map_(pa.string(), pa.int8())),
            "flag": [True, None, False, None, True],
        }
    )
    options = {"write_statistics": told, "row_group_size": 2, "write_page_index": True}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    metadata = pq.read_metadata(tmp_path / "a.parquet")

    def stats(group, i):
        return metadata.row_group(group).column(i).statistics

    def count(found):
        return found.null_count if found is not None and found.has_null_count else None

    with open(tmp_path / "a.parquet", "rb") as file:
        assert footer.null_counts(file) == [
            [count(stats(group, i)) for i in range(metadata.num_columns)] for group in range(3)
        ]


def test_empty_cells_and_broken_parquet(tmp_path):
    table = pa.table({"key": ["a"], "jpg": pa.array([None], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows.open_rows(str(tmp_path / "a.parquet"))[0] == {"key": "a", "jpg": None}
    with pytest.raises(ImageError, match=r"parquet://0/jpg::.*a.parquet.*the cell is empty"):
        shows(f"parquet://0/jpg::{tmp_path / 'a.parquet'}")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="b.parquet: cannot read the file"):
        rows.open_rows(str(tmp_path / "b.parquet"))


# What tensorflow.org's guide to TFRecord prints for feature0 = 0, feature1 = 4, feature2 = b"goat",
# feature3 = 0.9876.
EXAMPLE = (
    b"\nR\n\x14\n\x08feature3\x12\x08\x12\x06\n\x04[\xd3|?\n\x14\n\x08feature2\x12\x08\n\x06\n\x04goat"
    b"\n\x11\n\x08feature0\x12\x05\x1a\x03\n\x01\x00\n\x11\n\x08feature1\x12\x05\x1a\x03\n\x01\x04"
)


def test_array_records(tmp_path):
    path = str(tmp_path / "a.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    records = [
        json.dumps({"id": "j"}).encode(),
        msgpack.packb({"key": "m", "jpg": png(3), "n": [1, 2]}),
        EXAMPLE,
        b"\x81\xa1",
        b"\x93\1\2\3",
    ]
    for record in records:
        writer.write(record)
    writer.close()
    found = rows.open_rows(path)
    assert len(found) == 5 and found[0] == {"id": "j"}
    assert (found[1]["key"], found[1]["n"], shows(found[1]["jpg"])) == ("m", [1, 2], 3)
    assert found[2] == {
        "feature0": 0,
        "feature1": 4,
        "feature2": "goat",
        "feature3": pytest.approx(0.9876),
    }
    for i in (3, 4):
        with pytest.raises(SampleError, match=f"a.array_record: row {i + 1}"):
            Source("s", found, dict, where=path)[i]
    (tmp_path / "b.array_record").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.array_record: cannot read"):
        rows.open_rows(str(tmp_path / "b.array_record"))


@pytest.fixture
def store(tmp_path):
    """A copy of local files in fsspec's memory."""
    memory = fsspec.filesystem("memory")

    def put(path):
        memory.pipe(f"/store/{path.name}", path.read_bytes())
        return f"memory:///store/{path.name}"

    yield put
    memory.store.clear()


def test_remote_containers_read_the_same(tmp_path, store, monkeypatch):
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", range(5))
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i in range(3):
        writer.write(msgpack.packb({"key": f"m{i}", "jpg": png(i)}))
    writer.close()
    for name in ("a.tar", "a.parquet", "a.jsonl", "a.array_record"):
        local, far = rows.open_rows(str(tmp_path / name)), rows.open_rows(store(tmp_path / name))

        def there(value):
            return json.loads(
                json.dumps(value)
                .replace("memory:///store", str(tmp_path))
                .replace("memory://store", str(tmp_path))
            )

        assert len(far) > 1 and [there(row) for row in far] == list(local)
    far = rows.open_rows("memory:///store/a.tar")
    assert [shows(row["png"]) for row in far] == [0, 1, 2, 3, 4]
    assert [shows(row["jpg"]) for row in rows.open_rows("memory:///store/a.array_record")] == [
        0,
        1,
        2,
    ]
    assert content_key(ImageRef(far[1]["png"])) == content_key(
        ImageRef(rows.open_rows(str(tmp_path / "a.tar"))[1]["png"])
    )
    (tmp_path / "x.png").write_bytes(png(9))
    assert shows(store(tmp_path / "x.png")) == 9
    with pytest.raises(ImageError, match="memory:///store/none.png"):
        shows("memory:///store/none.png")
    with pytest.raises(ImageError, match="none.png"):
        content_key(ImageRef("memory:///store/none.png"))


def test_containers_below_a_folder(tmp_path, store):
    for name in ("00001.tar", "00000.tar", "00000.parquet", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"x")
        store(tmp_path / name)
    tars = [
        f"{tmp_path}/00000.tar",
        f"{tmp_path}/00001.tar",
    ]  # img2dataset's table and statistics lie beside its tars
    assert rows.find(str(tmp_path)) == rows.find(f"{tmp_path}/*.tar") == tars
    assert rows.find(f"{tmp_path}/00000.parquet") == [f"{tmp_path}/00000.parquet"]
    assert rows.find("memory:///store") == [
        "memory:///store/00000.tar",
        "memory:///store/00001.tar",
    ]
    for path in (f"{tmp_path}/nowhere", f"{tmp_path}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="nowhere|jsonl"):
            rows.find(path)


def test_a_video_in_a_tar(tmp_path):
    film = write_video(tmp_path / "v.mp4", seconds=4, fps=5)
    path = write_tar(tmp_path / "a.tar", [0], mp4=film.read_bytes())
    ref = rows.open_rows(path)[0]["mp4"]
    np.testing.assert_array_equal(video.decode(ref, [0.3, 2.5]), video.decode(film, [0.3, 2.5]))
    assert [r.frame for r in video.sample(ref, 4)] == [r.frame for r in video.sample(film, 4)]
