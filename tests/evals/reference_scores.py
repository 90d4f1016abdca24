"""Writes reference_scores.json: what scripts that are in no package say about the predictions of
predicted.py.

python -m tests.evals.reference_scores VQA LLAVA QWEN     # clones of GT-Vision-Lab/VQA,
                                                           # haotian-liu/LLaVA, QwenLM/Qwen-VL

The scripts run as they are, but for the prints of Python 2 and for Qwen-VL's model and process
group, of which only the scoring is run."""

import contextlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.evals import predicted


def main(vqa: Path, llava: Path, qwen: Path) -> None:
    """All four."""
    said = predicted.predictions()
    found = {
        "source": "; ".join(
            f"{url}, {path}" for url, path in map(_source, (vqa, llava, qwen), SCRIPTS)
        ),
        "predictions": said,
        "vqa": vqa_per_mille(vqa, said, predicted.ten_answers(said)),
        "pope": pope(llava, said),
        "scienceqa": scienceqa(llava, said),
        "boxes": boxes(qwen, *predicted.grid_boxes(said)),
    }
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(found, ensure_ascii=False, indent=0), "utf-8"
    )


SCRIPTS = ("vqaEval.py", "eval_pope.py and eval_science_qa.py", "evaluate_grounding.py")


def _source(clone: Path, script: str) -> tuple[str, str]:
    head = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout
    return f"{clone.name} {head[:7]}", script


def vqa_per_mille(clone: Path, said: list[str], answers: list[list[str]]) -> list[int]:
    """Accuracy of each prediction."""
    script = (clone / "PythonEvaluationTools/vqaEvaluation/vqaEval.py").read_text("utf-8")
    scope = {}
    exec(re.sub(r'print (".*")', r"print(\1)", script), scope)

    def row(given):
        return [{"answer": answer, "answer_id": i} for i, answer in enumerate(given)]

    truth = {
        i: {"question_type": "", "answer_type": "", "answers": row(given)}
        for i, given in enumerate(answers)
    }

    def holder(entries):
        return SimpleNamespace(qa=entries, getQuesIds=lambda: list(entries))

    evaluation = scope["VQAEval"](
        holder(truth), holder({i: {"answer": text} for i, text in enumerate(said)}), n=6
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return [round(10 * evaluation.evalQA[i]) for i in range(len(said))]


def pope(clone: Path, said: list[str]) -> dict:
    """What each prediction is taken for (y, n), the labels, and the figures that are printed."""
    labels = [random.Random(i).choice(["yes", "no"]) for i in range(len(said))]
    scope, answers, printed = {"__name__": "pope"}, [{"text": text} for text in said], io.StringIO()
    exec((clone / "llava/eval/eval_pope.py").read_text("utf-8"), scope)
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        contextlib.redirect_stdout(printed),
    ):
        file.write("".join(json.dumps({"label": label}) + "\n" for label in labels))
        file.flush()
        scope["eval_pope"](answers, file.name)
    figures = re.findall(
        r"(Accuracy|Precision|Recall|F1 score|Yes ratio): (\S+)", printed.getvalue()
    )

    def letters(texts):
        return "".join(text[0] for text in texts)

    taken = letters(answer["text"] for answer in answers)
    return {
        "answers": taken,
        "labels": letters(labels),
        "figures": {name: float(value) for name, value in figures},
    }


def scienceqa(clone: Path, said: list[str]) -> str:
    """The letter that each prediction is taken for, "-" for none, where there are four choices."""
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), [str(i) for i in range(len(said))]
        (folder / "pid_splits.json").write_text(json.dumps({"test": numbers}))
        (folder / "problems.json").write_text(
            json.dumps({i: {"choices": [*"vwxy"], "answer": 0} for i in numbers})
        )
        lines = (
            json.dumps({"question_id": i, "text": text, "prompt": "<image>"})
            for i, text in zip(numbers, said)
        )
        (folder / "said.jsonl").write_text("".join(line + "\n" for line in lines))
        options = {
            "--base-dir": ".",
            "--result-file": "said.jsonl",
            "--output-file": "o.json",
            "--output-result": "r.json",
        }
        command = [
            sys.executable,
            (clone / "llava/eval/eval_science_qa.py").resolve(),
            *(part for pair in options.items() for part in pair),
        ]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        found = json.loads((folder / "r.json").read_text())["results"]
    return "".join("ABCD"[found[i]] if found[i] >= 0 else "-" for i in numbers)


def boxes(clone: Path, said: list[str], truth: list[list[float]]) -> str:
    """1 where the script counts a prediction as right, on images of 640 x 480."""
    script = (clone / "eval_mm/evaluate_grounding.py").read_text("utf-8")
    overlap = script[script.index("def box_iou") : script.index("def collate_fn")]
    scoring = textwrap.dedent(
        script[script.index("    PATTERN =") : script.index('        print(f"Evaluating')]
    )

    def pixels(box):
        return [side * size for side, size in zip(box, (640, 480, 640, 480))]

    bits, area = (
        [],
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
    )  # torchvision's box_area
    outputs = [
        {"answer": text, "gt_bbox": pixels(box), "hw": (480, 640)} for text, box in zip(said, truth)
    ]
    alone = scoring.replace("torch.distributed.get_rank()", "0").replace(
        "if iou >= 0.5:", "bits.append(iou >= 0.5)\n        if iou >= 0.5:"
    )
    exec(
        overlap + alone,
        {"re": re, "torch": torch, "box_area": area, "merged_outputs": outputs, "bits": bits},
    )
    return "".join("01"[bit] for bit in bits)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
