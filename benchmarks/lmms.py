"""easy-vqa by `evlm eval` and by lmms-eval's own command line, offline: the same checkpoint,
questions and rule, and whether they agree.

python -m benchmarks.lmms --checkpoint runs/demo --questions 1000
    # through the plug-in evlm_jax
python -m benchmarks.lmms --checkpoint runs/demo --questions 300 --export mine_hf
    # and through evlm_hf: what `evlm convert export` wrote
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import parser
from evlm_jax.evals import results, tasks
from evlm_jax.evals.task import Task

TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function look.look
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {tokens}, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, \
ignore_punctuation: true}}
"""
LOOK = "from PIL import Image\n\n\ndef look(doc):\n    return [Image.open(doc['path'])]\n"
BATCH = 8
GOLDEN = "tests/golden/format0_dense"


def write(folder: Path, task: Task, data: Path | None, examples: list[dict]) -> None:
    """A task of one image a question as one of lmms-eval: the questions of a result file, in their
    order.
    """
    paths = {asked.id: asked.visuals[0][0].path for asked in task.questions(data, None)}
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": row["prompt"], "answer": row["answer"], "path": paths[row["id"]]}
        for row in examples
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ours.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", tokens=task.tokens))
    (folder / "look.py").write_text(LOOK)


def lmms_eval(folder: Path, model: str, arguments: str) -> tuple[float, list[str]]:
    """(percent that lmms-eval says, the answers it was given)."""
    out = folder / model
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        model,
        "--model_args",
        arguments,
        "--tasks",
        "ours",
        "--log_samples",
    ]
    command += [
        "--include_path",
        str(folder),
        "--batch_size",
        str(BATCH),
        "--output_path",
        str(out),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(command, env=os.environ | offline, check=True)
    (said,), (samples,) = out.rglob("*results.json"), out.rglob("*samples*.jsonl")
    logged = sorted(
        map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return 100 * json.loads(said.read_text())["results"]["ours"]["exact_match,none"], [
        row["filtered_resps"] for row in logged
    ]


def main() -> None:
    """Runs all and prints a line each."""
    asked = parser(__doc__)
    asked.add_argument("--checkpoint")
    asked.add_argument(
        "--export", help="directory of `evlm convert export --format hf` of the same checkpoint"
    )
    asked.add_argument("--questions", type=int, default=1000)
    args = asked.parse_args()
    if not args.checkpoint and not args.smoke:
        asked.error("give --checkpoint")
    models = {"evlm_jax": f"checkpoint={args.checkpoint}"} | (
        {"evlm_hf": f"pretrained={args.export}"} if args.export else {}
    )
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, out = Path(name), Path(name) / "ours.json"
        if (
            args.smoke
        ):  # the tiny run that the tests keep, a few questions, and what lmms-eval would be given
            shutil.copytree(GOLDEN, folder / "golden")
            stack.enter_context(contextlib.chdir(folder / "golden"))  # its paths are relative
            args.checkpoint, args.questions, models = "run", 4, {}
        command = [
            sys.executable,
            "-m",
            "evlm_jax",
            "eval",
            "--checkpoint",
            args.checkpoint,
            "--task",
            "easy-vqa",
            "--out",
            str(out),
        ]
        subprocess.run(
            [*command, "--limit", str(args.questions), "--batch", str(BATCH)], check=True
        )
        result = results.load(out)
        examples = result["examples"]
        write(folder, tasks.find("easy-vqa"), None, examples)
        told = {model: lmms_eval(folder, model, arguments) for model, arguments in models.items()}
    (ours,) = (row["value"] for row in result["scores"] if row["metric"] == "accuracy")
    print(f"\nevlm eval: {ours!r}% of {len(examples):,} questions")
    for model, (value, answers) in told.items():
        differ = [
            (row, said)
            for row, said in zip(examples, answers, strict=True)
            if row["prediction"] != said
        ]
        print(
            f"lmms-eval, --model {model}: {value!r}%; {len(examples) - len(differ):,} answers are"
            " the same"
        )
        for row, said in differ:
            print(f"  {row['id']} {row['prompt']!r}: {said!r}, evlm eval {row['prediction']!r}")


if __name__ == "__main__":
    main()
