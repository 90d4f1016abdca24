"""Web documents and grounded captions in their official layouts; the assignment against brute
force.
"""

import hashlib
import itertools
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from pycocotools.coco import COCO

from evlm_jax.data.formats.grounding import box, grounded
from evlm_jax.data.formats.interleaved import assign
from evlm_jax.data.image import ImageError, load
from evlm_jax.data.samples import SampleError
from evlm_jax.data.sources import open_source
from tests.data.made import asked, paths, png, said, shows, write_images, write_json, write_jsonl


@pytest.mark.parametrize("images, sentences", [(1, 1), (2, 4), (3, 3), (4, 2), (5, 2)])
def test_assignment_is_the_best_of_all(images, sentences):
    """As few pictures a sentence as there must be; among such placements, the greatest sum."""
    rng = np.random.default_rng(images)
    for _ in range(20):
        similarity = rng.random((images, sentences))
        most = -(-images // sentences)
        every = itertools.product(range(sentences), repeat=images)
        allowed = [p for p in every if max(p.count(s) for s in p) <= most]
        best = max(sum(similarity[i, s] for i, s in enumerate(p)) for p in allowed)
        found = assign(similarity).tolist()
        assert tuple(found) in allowed and sum(
            similarity[i, s] for i, s in enumerate(found)
        ) == pytest.approx(best)


def mmc4_row(**more):
    info = [
        {
            "image_name": "b1.png",
            "raw_url": "http://x/1",
            "matched_text_index": 2,
            "matched_sim": 0.31,
        },
        {
            "image_name": "a0.png",
            "raw_url": "http://x/0",
            "matched_text_index": 0,
            "matched_sim": 0.27,
        },
    ]
    matrix = [[0.1, 0.2, 0.31], [0.27, 0.1, 0.3]]
    return {
        "url": "http://x",
        "text_list": ["One.", "Two <image>.", "Three."],
        "image_info": info,
        "similarity_matrix": matrix,
    } | more


def test_mmc4(tmp_path):
    write_jsonl(
        tmp_path / "docs_shard_0_v2.jsonl", [mmc4_row(), mmc4_row(url="none", image_info=[])]
    )
    first, bare = open_source(f"mmc4:{tmp_path}")
    assert first.key == "http://x" and paths(first) == [
        f"{tmp_path}/images/a0.png",
        f"{tmp_path}/images/b1.png",
    ]
    assert said(first) == [[("assistant", "<image>One. Two < image>. <image>Three.")]]
    assert first.scores == (0.27, 0.31)
    assert (bare.visuals, said(bare)) == ((), [[("assistant", "One. Two < image>. Three.")]])


def test_mmc4_without_a_published_match_is_assigned(tmp_path):
    unmatched = [{"image_name": fact["image_name"]} for fact in mmc4_row()["image_info"]]
    write_jsonl(
        tmp_path / "docs.jsonl",
        [
            mmc4_row(image_info=unmatched),
            mmc4_row(image_info=unmatched, similarity_matrix=[[1, 2, 3]]),
        ],
    )
    source = open_source(f"mmc4:{tmp_path / 'docs.jsonl'}")
    assert said(source[0]) == [
        [("assistant", "<image>One. Two < image>. <image>Three.")]
    ] and source[0].scores == (0.27, 0.31)
    with pytest.raises(
        SampleError,
        match=(
            r"http://x: ValueError: similarity_matrix is \(1, 3\), there are 2 images and 3"
            r" texts.*row 2"
        ),
    ):
        source[1]


def write_obelics(path, rows):
    table = {
        "images": pa.array([images for images, _ in rows], pa.list_(pa.string())),
        "metadata": pa.array(
            [json.dumps([{"src": url} if url else None for url in images]) for images, _ in rows]
        ),
        "general_metadata": pa.array(["{}"] * len(rows)),
        "texts": pa.array([texts for _, texts in rows], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(table), path)


URLS = [f"https://example.org/{i}.jpg" for i in range(3)]
OBELICS = [
    ([URLS[0], None, None, URLS[1], None], [None, "One", "Two", None, "Three"]),
    ([URLS[2], None], [None, "Four"]),
]


def check_obelics(source):
    first, second = source
    assert said(first) == [[("assistant", "<image>One\n\nTwo\n\n<image>Three")]] and said(
        second
    ) == [[("assistant", "<image>Four")]]
    assert [shows(path) for path in paths(first)] == [0, 1] and first.key != second.key
    with pytest.raises(ImageError, match=hashlib.sha256(URLS[2].encode()).hexdigest()):
        shows(paths(second)[0])  # was not downloaded


def test_obelics_with_pictures_named_by_their_url(tmp_path):
    write_obelics(tmp_path / "train-00000.parquet", OBELICS)
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{hashlib.sha256(URLS[i].encode()).hexdigest()}.png").write_bytes(
            png(i)
        )
    check_obelics(open_source(f"obelics:{tmp_path / 'train-00000.parquet'}"))


def test_obelics_with_pictures_from_img2dataset(tmp_path):
    write_obelics(tmp_path / "train-00000.parquet", OBELICS)
    (tmp_path / "images").mkdir()
    with webdataset.TarWriter(str(tmp_path / "images/00000.tar")) as writer:
        for i in range(2):
            writer.write({"__key__": f"{i:09d}", "png": png(i), "json": {"url": URLS[i]}})
    table = {
        "url": URLS,
        "key": [f"{i:09d}" for i in range(3)],
        "status": ["success", "success", "failed_to_download"],
    }
    pq.write_table(pa.table(table), tmp_path / "images/00000.parquet")
    check_obelics(open_source(f"obelics:{tmp_path / 'train-00000.parquet'}"))


def test_obelics_lists_must_agree(tmp_path):
    write_obelics(tmp_path / "a.parquet", [([None], [None]), ([None, None], ["a"])])
    (tmp_path / "images").mkdir()
    source = open_source(f"obelics:{tmp_path / 'a.parquet'}")
    for i, message in enumerate(("exactly one of an image and a text", "2 images beside 1 texts")):
        with pytest.raises(SampleError, match=message + f".*a.parquet: row {i + 1}"):
            source[i]


def write_refcoco(folder):
    images = [
        {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 200, "height": 100}
    ]
    annotations = [
        {"id": 1, "image_id": 7, "bbox": [20.0, 10.0, 100.0, 50.0], "category_id": 3},
        {"id": 2, "image_id": 7, "bbox": [0, 0, 200, 100], "category_id": 3},
    ]
    write_json(
        folder / "refcoco/instances.json",
        {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]},
    )
    refs = [
        {
            "ref_id": n,
            "ann_id": n,
            "image_id": 7,
            "category_id": 3,
            "split": split,
            "file_name": f"COCO_train2014_000000000007_{n}.jpg",
            "sentences": [
                {"sent": text, "raw": text.upper(), "tokens": text.split(), "sent_id": 0}
                for text in texts
            ],
            "sent_ids": [0],
        }
        for n, split, texts in (
            (1, "train", ("left cat", "cat")),
            (2, "train", ("everything",)),
            (2, "val", ("all",)),
        )
    ]
    (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return folder / "refcoco/refs(unc).p"


def test_refcoco(tmp_path):
    file = write_refcoco(tmp_path / "data")
    (sample,) = source = open_source(f"refcoco:{file}")
    assert source.dialog_counts() == [3] and sample.key == "7"
    assert paths(sample) == [
        f"{tmp_path}/images/mscoco/images/train2014/COCO_train2014_000000000007.jpg"
    ]
    expected = []
    theirs = COCO(str(file.parent / "instances.json"))
    for text, number in (("left cat", 1), ("cat", 1), ("everything", 2)):
        x, y, w, h = theirs.loadAnns([number])[0]["bbox"]
        a, b, c, d = (min(999, int(v)) for v in (x * 5, y * 10, (x + w) * 5, (y + h) * 10))
        expected.append(
            (f"<image>Locate: {text}", f"<ref>{text}</ref><box>({a},{b}),({c},{d})</box>")
        )
    assert (
        said(sample) == asked(*expected)
        and "(100,100),(600,600)" in expected[0][1]
        and "(0,0),(999,999)" in expected[2][1]
    )
    assert said(open_source(f"refcoco:{file}?split=val&images=/coco")[0])[0][0] == (
        "user",
        "<image>Locate: all",
    )


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [pickle.dumps([Evil()]), b"\x80\x02]q", b"", b"garbage"])
def test_pickles_run_nothing(tmp_path, content, capsys):
    file = write_refcoco(tmp_path)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\).p: "):
        open_source(f"refcoco:{file}")
    assert capsys.readouterr().out == ""


