"""Files of benchmarks that do not fit, or are as other systems write them."""

import json
import pickle
import shutil

import numpy as np
import pytest
import scipy.io

from evlm_jax.evals import tasks
from evlm_jax.evals.task import STYLES
from evlm_jax.evals.tasks import official
from tests.evals import layouts
from tests.evals.test_tasks import cache as cache  # each test has a cache of its own


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def cut(path):
    return lambda data: (data / path).unlink()


def mended(path, change):
    return lambda data: edit(data / path, change)


VAL = "v2_mscoco_val2014_annotations.json"
BROKEN = [
    (
        "vqav2",
        cut("val2014/COCO_val2014_000000000011.jpg"),
        r"v2_OpenEnded_mscoco_val2014_questions.json: row 3: no image .*0011.jpg",
    ),
    (
        "vqav2",
        mended(VAL, lambda c: c["annotations"][1]["answers"].pop()),
        rf"{VAL}: row 2: 9 answers, there must be 10",
    ),
    (
        "vqav2",
        mended(VAL, lambda c: c["annotations"].pop()),
        r"questions.json: row 4: question 103 has no annotation",
    ),
    ("vqav2", cut(VAL), rf"no file .*{VAL}"),
    (
        "vizwiz",
        mended("Annotations/val.json", lambda c: c[2].pop("question")),
        r"val.json: row 3: no field 'question'; there are image",
    ),
    (
        "textvqa",
        mended("TextVQA_0.5.1_val.json", lambda c: c.pop("data")),
        r"TextVQA_0.5.1_val.json: no field 'data'",
    ),
    (
        "gqa",
        mended("testdev_balanced_questions.json", lambda c: c.update({"203": 5})),
        r"row 203: is int, not an object",
    ),
    (
        "docvqa",
        mended("val_v1.0.json", lambda c: c["data"][1].update(answers=[])),
        r"val_v1.0.json: row 2: 0 answers",
    ),
    (
        "chartqa",
        cut("test/png/augmented1.png"),
        r"test_augmented.json: row 2: no image .*augmented1.png",
    ),
    (
        "scienceqa-img",
        mended("pid_splits.json", lambda c: c["test"].append("77")),
        r"pid_splits.json: row 77: no such problem",
    ),
    (
        "scienceqa-img",
        mended("problems.json", lambda c: c["3"].update(answer=2)),
        r"problems.json: row 3: answer 2 of 2 choices",
    ),
    ("ai2d", cut("abc_images/1.png"), r"1.png.json: row What is 1\?: no image .*abc_images/1.png"),
    ("ai2d", cut("ai2d_test_ids.csv"), r"no file .*ai2d_test_ids.csv"),
    (
        "mme",
        lambda data: (data / "OCR/1.txt").write_text("Is it 1?\n"),
        r"1.txt: row 1: no field 'answer'",
    ),
    (
        "mme",
        lambda data: (data / "OCR/1.txt").write_text("Is it 1?\tmaybe\n"),
        r"1.txt: row 1: the answer is 'maybe'",
    ),
    ("mme", shutil.rmtree, r"mme: .* has none of the folders existence"),
    (
        "pope",
        lambda data: (data / "coco_pope_popular.json").open("a").write("{\n"),
        r"coco_pope_popular.json: row 5: not JSON",
    ),
    (
        "gqa",
        mended(
            "testdev_balanced_questions.json",
            lambda c: next(iter(c.values())).update(question=None),
        ),
        r"gqa: .*: a field is not as in the official files: TypeError",
    ),
    (
        "refcoco",
        mended("instances.json", lambda c: c["annotations"].pop()),
        r"refs\(unc\).p: row 1: image 0 or annotation 5 is not in",
    ),
    (
        "refcoco",
        mended("instances.json", lambda c: c["images"][0].update(width=0)),
        r"refs\(unc\).p: row 1: image .* is not COCO's: 'width' and 'height' must be above 0",
    ),
    (
        "refcoco",
        lambda data: (data / "refs(unc).p").write_bytes(pickle.dumps(print)),
        r"\(unc\).p: the file asks for builtins.print",
    ),
    (
        "coco",
        mended("dataset_coco.json", lambda c: c["images"][1].update(sentences=[])),
        r"dataset_coco.json: row 2: 0 captions",
    ),
    (
        "nocaps",
        mended("nocaps_val_4500_captions.json", lambda c: c["annotations"].pop()),
        r"captions.json: row 2: 0 captions",
    ),
    (
        "classes",
        lambda data: (data / "LOC_synset_mapping.txt").write_text("dog canine\nbird\n"),
        r"txt: row 2: no name behind 'bird'",
    ),
    ("classes", lambda data: (data / "empty").mkdir(), r"empty has no image"),
]


@pytest.mark.parametrize(
    "name, spoil, message", BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_malformed_files_are_named(name, spoil, message, tmp_path):
    data = layouts.write(name, tmp_path / "data")
    spoil(data)
    with pytest.raises(ValueError, match=message):
        tasks.find(name).questions(data, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace("\tanswer\t", "\tanswr\t"),
            r"mmbench_dev.tsv: row 1: no column answer; there are index, question",
        ),
        (
            lambda text: text.replace("\tl2-category\t", "\tindex\t", 1),
            r"mmbench_dev.tsv: row 1: index stands there twice",
        ),
        (
            lambda text: text.replace("\tdev\n", "\n", 1),
            r"mmbench_dev.tsv: row 2: 11 columns, the header has 12",
        ),
        (
            lambda text: text.replace("\tB\tkind", "\tD\tkind", 1),
            r"mmbench_dev.tsv: row 3: index '1000000' with the answer 'D'",
        ),
        (
            lambda text: text.replace("kind\tgroup\t0\t", "kind\tgroup\t*\t"),
            r"mmbench_dev.tsv: row 3: column image is not base64",
        ),
        (lambda text: text.replace("\tdev", "\ttest"), r"mmbench_dev.tsv: no row of split 'dev'"),
    ],
)
def test_malformed_tables_are_named(change, message, tmp_path):
    data = layouts.write("mmbench-en", tmp_path)
    data.write_text(change(data.read_text()))
    with pytest.raises(ValueError, match=message):
        tasks.find("mmbench-en").questions(data, None)


