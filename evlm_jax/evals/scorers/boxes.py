"""Boxes named in text: what stands there, and how much of it is right.

Boxes are (left, top, right, bottom), 0 to 1 of the image.
"""

import re
from collections.abc import Sequence

Box = Sequence[float]
BRACKETS = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
PAIRS = re.compile(r"\((.*?)\),\((.*?)\)")
GRID = 999  # Qwen-VL's


def read_box(text: str, rule: str) -> tuple[float, float, float, float]:
    """The first box of a text, or the empty one at 0.

    Rules: "lmms-eval", `[0.1, 0.2, 0.3, 0.4]`; "qwen-vl", `<box>(100,200),(300,400)</box>` on a
    grid of 999."""
    if rule == "lmms-eval":
        found = BRACKETS.search(text)
        return tuple(map(float, found.groups())) if found else (0.0,) * 4
    try:
        first, second = PAIRS.search(text).groups()
        (left, top), (right, bottom) = map(float, first.split(",")), map(float, second.split(","))
    except (AttributeError, ValueError):  # no box, or no two numbers in a corner
        return (0.0,) * 4
    return left / GRID, top / GRID, right / GRID, bottom / GRID


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where both are empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union else 0.0


def overlaps(predictions: Sequence[str], boxes: Sequence[Box], rule: str) -> list[float]:
    """IoU of each prediction with its box; RefCOCO counts one as right from 0.5 on."""
    return [
        iou(box, read_box(prediction, rule))
        for prediction, box in zip(predictions, boxes, strict=True)
    ]
