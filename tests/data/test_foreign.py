"""Rows as others write them: read, or left out by name; a row does not decide what is learned
unseen.
"""

import json

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from evlm_jax.data.containers import text
from evlm_jax.data.pack import Packer
from evlm_jax.data.pipeline import batches
from evlm_jax.data.samples import RowError
from evlm_jax.data.sources import open_source
from tests.data.made import (
    TOKENIZER,
    config,
    pack,
    paths,
    png,
    row,
    said,
    shows,
    talk,
    write_images,
    write_json,
    write_jsonl,
)

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def test_text_that_is_stored_as_bytes_is_decoded(tmp_path):
    table = pa.table(
        {
            "key": ["1"],
            "jpg": pa.array([png(1)]),
            "caption": pa.array(["ein rötes Quadrat".encode()]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert said(open_source(f"img2dataset:{tmp_path}/a.parquet")[0]) == [
        [("assistant", "<image>ein rötes Quadrat")]
    ]
    pq.write_table(
        pa.table({"text": pa.array([b"word", b"\xff\xfe\x00", None])}), tmp_path / "b.parquet"
    )
    source = open_source(f"text:{tmp_path}/b.parquet")
    assert said(source[0]) == [[("assistant", "word")]]
    for number, message in ((1, "it is UTF-16"), (2, "'text' must be a text, it is null")):
        with pytest.raises(RowError, match=message):
            source[number]
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(
        msgpack.packb(
            {"key": "1", "image": {"bytes": png(4)}, "conversations": json.dumps(talk(answer="b"))}
        )
    )
    writer.write(
        msgpack.packb(
            {"key": "2", "images": [png(5), png(6)], "conversations": talk("<image><image>")}
        )
    )
    writer.close()
    source = open_source(f"llava:{tmp_path}/a.array_record")
    assert said(source[0])[0][1] == ("assistant", "b")
    assert [[shows(path) for path in paths(sample)] for sample in source] == [[4], [5, 6]]


WRONG = {
    "llava": [
        {"conversations": [{"from": "human", "value": ["q"]}]},
        {"conversations": [{"from": 3, "value": "q"}]},
        {"conversations": {"from": "human", "value": "q"}},
        {"conversations": []},
        {"conversations": talk("q", "\ud83d")},
        {"conversations": talk("<image>q"), "image": {"bytes": 5}},
        {"conversations": talk("<image>q"), "image": "a.png", "images": ["b.png"]},
        {"conversations": talk("q"), "image": "a.png"},
    ],
    "qwen-vl": [{"conversations": [{"from": "user", "value": None}]}, {"conversations": "[1]"}],
    "mmc4": [
        {"text_list": "ab", "image_info": []},
        {"text_list": [1], "image_info": []},
        {
            "text_list": ["a"],
            "image_info": [{"image_name": 7, "matched_text_index": 0, "matched_sim": 0.1}],
        },
        {
            "text_list": ["a"],
            "image_info": [{"image_name": "a", "matched_text_index": 0.5, "matched_sim": 0.1}],
        },
    ],
    "img2dataset": [
        {"jpg": 7, "caption": "x"},
        {"jpg": "a.jpg", "caption": 7},
        {"jpg": "a.jpg", "caption": " "},
    ],
    "grit": [
        {"key": "k", "caption": 5, "ref_exps": []},
        {"key": "k", "caption": "x", "ref_exps": "[[]]"},
    ],
    "synthdog": [
        {"file_name": 5, "ground_truth": '{"gt_parse": {"text_sequence": "x"}}'},
        {"file_name": "a.png", "ground_truth": 5},
    ]
    + [{"file_name": "a.png", "ground_truth": '{"gt_parse": {"text_sequence": [1]}}'}],
    "text": [{"text": ["a"]}, {"text": 1.5}, {"text": True}, 7],
    "built": [
        {
            "json": {
                "key": "k",
                "visuals": [["x"]],
                "dialogs": [[["user", "<image>q"]]],
                "scores": [],
            },
            "x": "/etc/passwd",
        }
    ],
    "detected": [
        {"image": "a.png", "width": 9, "height": 9, "boxes": [{"box": [0, 0, 5, 5], "text": 7}]}
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_value_of_another_type_is_a_bad_row(tmp_path, kind):
    write_jsonl(tmp_path / "rows.jsonl", WRONG[kind])
    source = open_source(f"{kind}:{tmp_path}/rows.jsonl")
    for number in range(len(source)):
        with pytest.raises(RowError, match=rf"rows.jsonl: row {number + 1}\)"):
            source[number]


def test_odd_entries_of_a_whole_file_are_bad_rows(tmp_path):
    """One is counted, where the file is of another format it is refused at once."""
    charts = [
        {"imgname": "a.png", "query": "q", "label": label} for label in ("3", 4, None, ["x"])
    ] + [5]
    source = open_source(f"chartqa:{write_json(tmp_path / 'charts.json', charts)}")
    assert said(source[0]) == [
        [("user", "<image>q"), ("assistant", answer)] for answer in ("3", "4")
    ]
    assert source.dialog_counts() == [2, 1, 1, 1]
    for number, message in enumerate(
        ("entry 3: .*it is null", "entry 4: .*it is list", "entry 5: TypeError"), 1
    ):
        with pytest.raises(RowError, match=message):
            source[number]
    with pytest.raises(ValueError, match="charts.json: entry 1: KeyError: 'imgname'"):
        open_source(f"chartqa:{write_json(tmp_path / 'charts.json', [{'image': 1}])}")
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2}]
    annotations = [
        {"image_id": 1, "caption": "a"},
        {"image_id": 1, "caption": None},
        {"image_id": 2, "caption": "b"},
    ]
    file = write_json(
        tmp_path / "annotations/captions_x.json", {"images": images, "annotations": annotations}
    )
    source = open_source(f"coco-captions:{file}")
    assert len(source) == 3 and said(source[0])[0][1] == ("assistant", "a")
    for number, message in ((1, "annotation 2: .*null"), (2, "image 2: KeyError: 'file_name'")):
        with pytest.raises(RowError, match=message):
            source[number]


def test_cells_without_a_picture(tmp_path):
    """As lmms-lab/LLaVA-OneVision-Data and others have them; binary columns of every kind that
    arrow knows.
    """
    (tmp_path / "there.png").write_bytes(png(9))
    struct = [
        {"bytes": png(1), "path": "x.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "there.png"},
    ]
    columns = {
        "struct": pa.array(struct, IMAGE),
        "list": pa.array([[struct[0], None], [], None, [struct[3]]], pa.list_(IMAGE)),
    }
    for kind in (
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
    ):
        values = pa.array([png(1), None, None, png(9)], pa.binary())
        columns[str(kind)] = (
            values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
        )
    for name, column in columns.items():
        asked = [talk("<image>q" if i in (0, 3) else "q") for i in range(4)]
        pq.write_table(
            pa.table({"a.b": ["x"] * 4, "image": column, "conversations": pa.array(asked, TURNS)}),
            tmp_path / "a.parquet",
        )
        found = [
            [shows(path) for path in paths(sample)]
            for sample in open_source(f"llava:{tmp_path}/a.parquet")
        ]
        assert found == [[1], [], [], [9]], name
    write_images(tmp_path, 2)
    odd = [
        {"video": None},
        {"video": ""},
        {"image": None, "images": ["0.png"]},
        {"image": [None, "0.png"]},
        {"image": {"path": "0.png"}},
    ]
    for more in odd:
        (sample,) = open_source(
            write_jsonl(
                tmp_path / "rows.jsonl", [{"image": "0.png", "conversations": talk()} | more]
            )
        )
        assert paths(sample) == [f"{tmp_path}/0.png"]


def test_odd_rows_are_counted_and_the_run_goes_on_also_from_a_position(tmp_path):
    write_images(tmp_path, 1)
    odd = [
        row("marks", "0.png", "<image>q", "the <image>"),
        row("none", "0.png"),
        row("half", None, "q", "\ud83d"),
        {"id": "type", "a": 1},
    ]
    good = [row(f"good{i}", "0.png", "<image>q", f"a{i}") for i in range(4)] + [
        row("tag", None, "What is <image>?", "A tag.")
    ]
    name = write_jsonl(tmp_path / "rows.jsonl", odd + good)
    cfg = config(sources=(name,), window=4, length=64)
    iterator = batches(cfg, TOKENIZER)
    drops, keys, state = set(), set(), None
    for step in range(12):
        _, info = next(iterator)
        drops |= {
            (drop.cause, drop.message.partition(": ")[0].rpartition("/")[2])
            for drop in info["drops"]
        }
        keys |= {key.rpartition("/")[2] for keys in info["keys"] for key in keys}
        state = iterator.get_state() if step == 5 else state
    assert drops == {("bad row", key) for key in ("marks", "none", "half", "type")}
    assert keys == {f"good{i}" for i in range(4)} | {"tag"}
    iterator.close()
    write_jsonl(
        tmp_path / "rows.jsonl",
        [odd[0] | {"id": f"new{i}"} for i in range(len(odd + good))][:-1] + good[-1:],
    )
    iterator = batches(cfg, TOKENIZER)  # what waited in the window is no sample any more
    iterator.set_state(state)
    _, info = next(iterator)
    assert {drop.cause for drop in info["drops"]} == {"bad row"} and {
        key.rpartition("/")[2] for key in info["keys"][0]
    } == {"tag"}
    iterator.close()


def test_a_position_keeps_what_is_left_of_its_window():
    made = [object()] * 3
    packer = Packer(made, config(window=4).data)

    class Stream(list):
        def __getitem__(self, index):
            raise RowError(f"sample s/{index}: gone")

    packer.stream = Stream(made)
    packer.restore({"next": 3, "pending": [[1, 0], [2, 0]]})
    assert [drop.message for drop in packer.drops] == ["sample s/1: gone", "sample s/2: gone"]
    assert packer.state == {"next": 3, "pending": []}


MARKS = {
    "UTF-16": "utf-16",
    "UTF-32": "utf-32",
    "UTF-16 or no text": "utf-16-le",
    "not UTF-8": "latin-1",
}


def test_one_reader_of_text(tmp_path):
    assert text.decode(b"\xef\xbb\xbfa\r\nb\rc\n") == "a\nb\nc\n" and text.lines(
        b"a\xe2\x80\xa8b\r\nc\n"
    ) == ["a\u2028b", "c"]
    for message, coding in MARKS.items():
        with pytest.raises(ValueError, match=message):
            text.decode('{"ü": 1}'.encode(coding))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in (
        ("a.JPG", png(1)),
        ("a.TXT", b"\xef\xbb\xbfA red\r\nsquare\r\n"),
        ("._a.JPG", b"\0\5"),
        ("._a.TXT", b"\0\5"),
    ):
        (folder / name).write_bytes(content)
    (folder / ".hidden").mkdir()
    (folder / ".hidden/b.jpg").write_bytes(png(2))
    (sample,) = open_source(f"folder:{folder}")
    assert sample.key == "a.JPG" and sample.dialogs[0][1].text == "A red\nsquare"
    pack(
        tmp_path / "a.tar",
        [
            ("._a.jpg", b"\0"),
            ("a.jpg", png(1)),
            ("a.txt", b"\xef\xbb\xbfone\r\n"),
            ("b.jpg", png(2)),
            ("b.txt", "café".encode("latin-1")),
        ],
    )
    source = open_source(f"img2dataset:{tmp_path}/a.tar")
    assert len(source) == 2 and said(source[0]) == [[("assistant", "<image>one")]]
    with pytest.raises(RowError, match="b.txt: it is not UTF-8 .byte 4 is 0xe9"):
        source[1]
    lines = "".join(
        json.dumps({"text": f"a\u2028{i}"}, ensure_ascii=False) + "\r\n" for i in range(2)
    )
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [said(sample)[0][0][1] for sample in open_source(f"text:{tmp_path}/a.jsonl")] == [
        "a\u20280",
        "a\u20281",
    ]
    whole = json.dumps(
        [
            {
                "id": 1,
                "conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}],
            }
        ]
    )
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    assert said(open_source(f"llava:{tmp_path}/a.json")[0]) == [[("user", "q"), ("assistant", "a")]]
    (tmp_path / "a.json").write_bytes(whole.encode("utf-16"))
    with pytest.raises(ValueError, match="a.json: it is UTF-16: write it as UTF-8"):
        open_source(f"llava:{tmp_path}/a.json")


def test_rows_of_every_kind_as_members_of_a_tar(tmp_path):
    def llava(**more):
        return json.dumps({"id": "a", "conversations": talk()} | more)

    two = json.dumps({"image": ["x/k.1.png", "x/k.0.png"], "conversations": talk("<image><image>")})
    members = [
        ("a.png", png(3)),
        ("a.json", llava(image="coco/000.png")),
        ("c.json", llava()),
        ("c.jpg", png(6)),
    ]
    members += [("d.json", llava(image=None).replace("<image>", ""))]
    source = open_source(f"llava:{pack(tmp_path / 'a.tar', members)}")
    assert [[shows(path) for path in paths(sample)] for sample in source][0] == [3]
    pack(tmp_path / "b.tar", [("k.0.png", png(4)), ("k.1.png", png(5)), ("k.json", two)])
    assert [shows(path) for path in paths(open_source(f"llava:{tmp_path}/b.tar")[0])] == [5, 4]
    assert [shows(path) for path in paths(source[1])] == [6] and paths(source[2]) == []
    qwen = json.dumps(
        {
            "conversations": [
                {"from": "user", "value": "<img>other/name.jpg</img>q"},
                {"from": "assistant", "value": "a"},
            ]
        }
    )
    pack(tmp_path / "c.tar", [("k.json", qwen), ("k.jpg", png(7))])
    assert [shows(path) for path in paths(open_source(f"qwen-vl:{tmp_path}/c.tar")[0])] == [7]
    info = [
        {"image_name": f"k.{i}.png", "matched_text_index": i, "matched_sim": 0.5} for i in range(2)
    ]
    web = json.dumps({"url": "u", "text_list": ["A.", "B."], "image_info": info})
    pack(tmp_path / "d.tar", [("k.json", web), ("k.0.png", png(8)), ("k.1.png", png(9))])
    sample = open_source(f"mmc4:{tmp_path}/d.tar")[0]
    assert [shows(path) for path in paths(sample)] == [8, 9] and said(sample)[0][0][
        1
    ] == "<image>A. <image>B."
    pack(tmp_path / "e.tar", [("k.txt", "words\n")])
    assert said(open_source(f"text:{tmp_path}/e.tar")[0]) == [[("assistant", "words")]]
    truth = json.dumps({"ground_truth": json.dumps({"gt_parse": {"text_sequence": "page"}})})
    pack(tmp_path / "f.tar", [("k.json", truth), ("k.png", png(1))])
    assert [shows(path) for path in paths(open_source(f"synthdog:{tmp_path}/f.tar")[0])] == [1]


def test_marks_of_pictures_and_videos_mean_those(tmp_path):
    from tests.data.test_images import write_video

    write_images(tmp_path, 1)
    write_video(tmp_path / "v.mp4", seconds=1, fps=5)
    rows = [
        {"image": "0.png", "video": "v.mp4", "frames": 2, "conversations": talk(f"{a} then {b}")}
        for a, b in (("<video>", "<image>"), ("<image>", "<video>"))
    ]
    first, second = open_source(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [len(visual) for visual in first.visuals] == [2, 1] and [
        len(visual) for visual in second.visuals
    ] == [1, 2]
