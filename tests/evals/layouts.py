"""Small file sets in the layout of each benchmark's official files: `write(task, folder)` returns
what --data takes.
"""

import base64
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from evlm_jax.evals.scorers.choices import ROTATION

TEN = ["red"] * 6 + ["Red.", "blue", "2", "two"]


def picture(path: Path, number: int = 0) -> Path:
    """A small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), (20 * number, 99, 7), np.uint8)).save(path)
    return path


def save(path: Path, content) -> Path:
    """JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def vqav2(folder):
    asked = [
        {"image_id": 10 + i // 2, "question": f"what is {i}?", "question_id": 100 + i}
        for i in range(4)
    ]
    answers = [
        {"answer": a, "answer_confidence": "yes", "answer_id": j} for j, a in enumerate(TEN, 1)
    ]
    save(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    given = [
        {"question_id": row["question_id"], "image_id": row["image_id"], "answers": answers}
        for row in asked
    ]
    save(folder / "v2_mscoco_val2014_annotations.json", {"annotations": given})
    for i in (10, 11):
        picture(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    return folder


def vizwiz(folder):
    rows = [
        {
            "image": f"VizWiz_val_{i}.jpg",
            "question": "WHAT is this?",
            "answers": [{"answer": a} for a in TEN],
        }
        for i in range(3)
    ]
    save(folder / "Annotations" / "val.json", rows)
    for row in rows:
        picture(folder / "val" / row["image"])
    return folder


def textvqa(folder):
    rows = [
        {
            "question_id": i,
            "image_id": f"a{i}",
            "question": "what does the SIGN say?",
            "answers": TEN,
        }
        for i in range(3)
    ]
    save(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    save(
        folder / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": f"a{i}", "ocr_tokens": ["red", str(i)]} for i in range(3)]},
    )
    for i in range(3):
        picture(folder / "train_images" / f"a{i}.jpg")
    return folder


def gqa(folder):
    rows = {
        f"20{i}": {"imageId": f"n{i // 2}", "question": "Is it red?", "answer": "yes"}
        for i in range(4)
    }
    save(folder / "testdev_balanced_questions.json", rows)
    for i in range(2):
        picture(folder / "images" / f"n{i}.jpg")
    return folder


def docvqa(folder):
    rows = [
        {
            "questionId": i,
            "question": "What year?",
            "image": f"documents/p{i}.png",
            "answers": ["1999", "in 1999"],
        }
        for i in range(3)
    ]
    save(folder / "val_v1.0.json", {"data": rows})
    for row in rows:
        picture(folder / row["image"])
    return folder


def chartqa(folder):
    for part, label in (("human", "12%"), ("augmented", "100")):
        rows = [
            {"imgname": f"{part}{i}.png", "query": "How much?", "label": label} for i in range(2)
        ]
        save(folder / "test" / f"test_{part}.json", rows)
        for row in rows:
            picture(folder / "test" / "png" / row["imgname"])
    return folder


def scienceqa(folder):
    def image(i):
        return "image.png" if i % 2 else None

    row = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1}
    save(
        folder / "problems.json",
        {str(i): row | {"hint": "Look." * (i == 3), "image": image(i)} for i in range(5)},
    )
    save(folder / "pid_splits.json", {"test": ["1", "2", "3"], "train": ["0"]})
    for i in (1, 3):
        picture(folder / "images" / "test" / str(i) / "image.png")
    return folder


def ai2d(folder):
    for i in range(3):
        row = {
            "abcLabel": i == 1,
            "answerTexts": ["A", "B", "C", "D"] if i == 1 else ["egg", "fly", "pupa", "moth"],
            "correctAnswer": 2,
        }
        content = {
            "imageName": f"{i}.png",
            "questions": {f"What is {i}?": row | {"questionId": f"{i}.png-0"}},
        }
        save(folder / "questions" / f"{i}.png.json", content)
        picture(folder / ("abc_images" if i == 1 else "images") / f"{i}.png")
    (folder / "ai2d_test_ids.csv").write_text("0\n1\n")
    return folder


def mmbench(folder):
    def cell(i):
        return base64.b64encode(picture(folder / f"{i}.jpg", i).read_bytes()).decode()

    header = "index question hint A B C D answer category l2-category image split".split()
    lines = [header]
    for i in range(3):
        for turn in range(2):
            texts = ["cat", "dog"] if turn == 0 else ["dog", "cat"]
            place = [
                str(i + turn * ROTATION),
                "Which?",
                "Look." if i == 1 else "nan",
                *texts,
                "",
                "",
            ]
            lines.append(
                [*place, "AB"[turn], "kind", "group", cell(i) if turn == 0 else str(i), "dev"]
            )
    path = folder / "mmbench_dev.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines), "utf-8")
    return path


def mme(folder):
    for category, nested in (("existence", True), ("OCR", False), ("code_reasoning", False)):
        for i in range(2):
            lines = (
                f"Is it {i}? Please answer yes or no.\tYes\nIs it red? Please answer yes or"
                " no.\tNo\n"
            )
            texts, images = ("questions_answers_YN", "images") if nested else (".", ".")
            (folder / category / texts).mkdir(parents=True, exist_ok=True)
            (folder / category / texts / f"{i}.txt").write_text(lines)
            picture(folder / category / images / f"{i}.png")
    return folder


def pope(folder):
    for part in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": i,
                "image": f"{i // 2}.jpg",
                "text": "Is there a cat?",
                "label": ["yes", "no"][i % 2],
            }
            for i in range(4)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"coco_pope_{part}.json").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    for i in range(2):
        picture(folder / "val2014" / f"{i}.jpg")
    return folder


def refcoco(folder):
    images = [
        {"id": i, "width": 10, "height": 8, "file_name": f"COCO_train2014_{i}.jpg"}
        for i in range(2)
    ]
    save(
        folder / "instances.json",
        {"images": images, "annotations": [{"id": 5, "image_id": 0, "bbox": [1, 2, 4, 4]}]},
    )
    sentences = [{"sent": "left cat", "sent_id": 1}, {"sent": "the cat", "sent_id": 2}]
    refs = [
        {"ref_id": 1, "ann_id": 5, "image_id": 0, "split": "val", "sentences": sentences},
        {"split": "train"},
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    for image in images:
        picture(folder / "train2014" / image["file_name"])
    return folder


def coco(folder):
    captions = [{"raw": "a red cat on a mat"}, {"raw": "the cat sits"}]
    rows = [
        {"filename": f"{i}.jpg", "filepath": "val2014", "split": s, "sentences": captions}
        for i, s in enumerate(["test", "test", "val"])
    ]
    save(folder / "dataset_coco.json", {"images": rows})
    for i in range(3):
        picture(folder / "val2014" / f"{i}.jpg")
    return folder


def nocaps(folder):
    captions = [{"image_id": i, "caption": f"a red cat number {i}"} for i in range(2)]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)]
    save(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    for i in range(2):
        picture(folder / "images" / f"{i}.jpg")
    return folder


def classes(folder):
    for name in ("black_cat", "dog", "bird"):
        for i in range(12):
            picture(folder / name / f"{i:02d}.jpg", i)
    return folder


def video(folder):
    import av

    for name in ("a", "b"):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / "videos" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for i in range(8):
                frame = av.VideoFrame.from_ndarray(
                    np.full((16, 16, 3), 30 * i, np.uint8), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return save(
        folder / "captions.json",
        [{"video_name": name, "answer": "It grows brighter."} for name in ("a", "b")],
    )


def refcocog(folder):
    refcoco(folder)
    (folder / "refs(unc).p").rename(folder / "refs(umd).p")
    return folder


def flickr30k(folder):
    coco(folder)
    (folder / "dataset_coco.json").rename(folder / "dataset_flickr30k.json")
    (folder / "val2014").rename(folder / "flickr30k-images")
    return folder


WRITERS = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "textvqa-ocr": textvqa,
    "gqa": gqa,
    "docvqa": docvqa,
    "chartqa": chartqa,
    "scienceqa-img": scienceqa,
    "ai2d": ai2d,
    "mmbench-en": mmbench,
    "mmbench-cn": mmbench,
    "mme": mme,
    "pope": pope,
    "refcoco": refcoco,
    "refcoco+": refcoco,
    "refcocog": refcocog,
    "coco": coco,
    "nocaps": nocaps,
    "flickr30k": flickr30k,
    "classes": classes,
    "video-captions": video,
}


def write(task: str, folder: Path):
    """The data of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[task](folder)