CAPTION = "a wire hanger with a paper cover"
SPANS = [
    [19, 32, 0.02, 0.11, 0.97, 0.99, 0.68],
    [0, 13, 0.019, 0.011, 0.972, 0.5, 0.9],
    [2, 6, 0, 0, 1, 1, 0.5],
    [0, 13, 0, 0, 0.1, 0.2, 0.6],
]
GROUNDED = (
    "<ref>a wire hanger</ref><box>(19,11),(972,500)</box><box>(0,0),(100,200)</box> with "
    "<ref>a paper cover</ref><box>(20,110),(970,990)</box>"
)


def test_grit_tars_and_parquet(tmp_path):
    facts = {
        "key": "000373938",
        "caption": CAPTION,
        "ref_exps": SPANS,
        "noun_chunks": SPANS[:1],
        "clip_similarity_vitl14": 0.29,
    }
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        writer.write({"__key__": "000373938", "jpg": png(5), "json": facts, "txt": CAPTION})
    columns = {name: [value] for name, value in facts.items()} | {
        "width": [8],
        "height": [8],
        "url": ["http://x"],
    }
    pq.write_table(pa.table(columns), tmp_path / "coyo_0_snappy.parquet")
    write_images(tmp_path / "pictures", 1)
    (tmp_path / "pictures/0.png").rename(tmp_path / "pictures/000373938.jpg")
    for place, number in (("00000.tar?", 5), ("coyo_0_snappy.parquet?images=pictures&", 0)):
        (sample,) = open_source(f"grit:{tmp_path / place}")
        assert (sample.key, sample.scores, said(sample)) == (
            "000373938",
            (0.29,),
            [[("assistant", f"<image>{GROUNDED}")]],
        )
        assert shows(paths(sample)[0]) == number
        (sample,) = open_source(f"grit:{tmp_path / place}spans=noun_chunks")
        assert (
            said(sample)[0][0][1]
            == "<image>a wire hanger with <ref>a paper cover</ref><box>(20,110),(970,990)</box>"
        )


def test_boxes():
    assert (
        box((0, 0.25, 0.5, 1)) == "<box>(0,250),(500,999)</box>"
        and box((-0.004, 0, 1.004, 1)) == "<box>(0,0),(999,999)</box>"
    )
    for corners in ((0.5, 0, 0.4, 1), (0, 0, 1.2, 1), (float("nan"), 0, 1, 1), (0, -0.5, 1, 1)):
        with pytest.raises(ValueError, match="not within the picture"):
            box(corners)
    with pytest.raises(ValueError):
        box((0, 0, 1))
    assert grounded("no spans", []) == "no spans"


def test_refcoco_pictures_load(tmp_path):
    file = write_refcoco(tmp_path)
    write_images(tmp_path / "coco", 8)
    (tmp_path / "coco/7.png").rename(tmp_path / "coco/COCO_train2014_000000000007.jpg")
    (sample,) = open_source(f"refcoco:{file}?images={tmp_path}/coco")
    assert load(sample.refs[0], 8, "squash")[0, 0, 0] == 7
