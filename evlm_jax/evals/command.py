"""What `evlm eval` and `evlm score` do."""

import argparse

import jax

from evlm_jax.checkpoint import store
from evlm_jax.config import MeshConfig
from evlm_jax.config.schema import build
from evlm_jax.evals import results, score, tasks
from evlm_jax.evals.answer import answerer
from evlm_jax.evals.judge import Judge, open_judge
from evlm_jax.evals.runner import evaluate, unjudged
from evlm_jax.evals.task import first
from evlm_jax.parallel.distributed import is_first
from evlm_jax.paths import place, probe_file
from evlm_jax.runs import features_of, load_trained

MESH = {
    "data": -1,
    "fsdp": 1,
    "expert": 1,
    "tensor": 1,
    "slices": 1,
    "zero": 2,
    "frozen": "replicated",
    "images": "all",
}


def run_eval(args: argparse.Namespace) -> None:
    """Answers, scores, saves, and prints the table."""
    task = tasks.find(args.task)
    if args.judge and jax.process_count() > 1:
        raise ValueError(
            "--judge is asked by one process: leave it out here, and give it to `evlm score`"
            " afterwards"
        )
    judge = _judge(args)
    split = args.split or task.splits[0]
    out = place(args.out or place(args.checkpoint) / "evals" / f"{task.name}-{split}.json")
    probe_file(out)
    every = task.questions(args.data, split, args.prompt)
    questions = first(every, args.limit)
    trained = load_trained(args.checkpoint, mesh=mesh_of(args.mesh), rows=args.batch)
    cfg = trained.model.cfg
    if features := features_of(trained):
        features.fill(ref for asked in questions for visual in asked.visuals for ref in visual)
    answer = answerer(
        task, every, trained.model, trained.tokenizer, features, args.batch, trained.layout
    )
    name = f"{place(args.checkpoint).name} step {store.steps(args.checkpoint)[-1]}"
    found = results.provenance(cfg, results.weights_hash(trained.params), name)
    about = {
        "split": split,
        "prompts": args.prompt,
        "template": cfg.data.template,
        "batch": args.batch,
    }
    about |= {key: found[key] for key in ("weights_sha256", "preprocessing")}
    result = evaluate(task, questions, answer, about, out.with_suffix(".jsonl"), judge)
    result = score.scored(result | {"provenance": found})
    if is_first():
        print(f"\n{score.table(result)}\n\n{results.save(out, result)}")


def _judge(args: argparse.Namespace) -> Judge | None:
    if args.judge_model and not args.judge:
        raise ValueError(f"--judge-model {args.judge_model} is of an endpoint: give --judge")
    return open_judge(args.judge, args.judge_model) if args.judge else None


def mesh_of(text: str) -> MeshConfig | None:
    """The mesh of `--mesh`: all devices along `data`, each with the whole model, unless `text` has
    other fields; None where there is one device.

    Raises ValueError for fields and values that config.mesh does not have.
    """
    if jax.device_count() == 1 and not text:
        return None
    given = [field.strip().partition("=")[::2] for field in text.split(",") if field]
    fields = {name: int(value) if value.lstrip("-").isdigit() else value for name, value in given}
    if len(fields) < len(given):
        raise ValueError(f"--mesh {text} has a field twice")
    return build(MeshConfig, MESH | fields, "mesh")


def run_score(args: argparse.Namespace) -> None:
    """Scores saved answers again, without a model, and compares two results where `--against` is
    given.
    """
    result = results.load_answers(args.results)
    task = tasks.find(result["task"])
    if judge := _judge(args):
        rows = result["examples"]
        for i in unjudged(task, rows, judge):
            rows[i].update(judge(task.judge(rows[i])))
    result = score.scored(result)
    print(score.table(result))
    if args.against:
        print(
            f"\n{score.comparison_table(score.compare(results.load_answers(args.against), result))}"
        )
    results.save(args.results, result)
