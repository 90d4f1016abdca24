"""Samples field by field: the demo's sources, LLaVA rows, folders."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evlm_jax import assets
from evlm_jax.data.samples import ImageRef, SampleError, Turn
from evlm_jax.data.sources import open_source
from tests.data.made import png, row, shows, write_images, write_jsonl
from tests.data.test_images import write_video
from tests.helpers.parity import needs_asset


@needs_asset("easy-vqa")
@pytest.mark.parametrize(
    "name, split, images, questions",
    [("easy-vqa", "train", 4000, 38575), ("easy-vqa-test", "test", 1000, 9673)],
)
def test_easy_vqa_is_the_published_split(name, split, images, questions):
    source = open_source(name)
    folder = assets.path("easy-vqa") / split
    published = json.loads((folder / "questions.json").read_text())
    assert (len(source), sum(source.dialog_counts())) == (images, questions)
    found = [
        (turns[0].text, turns[1].text, int(sample.key))
        for sample in source
        for turns in sample.dialogs
    ]
    assert sorted(found) == sorted(("<image>" + q, a, i) for q, a, i in published)
    assert source[7].visuals == ((ImageRef(str(folder / "images" / f"{source[7].key}.png")),),)


@needs_asset("openmoji")
def test_emoji_splits_share_no_code_point():
    train, test, chinese = (open_source(name) for name in ("emoji-en", "emoji-en-test", "emoji-zh"))
    keys = [{sample.key for sample in source} for source in (train, test, chinese)]
    assert not keys[0] & keys[1] and keys[0] == keys[2] and 0.05 < len(test) / len(train) < 0.2
    apple = {sample.key: sample for sample in [*train, *test]}["1F34E"]
    assert apple.dialogs == (
        (Turn("user", "<image>Name this emoji."), Turn("assistant", "red apple")),
    )
    assert all(sample.refs[0].path.endswith(f"{sample.key}.png") for sample in chinese)


def test_llava_rows(tmp_path):
    video = write_video(tmp_path / "v.mp4", seconds=4, fps=5)
    rows = [
        row("one", "a.png", "<image>\nWhat?", "This."),
        row("many", ["a.png", "b/c.png"], "<image><image>Compare.", "Equal."),
        row("text", None, "Hello", "Hi", "And?", "No."),
        row("film", None, "<video>What happens?", "Light.") | {"video": video.name, "frames": 2},
    ]
    name = write_jsonl(tmp_path / "rows.jsonl", rows)
    one, many, text, film = open_source(name)
    assert (one.key, one.source, one.visuals) == (
        "one",
        name,
        ((ImageRef(str(tmp_path / "a.png")),),),
    )
    assert one.dialogs == ((Turn("user", "<image>\nWhat?"), Turn("assistant", "This.")),)
    assert many.visuals == (
        (ImageRef(str(tmp_path / "a.png")),),
        (ImageRef(str(tmp_path / "b/c.png")),),
    )
    assert (
        text.visuals == () and [turn.role for turn in text.dialogs[0]] == ["user", "assistant"] * 2
    )
    assert film.visuals == ((ImageRef(str(video), 1.0), ImageRef(str(video), 3.0)),)
    assert film.dialogs[0][0].text == "<image>What happens?"

    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [sample.key for sample in open_source(f"llava:{tmp_path / 'rows.json'}")] == [
        "one",
        "many",
        "text",
        "film",
    ]


def test_llava_rows_in_parquet(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    pq.write_table(
        pa.table(
            {
                "id": ["a"],
                "image": pa.array([{"bytes": png(3), "path": "3.png"}], image),
                "conversations": [turns],
            }
        ),
        tmp_path / "a.parquet",
    )
    (sample,) = open_source(f"llava:{tmp_path}")
    assert sample.key == "a" and sample.dialogs == (
        (Turn("user", "<image>\nWhat?"), Turn("assistant", "This.")),
    )
    assert shows(sample.refs[0].path) == 3


def test_jsonl_is_read_by_row_whatever_the_spacing(tmp_path):
    rows = [json.dumps(row(f"ü{i}", None, "q" * i, "a"), ensure_ascii=False) for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n" + rows[0] + "\n\n" + "\r\n".join(rows[1:]), "utf-8")
    source = open_source(f"llava:{tmp_path / 'rows.jsonl'}")
    assert [source[i].key for i in (4, 0, 3, 1, 2)] == ["ü4", "ü0", "ü3", "ü1", "ü2"]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"id": "r9"}, "r9: KeyError: 'conversations'"),
        (
            row("r9", 5, "q", "a"),
            "r9: ValueError: 'image' must name a file or hold its bytes, it is int",
        ),
        (
            {"id": "r9", "conversations": [{"from": "robot", "value": "x"}]},
            "r9: ValueError: unknown role 'robot'",
        ),
        (
            {"id": "r9", "conversations": [{"from": "human", "value": None}]},
            "r9: ValueError: 'value' must be a text, it is null",
        ),
        ({"id": "r9", "video": "none.mp4", "conversations": []}, "r9: VideoError: .*none.mp4"),
        ([1, 2], r"/\?: ValueError: a row must be an object with fields, it is list"),
        (None, "a row must be an object with fields, it is null"),
        (row("r9", None, "<img>a.png</img>q", "a"), "as Qwen-VL's: read it as qwen-vl:"),
    ],
)
def test_bad_rows_name_themselves(tmp_path, bad, message):
    source = open_source(write_jsonl(tmp_path / "rows.jsonl", [bad]))
    with pytest.raises(SampleError, match=message):
        source[0]


def test_a_picture_in_a_field_of_another_format_is_not_dropped(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [row("r9", "a.png", "<image>q", "a")])
    with pytest.raises(SampleError, match="r9: .*stand in 'image', as LLaVA's: read it as llava:"):
        open_source(source.replace("llava:", "qwen-vl:"))[0]


def test_a_field_that_stands_twice_has_no_value(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "x": {"y": 1, "y": 2}}\n')
    with pytest.raises(SampleError, match="the field 'y' stands there twice"):
        open_source(f"llava:{tmp_path / 'rows.jsonl'}")[0]


@pytest.mark.parametrize("name", ["a::b.jsonl", "a b#%20ü.jsonl", "a[b]*.jsonl", "~a.jsonl"])
def test_any_name_of_a_file_is_read(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in::side").mkdir()
    write_jsonl(tmp_path / "in::side" / name, [row("r9", None, "q", "a")])
    for path in (f"in::side/{name}", "in::side", f"{tmp_path}/in::side"):
        assert open_source(f"llava:{path}")[0].key == "r9"
    monkeypatch.chdir("in::side")
    assert open_source(f"llava:{name}")[0].key == "r9"


@pytest.mark.parametrize(
    "name, message",
    [
        ("llava:", "'llava:' has no path; give llava:PATH"),
        ("folder:?frames=4", "has no path; give folder:PATH"),
        ("llava:zz://a/b.jsonl", "zz://a/b.jsonl: Protocol not known: zz; a path is local, gs://"),
        ("llava:rows.jsonl?frames=2&frames=3", "has an option twice"),
        ("llava:rows.jsonl?frames=some", "frames=some: write a number of frames, as 16, or a rate"),
        (f"llava:rows.jsonl?frames={10**20}", "a video has 1 to 1024 frames, not 1000000"),
        ("llava:rows.jsonl?keep=rows.jsonl", "'rows.jsonl' is no .npy file"),
        ("llava:rows.jsonl?keep=a.npz", "must hold whole numbers from 0 to 0"),
    ],
)
def test_names_of_sources_are_checked(tmp_path, name, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [row("r9", None, "q", "a")])
    np.savez("a.npz", a=np.arange(1))
    with pytest.raises(ValueError, match=message):
        open_source(name)


def test_broken_json_names_file_and_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("a", None, "q", "a")) + '\n{"id": \n')
    with pytest.raises(SampleError, match=r"JSONDecodeError: .*rows.jsonl: row 2"):
        open_source(f"llava:{tmp_path / 'rows.jsonl'}")[1]


def test_folder(tmp_path):
    write_images(tmp_path / "deep", 2)
    (tmp_path / "deep" / "0.txt").write_text("A cat.\n")
    with pytest.raises(ValueError, match=r"1 images have no caption file.*1.txt"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "deep" / "1.txt").write_text("Ein Hund.")
    source = open_source(f"folder:{tmp_path}")
    assert [(sample.key, sample.dialogs[0][1].text) for sample in source] == [
        ("deep/0.png", "A cat."),
        ("deep/1.png", "Ein Hund."),
    ]
    assert source[0].dialogs[0][0].text.count("<image>") == len(source[0].visuals) == 1


@pytest.mark.parametrize("name", ["laion", "tar:/x", "jsonl"])
def test_unknown_sources_list_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"data.sources: unknown source '{name}'.*easy-vqa.*llava:PATH"
    ):
        open_source(name)


def test_empty_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no samples"):
        open_source(f"folder:{tmp_path}")
