"""Every kind of source in its official layout, field by field."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from pycocotools.coco import COCO

from evlm_jax.data.image import decode, load
from evlm_jax.data.samples import ImageRef, SampleError, Turn
from evlm_jax.data.sources import FORMATS, open_source
from tests.data.made import (
    asked,
    paths,
    png,
    row,
    said,
    shows,
    write_images,
    write_json,
    write_jsonl,
    write_tar,
)
from tests.data.test_images import write_video


def test_img2dataset_tars(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05d}.tar", range(10 * shard, 10 * shard + 3))
    source = open_source(f"img2dataset:{tmp_path}")
    assert [sample.key for sample in source] == [
        "00000",
        "00001",
        "00002",
        "00010",
        "00011",
        "00012",
    ]
    assert len(source) == 6 and source.dialog_counts() == [1] * 6
    sample = source[4]
    assert said(sample) == [[("assistant", "<image>picture 11")]] and sample.scores == (1.1,)
    assert [shows(path) for path in paths(sample)] == [11]
    prompted = open_source(f"img2dataset:{tmp_path}/*1.tar?prompt=What is this?")
    assert said(prompted[0]) == asked(("<image>What is this?", "picture 10"))
    with pytest.raises(IndexError):
        source[6]


def test_img2dataset_parquet(tmp_path):
    """output_format=parquet: bytes under the name of the encoding; nothing of the picture is in the
    row.
    """
    rows = {
        "jpg": pa.array([png(i) for i in range(3)], pa.binary()),
        "key": ["a", "b", "c"],
        "caption": ["x", "<image> tag", "z"],
    }
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    source = open_source(f"img2dataset:{tmp_path}")
    assert [(s.key, said(s), s.scores) for s in source][1] == (
        "b",
        [[("assistant", "<image>< image> tag")]],
        (),
    )  # not a marker
    assert [shows(path) for s in source for path in paths(s)] == [0, 1, 2]


def test_video2dataset_tars(tmp_path):
    film = write_video(tmp_path / "v.mp4", seconds=4, fps=5)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "mp4": film.read_bytes(), "txt": "A film."})
    (sample,) = open_source(f"img2dataset:{tmp_path}/a.tar?frames=4")
    assert [ref.frame for ref in sample.visuals[0]] == [0.5, 1.5, 2.5, 3.5] and said(sample) == [
        [("assistant", "<image>A film.")]
    ]
    frames = [int(load(ref, 8, "squash").mean()) for ref in sample.refs]
    assert frames == pytest.approx([24, 84, 144, 204], abs=4)


def test_coco_captions_are_those_of_pycocotools(tmp_path):
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 8, "height": 8} for i in (9, 25, 30)]
    annotations = [
        {"id": n, "image_id": i, "caption": f" caption {n} "}
        for n, i in enumerate((25, 9, 25, 9, 9))
    ]
    file = write_json(
        tmp_path / "annotations/captions_train2017.json",
        {"images": images, "annotations": annotations},
    )
    source = open_source(f"coco-captions:{file}")
    theirs = COCO(str(file))
    assert [sample.key for sample in source] == ["9", "25"] and source.dialog_counts() == [
        3,
        2,
    ]  # 30 has no caption
    for sample in source:
        captions = [
            a["caption"].strip() for a in theirs.loadAnns(theirs.getAnnIds([int(sample.key)]))
        ]
        assert said(sample) == asked(
            *(("<image>Describe this image.", caption) for caption in captions)
        )
        assert paths(sample) == [
            f"{tmp_path}/train2017/{theirs.loadImgs([int(sample.key)])[0]['file_name']}"
        ]
    assert paths(open_source(f"coco-captions:{file}?images=/data/coco")[0]) == [
        "/data/coco/000000000009.jpg"
    ]
    assert said(open_source(f"coco-captions:{file}?prompt=")[1])[0] == [
        ("assistant", "<image>caption 0")
    ]


def test_karpathy_splits(tmp_path):
    def image(n, split):
        return {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "imgid": n,
            "cocoid": 100 + n,
            "split": split,
            "sentences": [
                {"raw": f"A {n}.", "tokens": ["a", str(n)]},
                {"raw": f"B {n}.", "tokens": []},
            ],
        }

    kinds = ["train", "restval", "val", "test"]
    file = write_json(
        tmp_path / "dataset_coco.json",
        {"images": [image(n, split) for n, split in enumerate(kinds)], "dataset": "coco"},
    )
    train = open_source(f"karpathy:{file}")
    assert [sample.key for sample in train] == ["100", "101"] and paths(train[1]) == [
        f"{tmp_path}/val2014/1.jpg"
    ]
    assert said(train[1]) == asked(
        ("<image>Describe this image.", "A 1."), ("<image>Describe this image.", "B 1.")
    )
    assert [sample.key for sample in open_source(f"karpathy:{file}?split=test&images=/coco")] == [
        "103"
    ]
    with pytest.raises(ValueError, match="no samples"):
        open_source(f"karpathy:{file}?split=dev")


def test_folder_of_pictures_and_videos(tmp_path):
    write_images(tmp_path / "deep", 1)
    write_video(tmp_path / "film.mp4", seconds=4, fps=5)
    (tmp_path / "film.txt").write_text("Light.\n")
    (tmp_path / "deep" / "0.txt").write_text("A cat.")
    picture, film = open_source(f"folder:{tmp_path}?frames=2")
    assert (picture.key, said(picture)) == (
        "deep/0.png",
        asked(("<image>Describe this image.", "A cat.")),
    )
    assert (film.key, said(film)) == ("film.mp4", asked(("<image>Describe this video.", "Light.")))
    assert [ref.frame for ref in film.refs] == [1.0, 3.0]


def test_a_relative_path(tmp_path, monkeypatch):
    write_images(tmp_path / "deep", 1)
    (tmp_path / "deep/0.txt").write_text("A cat.")
    monkeypatch.chdir(tmp_path)
    (sample,) = open_source("folder:deep")
    monkeypatch.chdir("/")
    assert sample.key == "0.png" and shows(paths(sample)[0]) == 0


def test_a_file_s_name_need_not_be_text(tmp_path):
    """Its key is, for pages and shards to hold."""
    stem = os.fsencode(tmp_path) + b"/\xff"
    with open(stem + b".png", "wb") as picture:
        Image.new("RGB", (2, 2)).save(picture, "png")
    with open(stem + b".txt", "w") as caption:
        caption.write("black")
    (sample,) = open_source(f"folder:{tmp_path}")
    assert sample.key == "\\udcff.png" and decode(sample.refs[0].path).size == (2, 2)


def test_qwen_vl(tmp_path):
    text = f"Picture 1: <img>a/1.jpg</img>\nPicture 2: <img>{tmp_path}/b/2.jpg</img>\nWhat differs?"
    answer = "<ref>The <image> cat</ref><box>(10,20),(300,400)</box> is gone."
    turns = [{"from": "user", "value": text}, {"from": "assistant", "value": answer}]
    file = write_json(tmp_path / "train.json", [{"id": "identity_0", "conversations": turns}])
    (sample,) = open_source(f"qwen-vl:{file}")
    assert (sample.key, paths(sample)) == (
        "identity_0",
        [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/2.jpg"],
    )
    expected = (
        "Picture 1: <image>\nPicture 2: <image>\nWhat differs?",
        answer.replace("<image>", "< image>"),
    )
    assert said(sample) == asked(expected)


def test_synthdog_folder_and_parquet(tmp_path):
    def truth(i):
        return json.dumps({"gt_parse": {"text_sequence": f"page {i} ü"}})

    write_images(tmp_path / "train", 2)
    lines = [json.dumps({"file_name": f"{i}.png", "ground_truth": truth(i)}) for i in range(2)]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(lines))
    image = pa.array(
        [{"bytes": png(i), "path": f"{i}.png"} for i in range(2)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(
        pa.table({"image": image, "ground_truth": [truth(0), truth(1)]}),
        tmp_path / "train-00000-of-00001.parquet",
    )
    for place in ("train", "train-00000-of-00001.parquet"):
        source = open_source(f"synthdog:{tmp_path / place}")
        assert [said(s) for s in source] == [
            asked(("<image>Read the text in this image.", f"page {i} ü")) for i in range(2)
        ]
        assert [shows(path) for s in source for path in paths(s)] == [0, 1]
        assert len({s.key for s in source}) == 2


def test_plain_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Once <image> upon"}\n{"id": 7, "text": "b"}\n')
    first, second = open_source(f"text:{tmp_path / 'a.jsonl'}")
    assert (first.visuals, first.dialogs) == (
        (),
        ((Turn("assistant", "Once < image> upon"),),),
    ) and second.key == "7"


CHAT = [("human", "<image>\nWhat?"), ("gpt", "a cat"), ("human", "How many?"), ("gpt", "two")]


def conversation(turns) -> dict:
    said = [{"from": role, "value": text} for role, text in turns]
    return {"id": "r", "image": "a.png", "conversations": said}


def test_questions_of_a_conversation_may_be_dialogs_of_their_own(tmp_path):
    name = write_jsonl(tmp_path / "rows.jsonl", [conversation(CHAT), conversation(CHAT[:2]), 5])
    each, whole = open_source(f"{name}?dialogs=each"), open_source(name)
    first = (Turn("user", "<image>\nWhat?"), Turn("assistant", "a cat"))
    second = (Turn("user", "<image>\nHow many?"), Turn("assistant", "two"))
    assert each[0].dialogs == (first, second) and each[1].dialogs == (first,)
    assert each.dialog_counts() == [2, 1, 1] and whole.dialog_counts() == [1, 1, 1]
    assert whole[0].dialogs == ((*first, Turn("user", "How many?"), second[1]),)
    assert each[0].visuals == whole[0].visuals


def test_dialogs_of_their_own_are_questions_behind_the_pictures(tmp_path):
    late = [("human", "What is <image>?"), *CHAT[1:]]
    rows = [conversation(CHAT[:3]), conversation(CHAT[1:]), conversation(late)]
    source = open_source(f"{write_jsonl(tmp_path / 'rows.jsonl', rows)}?dialogs=each")
    for number, message in enumerate(
        ("its turns are user, assistant, user", "its turns are assistant,", "at the beginning of")
    ):
        with pytest.raises(SampleError, match=message):
            source[number]
    with pytest.raises(ValueError, match="dialogs must be one or each, not 'all'"):
        open_source(f"llava:{tmp_path / 'rows.jsonl'}?dialogs=all")


BAD = {
    "a missing field": (
        "llava",
        [{"id": "r9"}],
        r"r9: KeyError: 'conversations' \(.*rows.jsonl: row 1\)",
    ),
    "no picture": (
        "img2dataset",
        [{"key": "r9", "caption": "x"}],
        "r9: ValueError: no picture; the row has key, caption",
    ),
    "a number for a text": (
        "text",
        [{"id": "r9", "text": 5}],
        "r9: ValueError: 'text' must be a text, it is int",
    ),
    "broken inner json": (
        "synthdog",
        [{"file_name": "r9", "ground_truth": "{"}],
        "r9: JSONDecodeError",
    ),
    "a sentence too far": (
        "mmc4",
        [
            {
                "url": "r9",
                "text_list": ["a"],
                "image_info": [{"image_name": "x", "matched_text_index": 1, "matched_sim": 0.3}],
            }
        ],
        "r9: ValueError: matched_text_index 1 of 1 texts",
    ),
    "a box outside": (
        "grit",
        [{"key": "r9", "caption": "abc", "ref_exps": [[0, 2, 0, 0, 1.5, 1, 0.9]]}],
        "r9: ValueError: box .* not within",
    ),
    "a span outside": (
        "grit",
        [{"key": "r9", "caption": "abc", "ref_exps": [[0, 9, 0, 0, 1, 1, 0.9]]}],
        "r9: ValueError: span 0 to 9",
    ),
    "a row that is none": (
        "llava",
        [5],
        "5: ValueError: a row must be an object with fields, it is int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_errors_with_file_row_and_key(tmp_path, case):
    kind, rows, message = BAD[case]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SampleError, match=message):
        open_source(f"{kind}:{tmp_path / 'rows.jsonl'}")[0]


def test_bad_files_are_errors_with_their_names(tmp_path):
    for kind in ("coco-captions", "karpathy"):
        with pytest.raises(ValueError, match=f"has not the fields of {kind}: KeyError: 'images'"):
            open_source(f"{kind}:{write_json(tmp_path / 'empty.json', {'annotations': []})}")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="broken.json: Expecting"):
        open_source(f"chartqa:{tmp_path / 'broken.json'}")
    with pytest.raises(
        ValueError, match="one.json: cannot read the file: there must be a list of rows, not dict"
    ):
        open_source(f"llava:{write_json(tmp_path / 'one.json', {'id': 1})}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(f"llava:{tmp_path}/nowhere")


def test_unknown_options_are_named():
    with pytest.raises(
        ValueError, match="unknown option 'image'; llava has images, frames, dialogs, keep"
    ):
        open_source("llava:/x.jsonl?image=a")
    with pytest.raises(ValueError, match="unknown option 'x'; text has keep"):
        open_source("text:/x.jsonl?x=")


def test_remote_files(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/rows.jsonl", json.dumps(row("r", "pictures/3.png", "<image>q", "a")).encode())
    memory.pipe("/set/pictures/3.png", png(3))
    memory.pipe("/set/pictures/3.txt", b"Three.")
    (sample,) = open_source("llava:memory:///set/rows.jsonl")
    assert shows(paths(sample)[0]) == 3
    (sample,) = open_source("folder:memory:///set/pictures")
    assert shows(paths(sample)[0]) == 3 and sample.dialogs[0][1].text == "Three."
    memory.store.clear()


def test_every_kind_is_documented():
    text = Path(__file__).parents[2].joinpath("docs/data.md").read_text("utf-8")
    assert [kind for kind in FORMATS if f"`{kind}:" not in text] == []


def test_a_missing_picture_names_itself(tmp_path):
    (sample,) = open_source(
        write_jsonl(tmp_path / "rows.jsonl", [row("r", "none.png", "<image>q", "a")])
    )
    with pytest.raises(ValueError, match="none.png"):
        load(sample.refs[0], 8, "squash")
    assert np.array_equal(sample.refs, [ImageRef(f"{tmp_path}/none.png")])
