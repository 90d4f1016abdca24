"""COCO's own tokens and METEOR: Java programs that come with pycocoevalcap. The other caption
scores are in evals/text_metrics.py.
"""

import importlib.util
import shutil
from collections.abc import Sequence


def has_java() -> bool:
    """Whether both are here."""
    return (
        shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
    )


def coco_tokens(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Predictions and references as the PTB tokenizer cuts them, in lower case and without
    punctuation.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    groups = (
        [[text] for text in predictions] + [list(group) for group in references] + [["end"]]
    )  # so that no last line is empty
    asked = {
        i: [{"caption": " ".join(text.split())} for text in group] for i, group in enumerate(groups)
    }
    done = PTBTokenizer().tokenize(asked)
    tokens = [[line.split() for line in done[i]] for i in range(len(groups))]
    return [group[0] for group in tokens[: len(predictions)]], tokens[len(predictions) : -1]


def meteor(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    """METEOR 1.5 of the corpus, 0 to 1 (English), which is no mean over sentences."""
    from pycocoevalcap.meteor.meteor import Meteor

    line = " ".join
    answered = {i: [line(tokens)] for i, tokens in enumerate(predictions)}
    return Meteor().compute_score(
        {i: [line(tokens) for tokens in group] for i, group in enumerate(references)}, answered
    )[0]
