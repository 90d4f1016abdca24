"""Writes the golden run folders: `PYTHONPATH=. python tests/golden/make.py NAME OUT`, run by the
code whose format they keep.

A folder holds tiny towers, data, an experiment and the run itself, cut off after six of twelve
updates behind an unfreezing; and in expected.json what its own code did next: hashes of what it
restores, of the next three batches and of its export, and the losses of three further updates. They
are made once for a format and never again: tests/test_golden.py holds later code against them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = {
    "dense": dict(),
    "experts": dict(
        moe=dict(copies=2, slices=2, top_k=2), train=dict(frozen_dtype="bfloat16", accumulate=2)
    ),
}
EXPERIMENT = '''import json

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads("""{text}"""), convert_dict=True)
'''
STOP, LATER = 6, 3  # updates of the saved run, and of its continuation


def sha(array) -> str:
    """Hash of dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()[
        :20
    ]


def data(folder: Path) -> None:
    """Twelve pictures with captions, and dialogs about them, one of them without a picture."""
    rng, rows = np.random.default_rng(0), []
    colours = {"red": (200, 30, 60), "green": (20, 180, 40), "blue": (30, 60, 210)}
    (folder / "pictures").mkdir(parents=True)
    for i in range(12):
        word = list(colours)[i % 3]
        pixels = np.clip(rng.normal(colours[word], 25, (20 + i, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"a {word} thing {i}")
        turns = [{"from": "human", "value": "<image>which"}, {"from": "gpt", "value": word}]
        rows.append({"id": f"r{i}", "image": f"pictures/{i}.png", "conversations": turns})
    rows.append(
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "say b"}, {"from": "gpt", "value": "b"}],
        }
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, name: str):
    """The tiny config over these data, its towers written; and its phases:
    the upper ViT is trained from update 3 on.
    """
    from evlm_jax.config import Phase, Rule, to_dict
    from tests.helpers.checkpoints import dinov2_directory, llama_directory
    from tests.helpers.tiny import CROSS_ONLY, UPPER_VIT, tiny_config

    sources = dict(
        sources=("llava:rows.jsonl", "folder:pictures"),
        weights=(2.0, 1.0),
        window=4,
        length=96,
        targets=48,
        block_pairs=24,
    )
    form = FORMS[name]
    train = dict(steps=12, save_every=3, keep=1) | form.get("train", {})
    cfg = tiny_config(
        data=sources,
        train=train,
        vit=dict(cuts=(2,)),
        **{k: v for k, v in form.items() if k != "train"},
    )
    phases = [(0.0, CROSS_ONLY), (0.25, UPPER_VIT)]
    phases = tuple(
        Phase(start=start, warmup=2, rules=tuple(Rule(**rule) for rule in rules))
        for start, rules in phases
    )
    cfg = replace(
        cfg,
        optim=replace(cfg.optim, phases=phases),
        init=replace(cfg.init, vision="vision", llm="llm"),
    )
    dinov2_directory(folder / "vision", cfg)
    llama_directory(folder / "llm", cfg)
    (folder / "experiment.py").write_text(
        EXPERIMENT.format(text=json.dumps(to_dict(cfg), indent=1).replace("\\", "\\\\"))
    )
    return cfg


def run(cfg) -> None:
    """The run, cut off by SIGTERM at an update that is saved."""
    from evlm_jax.checkpoint.store import steps
    from evlm_jax.convert.engine import load_towers
    from evlm_jax.data.pipeline import batches
    from evlm_jax.data.tokenizer import keep_tokenizer, load_tokenizer
    from evlm_jax.parallel.status import Stopped
    from evlm_jax.train import train

    def stop(step, model):
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    tokenizer = load_tokenizer(cfg.init.llm)
    keep_tokenizer(tokenizer, "run")
    with contextlib.closing(batches(cfg, tokenizer)) as stream, contextlib.suppress(Stopped):
        train(cfg, "run", stream, load_towers(cfg), on_step=stop)
    assert steps("run") == [STOP]


def expected(cfg) -> dict:
    """What this code does with the run, in a copy of it."""
    from evlm_jax.checkpoint import store
    from evlm_jax.convert.export import export
    from evlm_jax.data.pipeline import batches
    from evlm_jax.data.tokenizer import load_tokenizer
    from evlm_jax.launch import train_run

    snapshot, found = store.read("run"), {}
    for part in ("params", "frozen", "groups"):
        found[part] = {name: sha(array) for name, array in sorted(getattr(snapshot, part).items())}
    found["data"] = snapshot.meta["data"]
    with contextlib.closing(batches(cfg, load_tokenizer(cfg.init.llm))) as stream:
        stream.set_state(snapshot.meta["data"])
        made = [next(stream)[0] for _ in range(LATER)]
    found["batches"] = [
        {name: sha(x) for name, x in batch._asdict().items() if x is not None} for batch in made
    ]
    for form in ("hf", "torch"):
        export("run", f"export-{form}", form)
        found[form] = {
            name: sha(array) for name, array in sorted(exported(Path(f"export-{form}")).items())
        }
        shutil.rmtree(f"export-{form}")
    shutil.copytree("run", "further")
    train_run(replace(cfg, train=replace(cfg.train, monitors=())), "further")
    lines = [json.loads(line) for line in Path("further/metrics.jsonl").read_text().splitlines()]
    found["losses"] = {
        str(line["step"]): line["loss"]
        for line in lines
        if "loss" in line and STOP < line["step"] <= STOP + LATER
    }
    shutil.rmtree("further")
    return found


def exported(folder: Path) -> dict:
    """Tensors of an export, read by the safetensors library or by torch."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted([*folder.rglob("*.pt"), *folder.rglob("*.bin"), *folder.rglob("*.pth")]):
        tensors |= torch.load(file, weights_only=True)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def main(name: str, out: str) -> None:
    """Writes OUT."""
    folder = Path(out).absolute()
    data(folder)
    cfg = config(folder, name)
    os.chdir(folder)
    run(cfg)
    (folder / "expected.json").write_text(json.dumps(expected(cfg), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
