"""Lowest-loss classification: which class name is the likeliest answer. ImageNet, or any folder of classes.

PATH/CLASS/*.jpg, where a class's name is its folder's, "_" as space; or what LOC_synset_mapping.txt, in PATH or beside it, says behind the
folder's name ("n01440764 tench, Tinca tinca": the first of them). Classes of one name (ImageNet has two of "crane") are one candidate.
The paper does not tell its prompt; ours is ASK, whatever the style.
"""

from collections.abc import Sequence
from pathlib import Path

from evlm_jax.data.samples import ImageRef
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.official import SUFFIXES

ASK = "What is in this image?"
FEW = 10  # images of a class, in the paper's monitors
NAMES = "LOC_synset_mapping.txt"


def read(data: Path, split: str, style: str) -> list[Question]:
    """The images of a class in order of name; the split "10-per-class" takes the first of them."""
    file = next((folder / NAMES for folder in (data, data.parent) if (folder / NAMES).is_file()), None)
    names = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1) if file else ():
        folder, space, name = line.partition(" ")
        if not space:
            raise ValueError(f"{file}: row {number}: no name behind {line!r}")
        names[folder] = name.split(",")[0]
    questions = []
    for folder in sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else ():
        if names and folder.name not in names:
            raise ValueError(f"{file}: no row for the folder {folder.name}")
        images = sorted(image for image in folder.iterdir() if image.suffix in SUFFIXES)
        if not images:
            raise ValueError(f"classes: {folder} has no image")
        for image in images[: FEW if split == "10-per-class" else None]:
            name = f"{folder.name}/{image.name}"
            questions.append(Question(name, ASK, ((ImageRef(str(image)),),), names.get(folder.name, folder.name.replace("_", " ")), name))
    if len({question.answer for question in questions}) < 2:
        raise ValueError(f"classes: {data} must have at least two folders of images")
    return questions


def score(rows: Sequence[dict]) -> Scores:
    """acc@1 and acc@5."""
    ranked, answers = column(rows, "ranking"), column(rows, "answer")
    hit = lambda most: percent([float(answer in best[:most]) for best, answer in zip(ranked, answers)])
    return Scores({"acc@1": hit(1), "acc@5": hit(5)}, {})


def names(questions: Sequence[Question]) -> list[str]:
    """The candidates."""
    return sorted({question.answer for question in questions})


TASKS = (Task("classes", read, score, ("10-per-class", "all"), candidates=names),)
