"""Rows and the bytes behind references, in containers that the reference writers made; local and through fsspec."""

import io
import json
import tarfile

import fsspec
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evlm_jax.data import video
from evlm_jax.data.containers import files, rows, tar
from evlm_jax.data.containers.tar import Tar, headers
from evlm_jax.data.features import content_key
from evlm_jax.data.image import ImageError, load
from evlm_jax.data.samples import ImageRef, SampleError
from evlm_jax.data.source import Source
from tests.data.test_images import write_video


def png(number: int) -> bytes:
    """A picture of one colour that tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def shows(ref: str) -> int:
    """The number of the picture behind a reference, as training would load it."""
    return int(load(ImageRef(ref), 8, "squash")[0, 0, 0])


def write_tar(path, numbers, **more):
    with webdataset.TarWriter(str(path)) as writer:
        for i in numbers:
            writer.write({"__key__": f"{i:05d}", "png": png(i), "txt": f"picture {i}", "json": {"similarity": i / 10}, **more})
    return str(path)


def test_tar_rows_are_those_of_webdataset(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(7))
    found = rows.open_rows(path)
    expected = list(webdataset.WebDataset(path, shardshuffle=False))
    assert len(found) == len(expected) == 7
    for i in (3, 0, 6, 1, 2, 4, 5):
        row, theirs = found[i], expected[i]
        assert (row["__key__"], row["txt"], row["json"]) == (theirs["__key__"], theirs["txt"].decode(), json.loads(theirs["json"]))
        with rows.open_ref(row["png"]) as file:
            assert file.read() == theirs["png"]
        assert shows(row["png"]) == i


def test_tar_with_folders_dots_and_other_members(tmp_path):
    names = ["deep/a.b.seg.png", "deep/a.JPG", "deep/b.JPG", ".hidden.jpg", "README", "deep/ü " + "x" * 120 + ".jpg", "deep/c::d.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
    found = Tar(str(tmp_path / "a.tar"))
    assert [row["__key__"] for row in found] == ["deep/a", "deep/b", "deep/ü " + "x" * 120, "deep/c::d"]
    assert {field: shows(ref) for field, ref in found[0].items() if field != "__key__"} == {"b.seg.png": 0, "jpg": 1}
    assert [shows(found[i]["jpg"]) for i in (1, 2, 3)] == [2, 5, 6]


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_members_are_those_of_tarfile(kind, data):
    """Regular files, folders, links; short and long names, any characters that the format takes; sizes around whole blocks."""
    letters = "ab./ " if kind == "ustar" else "ab./ ü中="
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind], pax_headers={"comment": "x"} if kind == "pax" else None) as archive:
        for _ in range(data.draw(st.integers(1, 6))):
            name = data.draw(st.text(letters, min_size=1, max_size=9)) + "x"
            long = data.draw(st.sampled_from([0, 0, 20, 80]))
            member = tarfile.TarInfo("/".join([name] * (1 + long // 10)) if kind != "ustar" or long < 80 else "d" * 90 + "/" + name)
            member.type = data.draw(st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]))
            member.linkname = "a" * long
            member.mtime = 1.5 if data.draw(st.booleans()) and kind == "pax" else 1
            member.size = data.draw(st.sampled_from([0, 1, 511, 512, 513, 2000])) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(b"z" * member.size))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(headers(buffer)) == expected


def test_other_headers(tmp_path):
    """Sizes in base 256, as GNU writes them beyond 8 GB; sparse files; padding behind the end."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    block = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match="the file ends within big.jpg"):
        list(headers(io.BytesIO(block)))
    info.size, info.type = 0, tarfile.GNUTYPE_SPARSE
    with pytest.raises(ValueError, match="big.jpg is sparse"):
        list(headers(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT))))
    info.type = tarfile.REGTYPE
    content = info.tobuf(tarfile.USTAR_FORMAT)
    assert list(headers(io.BytesIO(content + bytes(5000) + b"x" * 999))) == [("big.jpg", 512, 0)]
    with pytest.raises(ValueError, match="no mark of its end"):
        list(headers(io.BytesIO(content)))
    for said in (b"0 a=b\n", b"-9 path=b\n", b"3 \n"):
        extended = tarfile.TarInfo("x")
        extended.type, extended.size = tarfile.XHDTYPE, len(said)
        with pytest.raises(ValueError, match="a header says that it has (0|-9|3) bytes|no mark of its end"):
            list(headers(io.BytesIO(extended.tobuf(tarfile.USTAR_FORMAT) + said + bytes(512 - len(said)))))
    with pytest.raises(ValueError, match="no header at byte 512"):
        list(headers(io.BytesIO(content + b"x" * 512)))


