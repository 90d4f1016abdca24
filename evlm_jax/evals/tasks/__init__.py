"""Benchmarks by name."""

from evlm_jax.evals.task import Task
from evlm_jax.evals.tasks import (
    boxes,
    captions,
    choices,
    classes,
    demo,
    documents,
    mmbench,
    scenes,
    video,
    vqa,
    yes_no,
)

FAMILIES = (vqa, documents, choices, mmbench, yes_no, boxes, captions, classes, video, demo, scenes)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}


def find(name: str) -> Task:
    """The task of this name. Raises ValueError with all names for another."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; use one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