def test_unknown_names_and_doubles(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'vqa'; use one of ai2d, "):
        tasks.find("vqa")
    data = layouts.write("gqa", tmp_path / "gqa")
    for split, style, message in (
        ("val", STYLES[0], "unknown split 'val'; use one of testdev_balanced"),
        (None, "x", "unknown prompt 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.find("gqa").questions(data, split, style)
    with pytest.raises(ValueError, match="gqa: give --data"):
        tasks.find("gqa").questions(None, None)
    data = layouts.write("vqav2", tmp_path / "vqa")
    edit(
        data / "v2_OpenEnded_mscoco_val2014_questions.json",
        lambda c: c["questions"].append(c["questions"][0]),
    )
    with pytest.raises(ValueError, match="vqav2: .* question 100 stands there twice"):
        tasks.find("vqav2").questions(data, None)
    data = layouts.write("refcoco", tmp_path / "refcoco")
    edit(data / "instances.json", lambda c: c["images"].append(c["images"][0] | {"width": 1}))
    with pytest.raises(ValueError, match=r"instances.json: the id \d+ stands there twice"):
        tasks.find("refcoco").questions(data, None)


def test_synsets_have_names_and_doubles_are_one_candidate(tmp_path):
    data = layouts.write("classes", tmp_path / "val")
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "bird crane, a bird\nblack_cat cat\ndog crane\n"
    )
    task = tasks.find("classes")
    questions = task.questions(data, None)
    assert (
        task.candidates(questions) == ["cat", "crane"]
        and len(questions) == 30
        and len(task.questions(data, "all")) == 36
    )
    rows = [
        {"answer": "cat", "ranking": ["crane", "cat"], "cluster": "a"},
        {"answer": "cat", "ranking": ["cat"], "cluster": "b"},
    ]
    assert task.score(rows).each == {"acc@1": [0, 100], "acc@5": [100, 100]}


def test_imagenet_as_it_comes(tmp_path):
    data, kit = tmp_path / "val", tmp_path / "ILSVRC2012_devkit_t12" / "data"
    for i in range(1, 25):
        layouts.picture(data / f"ILSVRC2012_val_{i:08d}.JPEG", i % 10)
    task = tasks.find("classes")
    with pytest.raises(
        ValueError,
        match="their labels, ILSVRC2012_devkit_t12/data, are neither in it nor beside it",
    ):
        task.questions(data, None)
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = [
        (1, "n01440764", "tench, Tinca tinca"),
        (2, "n02012849", "crane"),
        (3, "n03126707", "crane"),
    ]
    scipy.io.savemat(kit / "meta.mat", {"synsets": np.array(synsets, fields)})
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{1 + i % 2}\n" for i in range(23)) + "3\n")
    questions = task.questions(data, None)
    assert [q.id for q in questions[:2]] == [
        "n01440764/ILSVRC2012_val_00000001.JPEG",
        "n02012849/ILSVRC2012_val_00000002.JPEG",
    ]
    assert (
        len(questions) == 21
        and len(task.questions(data, "all")) == 24
        and task.candidates(questions) == ["crane", "tench"]
    )
    truth.write_text("1\n2\n")
    with pytest.raises(
        ValueError,
        match="ground_truth.txt: row 3: no class of meta.mat for ILSVRC2012_val_00000003.JPEG",
    ):
        task.questions(data, None)


def test_files_of_tasks_as_other_systems_write_them(tmp_path):
    """A byte order mark, line ends, and a mark that ends a line for Unicode alone;
    UTF-16 is named.
    """
    rows = [{"question": f"a\u2028{i}"} for i in range(2)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row["question"] for row in official.json_lines(tmp_path / "a.jsonl")] == [
        "a\u20280",
        "a\u20281",
    ]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert len(official.json_rows(tmp_path / "a.json")) == 2
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfindex\tanswer\r\n1\tb\r\n")
    assert [row.data for row in official.tsv_rows(tmp_path / "a.tsv", ("index", "answer"))] == [
        {"index": "1", "answer": "b"}
    ]
    for read, name in ((official.json_rows, "a.json"), (official.json_lines, "a.jsonl")):
        (tmp_path / name).write_bytes(text.encode("utf-16"))
        with pytest.raises(ValueError, match=f"{name}: .*it is UTF-16: write it as UTF-8"):
            read(tmp_path / name)
    (tmp_path / "a.json").write_text("5")
    with pytest.raises(ValueError, match="a.json: there must be a list or an object, not int"):
        official.json_rows(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "x/../../secret.png"])
def test_a_row_of_a_task_names_no_file_elsewhere(tmp_path, name):
    data = tmp_path / "deep/data"
    (data / "images").mkdir(parents=True)
    row = official.Entry(data / "rows.json", 1, {"image": name})
    with pytest.raises(ValueError, match="rows.json: row 1: the image .* is not below the data"):
        row.image(data / "images" / row["image"])
