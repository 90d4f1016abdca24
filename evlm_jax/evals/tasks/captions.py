"""COCO, NoCaps and Flickr30k: one sentence about a photograph, against several.

coco        karpathy-test: dataset_coco.json; val2014, val2017: captions_SPLIT.json (in annotations/
            or not); images in val2014/, val2017/
nocaps      nocaps_val_4500_captions.json, images/
flickr30k   dataset_flickr30k.json, flickr30k-images/
"""

from collections.abc import Sequence
from pathlib import Path

from evlm_jax.evals.scorers.captions import coco_tokens, has_java, meteor
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.official import Entry, json_rows
from evlm_jax.evals.text_metrics import bleu, cider, exact_match, rouge_l, words

ASK = {"qwen-vl": "Describe the image in English:"}
DEFAULT = "Provide a one-sentence caption for the provided image."


def ask(row: Entry, key: str, captions: list[str], style: str, *places: Path) -> Question:
    """The question about one image."""
    if not captions:
        raise row.error("0 captions, there must be at least one")
    return Question(key, ASK.get(style, DEFAULT), row.image(*places), captions, key)


def read_karpathy(file: Path, split: str, style: str, images: Path) -> list[Question]:
    """Karpathy's layout: {"images": [{"filename", "filepath", "split", "sentences":
    [{"raw"}]}]}.
    """
    questions = []
    for row in json_rows(file, "images"):
        if row["split"] == split:
            places = [images / row.get("filepath", ".") / row["filename"], images / row["filename"]]
            questions.append(
                ask(
                    row,
                    row["filename"],
                    [sentence["raw"] for sentence in row["sentences"]],
                    style,
                    *places,
                )
            )
    return questions


def read_coco_style(file: Path, style: str, *folders: Path) -> list[Question]:
    """COCO's layout: {"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}.
    """
    captions: dict[object, list[str]] = {}
    for row in json_rows(file, "annotations"):
        captions.setdefault(row["image_id"], []).append(row["caption"])
    rows = json_rows(file, "images")

    def places(row):
        return (folder / row["file_name"] for folder in folders)

    return [
        ask(row, row["file_name"], captions.get(row["id"], []), style, *places(row)) for row in rows
    ]


def read_coco(data: Path, split: str, style: str) -> list[Question]:
    """Karpathy's test images, or a whole validation set."""
    if split == "karpathy-test":
        return read_karpathy(data / "dataset_coco.json", "test", style, data)
    name = f"captions_{split}.json"
    nested = data / "annotations" / name
    return read_coco_style(
        nested if nested.is_file() else data / name, style, data / split, data / "images"
    )


def read_nocaps(data: Path, split: str, style: str) -> list[Question]:
    """Questions of all domains."""
    return read_coco_style(
        data / f"nocaps_{split}_4500_captions.json", style, data / "images", data / split
    )


def read_flickr30k(data: Path, split: str, style: str) -> list[Question]:
    """Questions of Karpathy's split."""
    return read_karpathy(data / "dataset_flickr30k.json", split, style, data / "flickr30k-images")


def score(rows: Sequence[dict]) -> Scores:
    """Exact match, ROUGE-L, CIDEr-D, BLEU on the tokens of `words`; where Java and pycocoevalcap
    are, on COCO's own too, and METEOR.
    """
    scores = score_words(rows)
    if not has_java():
        return scores
    tokens = coco_tokens(column(rows, "prediction"), column(rows, "answer"))
    of_coco = by_rule("coco", *tokens)
    return Scores(
        scores.each | of_coco.each,
        scores.whole | of_coco.whole | {"METEOR (coco)": 100 * meteor(*tokens)},
    )


def score_words(rows: Sequence[dict]) -> Scores:
    """The same on the tokens of `words` alone. The answer of a row is a list of captions."""
    references = [[words(text) for text in given] for given in column(rows, "answer")]
    return by_rule("words", [words(text) for text in column(rows, "prediction")], references)


def by_rule(rule: str, said: list[list[str]], references: list[list[list[str]]]) -> Scores:
    """Scores of tokens, each named with the rule that cut them."""
    metrics = {"exact match": exact_match, "ROUGE-L": rouge_l, "CIDEr": cider}
    each = {
        f"{name} ({rule})": percent(metric(said, references)) for name, metric in metrics.items()
    }
    return Scores(
        each,
        {f"BLEU-{n} ({rule})": 100 * value for n, value in enumerate(bleu(said, references), 1)},
    )


TASKS = (
    Task("coco", read_coco, score, ("karpathy-test", "val2014", "val2017"), tokens=64),
    Task("nocaps", read_nocaps, score, ("val",), tokens=64),
    Task("flickr30k", read_flickr30k, score, ("test", "val"), tokens=64),
)
