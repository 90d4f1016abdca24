"""Lowest-loss classification: which class name is the likeliest answer. ImageNet, or any folder of
classes.

PATH/CLASS/*.jpg       a class's name is its folder's, "_" as space; or what LOC_synset_mapping.txt,
                       in PATH or beside it, says behind the folder's name ("n01440764 tench, Tinca
                       tinca": the first of them)
PATH/ILSVRC2012_val_*  with ILSVRC2012_devkit_t12/data/, in PATH or beside it: meta.mat,
                       ILSVRC2012_validation_ground_truth.txt

Classes of one name (ImageNet has two of "crane") are one candidate. The paper does not tell its
prompt; ours is ASK, whatever the style."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evlm_jax.data.samples import ImageRef
from evlm_jax.evals.task import Question, Scores, Task, column, percent
from evlm_jax.evals.tasks.official import SUFFIXES, text_lines

ASK = "What is in this image?"
FEW = 10  # images of a class, in the paper's monitors
NAMES, DEVKIT = "LOC_synset_mapping.txt", "ILSVRC2012_devkit_t12/data"


def read(data: Path, split: str, style: str) -> list[Question]:
    """A question for each image, class by class, in order of name; the split "10-per-class" has the
    first of them.
    """
    flat = sorted(data.glob("ILSVRC2012_val_*"))
    questions, seen = [], Counter()
    for kind, name, image in from_devkit(data, flat) if flat else from_folders(data):
        seen[kind] += 1
        if split == "all" or seen[kind] <= FEW:
            key = f"{kind}/{image.name}"
            questions.append(Question(key, ASK, ((ImageRef(str(image)),),), name, key))
    if len({question.answer for question in questions}) < 2:
        raise ValueError(f"classes: {data} must have at least two folders of images")
    return questions


def from_folders(data: Path) -> list[tuple[str, str, Path]]:
    """(class, its name, image) of a folder a class."""
    file, found, names = _near(data, NAMES), [], {}
    for number, line in enumerate(text_lines(file), 1) if file else ():
        folder, space, name = line.partition(" ")
        if not space:
            raise ValueError(f"{file}: row {number}: no name behind {line!r}")
        names[folder] = name.split(",")[0]
    for folder in sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else ():
        if names and folder.name not in names:
            raise ValueError(f"{file}: no row for the folder {folder.name}")
        images = sorted(image for image in folder.iterdir() if image.suffix in SUFFIXES)
        if not images:
            raise ValueError(f"classes: {folder} has no image")
        found += [
            (folder.name, names.get(folder.name, folder.name.replace("_", " ")), image)
            for image in images
        ]
    return found


def from_devkit(data: Path, images: Sequence[Path]) -> list[tuple[str, str, Path]]:
    """(synset, its name, image) of ImageNet's validation set as it comes: image n has the class of
    line n.
    """
    kit = _near(data, DEVKIT)
    if not kit:
        raise ValueError(
            f"classes: {data} holds ImageNet's images; their labels, {DEVKIT}, are neither in it"
            " nor beside it"
        )
    from scipy.io import loadmat

    synsets = {
        int(row["ILSVRC2012_ID"]): row
        for row in loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
    }
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    labels, found = " ".join(text_lines(truth)).split(), []
    for image in images:
        number = int(image.stem.rsplit("_", 1)[1])
        if number > len(labels) or int(labels[number - 1]) not in synsets:
            raise ValueError(f"{truth}: row {number}: no class of meta.mat for {image.name}")
        synset = synsets[int(labels[number - 1])]
        found.append((str(synset["WNID"]), str(synset["words"]).split(",")[0], image))
    return found


def _near(data: Path, name: str) -> Path | None:
    return next((folder / name for folder in (data, data.parent) if (folder / name).exists()), None)


def score(rows: Sequence[dict]) -> Scores:
    """acc@1 and acc@5."""
    ranked, answers = column(rows, "ranking"), column(rows, "answer")

    def hit(most):
        return percent([float(answer in best[:most]) for best, answer in zip(ranked, answers)])

    return Scores({"acc@1": hit(1), "acc@5": hit(5)}, {})


def names(questions: Sequence[Question]) -> list[str]:
    """The candidates."""
    return sorted({question.answer for question in questions})


TASKS = (Task("classes", read, score, ("10-per-class", "all"), candidates=names),)
