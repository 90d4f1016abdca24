"""The question sets in their official layouts."""

import pytest

from evlm_jax.data.sources import open_source
from tests.data.made import asked, paths, said, write_json


def coco_vqa(tmp_path, prefix):
    questions = [
        {"image_id": i, "question": f"q{n}?", "question_id": 10 * i + n}
        for n, i in enumerate((5, 7, 5))
    ]

    def say(*texts):
        return [
            {"answer": text, "answer_confidence": "yes", "answer_id": n}
            for n, text in enumerate(texts)
        ]

    answers = [
        {
            "question_id": q["question_id"],
            "image_id": q["image_id"],
            "answers": say("no", "yes", "yes"),
        }
        for q in questions
    ]
    write_json(
        tmp_path / f"{prefix}mscoco_train2014_annotations.json",
        {"annotations": answers[::-1], "data_subtype": "train2014"},
    )
    questions = {"questions": questions, "data_subtype": "train2014", "task_type": "Open-Ended"}
    return write_json(tmp_path / f"{prefix}OpenEnded_mscoco_train2014_questions.json", questions)


@pytest.mark.parametrize("kind, prefix", [("vqav2", "v2_"), ("okvqa", "")])
def test_vqav2_and_okvqa(tmp_path, kind, prefix):
    file = coco_vqa(tmp_path, prefix)
    five, seven = source = open_source(f"{kind}:{file}?images=/coco")
    assert source.dialog_counts() == [2, 1]
    assert paths(five) == ["/coco/train2014/COCO_train2014_000000000005.jpg"]
    assert said(five) == asked(("<image>q0?", "yes"), ("<image>q2?", "yes")) and said(
        seven
    ) == asked(("<image>q1?", "yes"))


def science(question, choices, answer, split, hint="", image=None):
    """An entry of ScienceQA's problems.json."""
    return dict(
        question=question,
        choices=choices,
        answer=answer,
        hint=hint,
        image=image,
        task="closed choice",
        split=split,
    )


CHOICES = "A. one\nB. two\nC. three\nReply with the letter of the right option."
VQA = {  # the published entries; the picture of the first sample below the folder; its dialogs
    "gqa": (
        {
            "02930152": {
                "imageId": "2354786",
                "question": "Is the sky dark?",
                "answer": "yes",
                "fullAnswer": "Yes, the sky is dark.",
            }
        },
        "images/2354786.jpg",
        ("Is the sky dark?", "yes"),
    ),
    "textvqa": (
        {
            "data": [
                {
                    "question": "what brand?",
                    "image_id": "0054c91397f2fe05",
                    "question_id": 0,
                    "answers": ["nous", "dakota", "dakota"],
                }
            ]
        },
        "train_images/0054c91397f2fe05.jpg",
        ("what brand?", "dakota"),
    ),
    "docvqa": (
        {
            "data": [
                {
                    "questionId": 337,
                    "question": "what date?",
                    "image": "documents/xnbl0037_1.png",
                    "answers": ["1/8/93", "93"],
                }
            ]
        },
        "documents/xnbl0037_1.png",
        ("what date?", "1/8/93"),
    ),
    "chartqa": (
        [{"imgname": "41699051005347.png", "query": "How many?", "label": "14"}],
        "png/41699051005347.png",
        ("How many?", "14"),
    ),
    "scienceqa": (
        {
            "1": science("Which?", ["one", "two", "three"], 1, "train", "Look.", "image.png"),
            "2": science("Why?", ["a", "b"], 0, "train"),
            "3": science("Hidden?", ["a", "b"], 0, "test"),
        },
        "images/train/1/image.png",
        (f"Context: Look.\nWhich?\n{CHOICES}", "B"),
    ),
}


@pytest.mark.parametrize("kind", VQA)
def test_vqa_sets(tmp_path, kind):
    facts, picture, (question, answer) = VQA[kind]
    source = open_source(f"{kind}:{write_json(tmp_path / 'train.json', facts)}")
    assert paths(source[0]) == [f"{tmp_path}/{picture}"] and said(source[0]) == asked(
        (f"<image>{question}", answer)
    )
    if kind == "scienceqa":
        assert len(source) == 2 and source[1].visuals == ()
        assert said(source[1]) == asked(
            ("Why?\nA. a\nB. b\nReply with the letter of the right option.", "A")
        )


def test_ai2d_leaves_the_test_pictures_out(tmp_path):
    for n in (0, 1, 2):
        text = {
            f"Which {n}?": {
                "abcLabel": False,
                "answerTexts": ["one", "two", "three"],
                "correctAnswer": n,
                "questionId": f"{n}.png-0",
            }
        }
        write_json(
            tmp_path / f"questions/{n}.png.json", {"questions": text, "imageName": f"{n}.png"}
        )
    with pytest.raises(FileNotFoundError, match="ai2d_test_ids.csv"):
        open_source(f"ai2d:{tmp_path}")
    (tmp_path / "ai2d_test_ids.csv").write_text("1\n")
    train = open_source(f"ai2d:{tmp_path}")
    assert [paths(s) for s in train] == [[f"{tmp_path}/images/0.png"], [f"{tmp_path}/images/2.png"]]
    assert said(train[1]) == asked((f"<image>Which 2?\n{CHOICES}", "C"))
    assert [
        [s.key for s in open_source(f"ai2d:{tmp_path}?split={split}")] for split in ("test", "all")
    ] == [
        ["1.png"],
        ["0.png", "1.png", "2.png"],
    ]


def test_bad_files_are_errors_with_their_names(tmp_path):
    file = coco_vqa(tmp_path, "v2_")
    write_json(tmp_path / "v2_mscoco_train2014_annotations.json", {"annotations": []})
    with pytest.raises(ValueError, match="questions.json: entry 1: KeyError: 'answers'"):
        open_source(f"vqav2:{file}")
    with pytest.raises(ValueError, match="train.json: entry 1: KeyError: 'imageId'"):
        open_source(f"gqa:{write_json(tmp_path / 'train.json', {'1': {'question': 'q'}})}")
