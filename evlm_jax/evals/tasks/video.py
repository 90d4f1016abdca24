"""Descriptions of videos, judged by a strong model on two scores from 0 to 10, verbosity and
accuracy, as the paper does.

PATH is a .json list or a .jsonl of {"video" or "video_name", "question" (may be left out),
"answer": what is to be seen}; the clips lie beside it, in videos/ or in Test_Videos/ (the layout of
VideoDetailCaption).

The paper does not print its prompt for the judge; ours is PROMPT. A judge is any function of a
prompt (evals/judge.py)."""

import re
from collections.abc import Sequence
from pathlib import Path

from evlm_jax.data import video
from evlm_jax.evals.task import Question, Scores, Task
from evlm_jax.evals.tasks.official import json_lines, json_rows

ASK = "Describe this video in detail."
FRAMES = 16  # the paper shows 16
SUFFIXES = ("", ".mp4", ".MP4", ".mkv", ".webm", ".avi")
PROMPT = """Rate a description of a video against what is known to be seen in it.

Known: {answer}

Description: {prediction}

Give two whole numbers from 0 to 10.
Verbosity: how rich and detailed the description is; 0 says nothing, 10 leaves no visible thing out.
Accuracy: how much of what it says is true of the video; 0 is all wrong, 10 is all right.
Reply with these two lines only:
Verbosity: <number>
Accuracy: <number>"""
SCORES = ("verbosity", "accuracy")


def read(data: Path, split: str, style: str) -> list[Question]:
    """One question a clip; its frames are seen together."""
    questions = []
    for row in json_lines(data) if data.suffix == ".jsonl" else json_rows(data):
        name = row["video_name"] if "video_name" in row else row["video"]
        folders = [data.parent / folder for folder in (".", "videos", "Test_Videos")]
        ((ref,),) = row.image(
            *(folder / (name + suffix) for folder in folders for suffix in SUFFIXES)
        )
        try:
            frames = video.sample(ref.path, FRAMES)
        except video.VideoError as error:
            raise row.error(str(error)) from error
        questions.append(
            Question(
                f"{name}-{row.number}",
                row.get("question", ASK),
                (frames,),
                row["answer"],
                name,
                {"frames": FRAMES},
            )
        )
    return questions


def judge(row: dict) -> str:
    """The prompt for the judge."""
    return PROMPT.format(answer=row["answer"], prediction=row["prediction"])


def score(rows: Sequence[dict]) -> Scores:
    """The judge's two scores; rows without a readable reply are counted by cause and left out."""
    replies = [row.get("judgement") for row in rows]
    each = {name: [_read(reply, name) for reply in replies] for name in SCORES}
    whole = {"not judged": float(sum(reply is None for reply in replies))}
    whole["unreadable replies"] = float(
        sum(r is not None and None in (_read(r, name) for name in SCORES) for r in replies)
    )
    return Scores(
        {
            name: values
            for name, values in each.items()
            if any(value is not None for value in values)
        },
        whole,
    )


def _read(reply: str | None, name: str) -> float | None:
    found = re.search(rf"{name}\W*(\d+(?:\.\d+)?)", reply or "", re.IGNORECASE)
    return float(found.group(1)) if found and float(found.group(1)) <= 10 else None


TASKS = (Task("video-captions", read, score, ("all",), tokens=256, judge=judge),)
