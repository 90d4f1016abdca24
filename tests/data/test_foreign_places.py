"""Names and members inside foreign rows: none leads out of the data, none is read before its size
is looked at.
"""

import io
import json
import socket
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evlm_jax.data.containers import files, rows, tar, text
from evlm_jax.data.image import ImageError, decode
from evlm_jax.data.samples import RowError
from evlm_jax.data.sources import open_source
from tests.data.made import (
    pack,
    png,
    said,
    shows,
    talk,
    write_images,
    write_json,
    write_jsonl,
)


def test_downloads_that_failed_are_no_samples(tmp_path):
    status = ["success", "failed_to_download", "failed_to_resize", "success"]
    rows = {
        "key": list("abcd"),
        "caption": list("ABCD"),
        "status": status,
        "jpg": pa.array([png(0), None, None, png(3)], pa.binary()),
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(f"img2dataset:{tmp_path}/a.parquet")
    assert [(sample.key, shows(sample.refs[0].path)) for sample in source] == [
        ("a", 0),
        ("d", 3),
    ] and source.dialog_counts() == [1, 1]


OUTSIDE = (
    "http://127.0.0.1:9/a.png",
    "https://example.invalid/a.png",
    "file:///etc/hostname",
    "/etc/hostname",
    "../a.png",
    "a/../../a.png",
    "range://0+12::/dev/zero",
    "page://1::ocr-en:emoji-en?size=12000",
    "parquet://0/jpg::x.parquet",
    "record://0/jpg::x.array_record",
    "simplecache::http://127.0.0.1:9/a.png",
    "gs://other/a.png",
    "memory://b/a.png",
    "a\0.png",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_inside_rows_stay_below_the_data(tmp_path, monkeypatch, name):
    """Refused before anything is opened, in every format that names files."""

    def refuse(*_, **__):
        raise AssertionError("a row reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    made = {
        "llava": {"image": name, "conversations": talk()},
        "qwen-vl": {
            "conversations": [
                {"from": "user", "value": f"<img>{name}</img>q"},
                {"from": "assistant", "value": "a"},
            ]
        },
        "mmc4": {
            "text_list": ["a"],
            "image_info": [{"image_name": name, "matched_text_index": 0, "matched_sim": 0.1}],
        },
        "img2dataset": {"jpg": name, "caption": "x"},
        "grit": {"key": f"{name}/x", "caption": "x", "ref_exps": []},
        "synthdog": {"file_name": name, "ground_truth": '{"gt_parse": {"text_sequence": "x"}}'},
        "detected": {
            "image": name,
            "width": 9,
            "height": 9,
            "boxes": [{"box": [0, 0, 5, 5], "text": "x"}],
        },
    }
    for kind, fields in made.items():
        write_jsonl(tmp_path / "rows.jsonl", [fields])
        with pytest.raises(RowError, match="is not below|is no name of a file"):
            open_source(f"{kind}:{tmp_path}/rows.jsonl")[0]
    video = write_jsonl(
        tmp_path / "rows.jsonl", [{"video": name, "conversations": talk("<video>q")}]
    )
    chart = f"""chartqa:{
        write_json(tmp_path / "charts.json", [{"imgname": name, "query": "q", "label": "a"}])
    }"""
    content = {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"image_id": 1, "caption": "a"}],
    }
    coco = f"coco-captions:{write_json(tmp_path / 'annotations/captions_x.json', content)}"
    for source in (video, chart, coco):
        with pytest.raises(RowError, match="is not below|is no name of a file"):
            open_source(source)[0]


def test_names_below_the_folder_of_pictures(tmp_path):
    write_images(tmp_path / "pictures", 1)
    (tmp_path / "rows").mkdir()
    for name in (f"{tmp_path}/pictures/0.png", "0.png", "./0.png", "x/../0.png"):
        source = write_jsonl(
            tmp_path / "rows/rows.jsonl", [{"image": name, "conversations": talk()}]
        )
        (sample,) = open_source(f"{source}?images={tmp_path}/pictures")
        assert sample.refs[0].path.endswith("0.png")
        (sample,) = open_source(f"{source}?images=../pictures")
    (sample,) = open_source(
        f"""{
            write_jsonl(
                tmp_path / "rows/rows.jsonl",
                [{"image": f"{tmp_path}/pictures/0.png", "conversations": talk()}],
            )
        }?images=/"""
    )
    assert shows(sample.refs[0].path) == 0
    memory = fsspec.filesystem("memory")
    memory.pipe(
        "/set/rows.jsonl",
        json.dumps({"image": "memory:///set/a.png", "conversations": talk()}).encode(),
    )
    memory.pipe("/set/a.png", png(5))
    assert shows(open_source("llava:memory:///set/rows.jsonl")[0].refs[0].path) == 5
    memory.pipe(
        "/set/rows.jsonl",
        json.dumps({"image": "a::http://127.0.0.1", "conversations": talk()}).encode(),
    )
    with pytest.raises(RowError, match="no name of a file"):
        open_source("llava:memory:///set/rows.jsonl")[0]
    memory.store.clear()


def test_sizes_are_looked_at_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_BYTES", 100)
    monkeypatch.setattr(
        files,
        "read_range",
        lambda path, start, size: (
            pytest.fail(f"{size} bytes were read") if size > 100 else b"x" * size
        ),
    )
    pack(
        tmp_path / "a.tar",
        [("a.jpg", b"x" * 500), ("a.txt", "y" * 101), ("b.txt", "y"), ("b.jpg", b"x" * 500)],
    )
    found = rows.open_rows(str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match="a.txt: 101 bytes of text, the limit is 100"):
        found[0]
    with pytest.raises(ValueError, match="500 bytes, the limit is 400"):
        rows.open_ref(found[1]["jpg"], 400)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "z" * 200}))
    with pytest.raises(RowError, match="a line of 212 bytes, the limit is 100"):
        open_source(f"text:{tmp_path}/a.jsonl")[0]
    with pytest.raises(ImageError, match="not a regular file"):
        decode("/dev/zero")


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/a.jpg"])
def test_members_that_lead_out_of_an_archive(tmp_path, name):
    path = pack(
        tmp_path / "a.tar",
        [(name, png(1)), (name.replace("jpg", "txt"), "x"), ("b.jpg", png(2)), ("b.txt", "two")],
    )
    source = open_source(f"img2dataset:{path}")
    with pytest.raises(RowError, match="leads out of the archive"):
        source[0]
    assert said(source[1]) == [[("assistant", "<image>two")]]


def test_headers_of_archives_are_small(tmp_path):
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    info = tarfile.TarInfo("././@LongLink")
    info.size, info.type = 1 << 40, b"L"
    block = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match="has 1099511627776 bytes"):
        list(tar.headers(io.BytesIO(block + b"\0" * 1024)))


def test_compressed_files_are_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(FileNotFoundError, match="a.tar.gz is compressed: unpack it"):
        open_source(f"img2dataset:{tmp_path}/a.tar.gz")
