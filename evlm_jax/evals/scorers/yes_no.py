"""Yes or no: POPE's five figures and MME's accuracy and accuracy+."""

from collections.abc import Hashable, Sequence

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(prediction: str, rule: str) -> str:
    """The answer in a prediction: for "lmms-eval" all of it, in lower case; for "llava" "no" where
    the first sentence has No, no or not.
    """
    if rule == "lmms-eval":
        return prediction.lower().strip()
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(predictions: Sequence[str], labels: Sequence[str], rule: str) -> dict[str, float]:
    """accuracy, precision, recall, f1, yes_ratio; 0 where there is nothing to divide by.

    yes_ratio is of the labels by the rule of lmms-eval, of the predictions by LLaVA's. Labels are
    "yes" or "no"."""
    pairs = [
        (pope_answer(prediction, rule), label)
        for prediction, label in zip(predictions, labels, strict=True)
    ]

    def count(said, label):
        return sum(pair == (said, label) for pair in pairs)

    right, wrong, missed = count("yes", "yes"), count("yes", "no"), count("no", "yes")

    def share(part, whole):
        return part / whole if whole else 0.0

    precision, recall = share(right, right + wrong), share(right, right + missed)
    yes = sum((label if rule == "lmms-eval" else said) == "yes" for said, label in pairs)
    return {
        "accuracy": share(sum(said == label for said, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * precision * recall, precision + recall),
        "yes_ratio": share(yes, len(pairs)),
    }


def mme_answer(prediction: str) -> str:
    """ "yes", "no" or "other", by the first four characters without periods; a single letter y or n
    counts.
    """
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((answer for answer in ("yes", "no") if answer in text[:4]), "other")


def mme(
    predictions: Sequence[str],
    labels: Sequence[str],
    categories: Sequence[str],
    images: Sequence[Hashable],
) -> dict[str, float]:
    """ "perception" (at most 2000), "cognition" (at most 800), and accuracy + accuracy+ of each
    category, at most 200.

    accuracy+ is the share of images with both of their questions right.
    Raises ValueError for an image that has not exactly two questions in its category.
    """
    pairs: dict[str, dict[Hashable, list[bool]]] = {}
    for prediction, label, category, image in zip(
        predictions, labels, categories, images, strict=True
    ):
        pairs.setdefault(category, {}).setdefault(image, []).append(mme_answer(prediction) == label)
    scores = {"perception": 0.0, "cognition": 0.0}
    for category, of_image in pairs.items():
        if odd := [(image, len(right)) for image, right in of_image.items() if len(right) != 2]:
            raise ValueError(
                f"mme: {category}/{odd[0][0]} has {odd[0][1]} questions; every image needs"
                " exactly two"
            )
        scores[category] = sum(
            100 * (sum(right) / 2 + all(right)) for right in of_image.values()
        ) / len(of_image)
        scores["perception" if category in PERCEPTION else "cognition"] += scores[category]
    return scores