def test_damaged_tars_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(4))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:2000])
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("cut.tar", "empty.tar"):
        with pytest.raises(ValueError, match=f"{name}: cannot read the file"):
            rows.open_rows(str(tmp_path / name))
    start = content.index(b'{"similarity": 0.2')
    (tmp_path / "a.tar").write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(SampleError, match=r"00002.json: .*a.tar: row 3"):
        Source("s", rows.open_rows(path), dict, where=path)[2]
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match="a.jpg comes twice"):
        rows.open_rows(str(tmp_path / "twice.tar"))[0]


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
    """Columns of all kinds, pictures as in the Image feature of Hugging Face datasets, row groups of 3."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    picture = lambda i: {"bytes": png(i), "path": f"{i}.png"}
    columns = {
        "key": pa.array([f"k{i}" for i in range(8)]),
        "jpg": pa.array([png(i) for i in range(8)], pa.binary()),
        "image": pa.array([picture(10 + i) for i in range(8)], image),
        "images": pa.array([[picture(20 + i + j) for j in range(i % 3)] for i in range(8)], pa.list_(image)),
        "odd/name::of%it": pa.array([png(30 + i) for i in range(8)], pa.binary()),
        "bare": pa.array([[png(40 + i)] * (i % 2) for i in range(8)], pa.list_(pa.binary())),
        "boxes": pa.array([[[0.5 * i, 1.0]] for i in range(8)], pa.list_(pa.list_(pa.float64()))),
        "qa": pa.array([[{"q": f"q{i}", "a": None}] for i in range(8)], pa.list_(pa.struct([("q", pa.string()), ("a", pa.string())]))),
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def test_parquet_rows(tmp_path):
    found = rows.open_rows(write_parquet(tmp_path / "a.parquet"))
    expected = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(found) == len(expected) == 8
    for i in (7, 0, 3, 5):
        row = found[i]
        for name in ("key", "boxes", "qa"):
            assert row[name] == expected[i][name]
        assert row["image"]["path"] == expected[i]["image"]["path"]
        assert [shows(row[name]) for name in ("jpg", "odd/name::of%it")] == [i, 30 + i] and shows(row["image"]["bytes"]) == 10 + i
        assert [shows(ref) for ref in row["bare"]] == [40 + i] * (i % 2)
        assert [shows(image["bytes"]) for image in row["images"]] == [20 + i + j for j in range(i % 3)]


def test_pictures_are_not_read_with_their_rows(tmp_path, monkeypatch):
    found = rows.open_rows(write_parquet(tmp_path / "a.parquet"))
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1:]) or original(*a, **k))
    row = found[4]
    assert [group for group, _ in read] == [1] and not [name for name in read[0][1] if "bytes" in name or name == "jpg"]
    assert shows(row["jpg"]) == 4 and read[1] == (1, ["jpg"])


def test_empty_cells_and_broken_parquet(tmp_path):
    table = pa.table({"key": ["a"], "jpg": pa.array([None], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"parquet://0/jpg::.*a.parquet.*the cell is empty"):
        shows(rows.open_rows(str(tmp_path / "a.parquet"))[0]["jpg"])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="b.parquet: cannot read the file"):
        rows.open_rows(str(tmp_path / "b.parquet"))


# What tensorflow.org's guide to TFRecord prints for feature0 = 0, feature1 = 4, feature2 = b"goat", feature3 = 0.9876.
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
    assert found[2] == {"feature0": 0, "feature1": 4, "feature2": "goat", "feature3": pytest.approx(0.9876)}
    for i in (3, 4):
        with pytest.raises(SampleError, match=f"a.array_record: row {i + 1}"):
            Source("s", found, dict, where=path)[i]
    (tmp_path / "b.array_record").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.array_record: cannot read"):
        rows.open_rows(str(tmp_path / "b.array_record"))
    with pytest.raises(ValueError, match="local disks only"):
        rows.open_rows("memory://a.array_record")


@pytest.fixture
def store(tmp_path):
    """A copy of local files in fsspec's memory."""
    memory = fsspec.filesystem("memory")

    def put(path):
        memory.pipe(f"/store/{path.name}", path.read_bytes())
        return f"memory:///store/{path.name}"

    yield put
    memory.store.clear()


def test_remote_containers_read_the_same(tmp_path, store):
    write_tar(tmp_path / "a.tar", range(5))
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    for name in ("a.tar", "a.parquet", "a.jsonl"):
        local, far = rows.open_rows(str(tmp_path / name)), rows.open_rows(store(tmp_path / name))
        there = lambda value: json.loads(
            json.dumps(value).replace("memory:///store", str(tmp_path)).replace("memory://store", str(tmp_path))
        )
        assert len(far) > 1 and [there(row) for row in far] == list(local)
    far = rows.open_rows("memory:///store/a.tar")
    assert [shows(row["png"]) for row in far] == [0, 1, 2, 3, 4]
    assert content_key(ImageRef(far[1]["png"])) == content_key(ImageRef(rows.open_rows(str(tmp_path / "a.tar"))[1]["png"]))
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
    tars = [f"{tmp_path}/00000.tar", f"{tmp_path}/00001.tar"]  # img2dataset's table and statistics lie beside its tars
    assert rows.find(str(tmp_path)) == rows.find(f"{tmp_path}/*.tar") == tars
    assert rows.find(f"{tmp_path}/00000.parquet") == [f"{tmp_path}/00000.parquet"]
    assert rows.find("memory:///store") == ["memory:///store/00000.tar", "memory:///store/00001.tar"]
    for path in (f"{tmp_path}/nowhere", f"{tmp_path}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="nowhere|jsonl"):
            rows.find(path)


def test_a_video_in_a_tar(tmp_path):
    film = write_video(tmp_path / "v.mp4", seconds=4, fps=5)
    path = write_tar(tmp_path / "a.tar", [0], mp4=film.read_bytes())
    ref = rows.open_rows(path)[0]["mp4"]
    np.testing.assert_array_equal(video.decode(ref, [0.3, 2.5]), video.decode(film, [0.3, 2.5]))
    assert [r.frame for r in video.uniform(ref, 4)] == [r.frame for r in video.uniform(film, 4)]
