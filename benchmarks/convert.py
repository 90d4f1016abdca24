"""Conversion of a large model, both ways: `python -m benchmarks.convert --dir DIR [--layers 26]
[--peer]`.

Writes towers of the paper's sizes with random bits (EVA02-CLIP-E+ in the EVA repository's names,
Qwen 1.0), then runs the commands as a user would: import, export, import of the export. Prints
seconds, MB/s, peak resident memory and the ratio to a plain copy of the same bytes on the same
disk; checks every tensor's hash. DIR needs three times the bytes printed first. With --peer: a
language model of about 2.5 GB through our import and export beside transformers' from_pretrained
and save_pretrained, by turns."""

import argparse
import base64
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from benchmarks import parser
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, digest
from evlm_jax.checkpoint.safetensors_file import write_folder
from evlm_jax.checkpoint.store import open_params
from evlm_jax.config import EVLMConfig
from evlm_jax.config.load import load_config
from evlm_jax.convert.engine import parameter_shapes, sizes, to_foreign
from evlm_jax.convert.export import describe_llm
from evlm_jax.convert.tables import FAMILIES

BF16 = np.dtype(ml_dtypes.bfloat16)
MEASURED = """
import resource, subprocess, sys, time
since = time.monotonic()
code = subprocess.run(sys.argv[1:]).returncode
print("measured", time.monotonic() - since, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random bits of finite bfloat16 numbers, a function of the name."""

    def read():
        rng = np.random.Generator(
            np.random.SFC64(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        )
        return (
            (np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & 0xBFFF)
            .view(BF16)
            .reshape(shape)
        )

    return Tensor(shape, BF16, read)


def random_tower(cfg: EVLMConfig, tower: str) -> Tensors:
    """All tensors of "vit" or "llm", by canonical name."""
    return {
        name: random_tensor(name, shape)
        for name, shape in parameter_shapes(cfg).items()
        if name.startswith(f"{tower}/")
    }


def write_source(
    folder: Path, cfg: EVLMConfig, tower: str, family: str, prefix: str, config: dict
) -> int:
    """A foreign directory; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = to_foreign(
        next(f for f in FAMILIES if f.name == family), random_tower(cfg, tower), sizes(cfg, tower)
    )
    write_folder(folder, {prefix + name: tensor for name, tensor in foreign.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return size(folder)


def eva_config(cfg: EVLMConfig) -> dict:
    """config.json of EVA02-CLIP, as open_clip has it."""
    vit = cfg.vit
    sizes_ = {
        "layers": vit.depth,
        "width": vit.width,
        "head_width": vit.width // vit.heads,
        "patch_size": vit.patch,
    }
    return {
        "vision_cfg": (
            sizes_
            | {
                "image_size": vit.pretrained_size,
                "mlp_ratio": vit.mlp / vit.width,
                "postnorm": True,
            }
        )
    }


def qwen_config(cfg: EVLMConfig) -> dict:
    """config.json of Qwen 1.0."""
    llm = cfg.llm
    sizes_ = {
        "model_type": "qwen",
        "hidden_size": llm.hidden,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "kv_channels": llm.head_dim,
    }
    sizes_ |= {
        "vocab_size": llm.vocab,
        "intermediate_size": 2 * llm.mlp,
        "rotary_emb_base": llm.rope_theta,
        "seq_length": 2048,
    }
    return sizes_ | {
        "layer_norm_epsilon": llm.eps,
        "tie_word_embeddings": llm.tied,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


def write_tiktoken(folder: Path) -> None:
    """The smallest vocabulary of Qwen 1.0's form: single bytes."""
    lines = (base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256))
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")


def size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy(folders: list[Path], aside: Path) -> float:
    """Seconds of copying the files of `folders` and bringing them to the disk; each copy is removed
    at once.
    """
    seconds = 0.0
    for path in (
        path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
    ):
        since = time.monotonic()
        shutil.copyfile(path, aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        seconds += time.monotonic() - since
        aside.unlink()
    return seconds


def measured(*command: str) -> tuple[float, float]:
    """Seconds, the disk's included, and peak resident GiB of a command."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    since = time.monotonic()
    os.sync()
    _, seconds, kilobytes = done.stdout.strip().splitlines()[-1].split()
    return float(seconds) + time.monotonic() - since, int(kilobytes) / 2**20


def evlm(*arguments: str | Path) -> tuple[float, float]:
    """A command of ours."""
    return measured(sys.executable, "-m", "evlm_jax", "convert", *map(str, arguments))


def report(what: str, seconds: float, count: int, memory: float, plain: float) -> None:
    """One line."""
    line = (
        f"{what:<22}{seconds:8.1f} s{count / 1e6 / seconds:9.0f} MB/s   {seconds / plain:5.2f} x a"
        f" plain copy   peak {memory:.2f} GiB"
    )
    print(line, flush=True)


SMOKE = (
    "vit.depth=2 vit.width=224 vit.heads=2 vit.mlp=256 vit.taps=(2,) vit.cuts=() llm.hidden=64"
    " llm.layers=2 llm.heads=4 llm.kv_heads=4 llm.head_dim=16 llm.mlp=96 xattn.heads=2"
    " xattn.kv_heads=2 xattn.ffn=64"
).split()


def write_towers(cfg: EVLMConfig, vision: Path, llm: Path) -> int:
    """Both towers as others write them; returns their bytes."""
    total = write_source(vision, cfg, "vit", "eva02", "visual.", eva_config(cfg))
    total += write_source(llm, cfg, "llm", "qwen", "", qwen_config(cfg))
    write_tiktoken(llm)
    stacked = max(
        np.prod(shape) * 2 * cfg.llm.layers
        for name, shape in parameter_shapes(cfg).items()
        if "layers/0" in name
    )
    print(
        f"towers: {total / 1e9:.1f} GB, {total / 2e9:.2f} B parameters, largest stacked leaf"
        f" {stacked / 2**30:.2f} GiB",
        flush=True,
    )
    return total


def compare(cfg: EVLMConfig, imported: Path) -> None:
    """Says how many tensors have the bits of their source."""
    params, _ = open_params(str(imported))
    expected = random_tower(cfg, "vit") | random_tower(cfg, "llm")
    same = sum(
        digest(tensor.read()) == digest(params[name].read()) for name, tensor in expected.items()
    )
    print(f"imported: {same} of {len(expected)} tensors have the bits of their source", flush=True)


def large(args: argparse.Namespace) -> None:
    """Import, export, import of the export."""
    spec = "experiments/evlm_14b.py:pretrain"
    layers = (
        [f"--config.{field}" for field in SMOKE]
        if args.smoke
        else [f"--config.llm.layers={args.layers}"]
    )
    cfg, root = load_config(spec, layers), Path(args.dir)
    vision, llm, first, out, again = (
        root / name for name in ("vision", "llm", "imported", "exported", "again")
    )
    total = write_towers(cfg, vision, llm)
    plain = copy([vision, llm], root / "copy")
    report("plain copy", plain, total, 0, plain)
    towers = ("--vision", vision, "--llm", llm)
    seconds, memory = evlm("import", "--config", spec, *towers, "--out", first, *layers)
    whole = size(first)
    report("import", seconds, whole, memory, plain * whole / total)
    compare(cfg, first)
    shutil.rmtree(vision)
    for path in llm.glob("*.safetensors*"):  # the tokenizer is read again
        path.unlink()
    before = manifest(first)
    seconds, memory = evlm("export", "--checkpoint", first, "--out", out, "--format", "hf")
    report("export", seconds, whole, memory, plain * whole / total)
    shutil.rmtree(first)
    seconds, memory = evlm("import", "--config", spec, "--model", out, "--out", again, *layers)
    report("import of the export", seconds, whole, memory, plain * whole / total)
    after = manifest(again)
    print(
        f"there and back: {sum(after[name] == value for name, value in before.items())} of"
        f" {len(before)} tensors are the same"
    )
    shutil.rmtree(out), shutil.rmtree(again)


QWEN_1B = dict(hidden=1536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp=8960)  # 2.5-1.5B
TRANSFORMERS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def clip_config(cfg: EVLMConfig) -> dict:
    """config.json of CLIP's vision tower."""
    vit = cfg.vit
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vit.width,
        "num_hidden_layers": 1,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp,
        "image_size": vit.image_size,
        "patch_size": vit.patch,
        "layer_norm_eps": vit.eps,
        "hidden_act": vit.activation,
    }


def peer(args: argparse.Namespace) -> None:
    """A language model through our import and export, and through transformers, three times by
    turns.
    """
    spec, changes = (
        "experiments/evlm_1b.py:pretrain",
        [f"--config.llm.{key}={value}" for key, value in QWEN_1B.items()],
    )
    changes += [
        "--config.xattn.every=28",
        "--config.vit.depth=1",
        "--config.vit.taps=(1,)",
        "--config.vit.cuts=()",
        "--config.media.placeholder=<|extra_0|>",
    ]
    cfg, root = load_config(spec, changes), Path(args.dir)
    vision, llm = root / "vision", root / "llm"
    write_source(vision, cfg, "vit", "clip", "", clip_config(cfg))
    stock = describe_llm(cfg, SimpleNamespace(eos=(256,), bos=(), ids=range(256)), "bfloat16")[
        "config.json"
    ]
    count = write_source(llm, cfg, "llm", "llama", "", stock)
    write_tiktoken(llm)
    seconds = {"import": [], "export": [], "transformers": []}
    towers = ("--vision", vision, "--llm", llm)
    place, out = root / "imported", root / "exported"
    run = {
        "import": lambda: evlm("import", "--config", spec, *towers, "--out", place, *changes),
        "export": lambda: evlm("export", "--checkpoint", place, "--out", out, "--format", "llm"),
        "transformers": lambda: measured(
            sys.executable, "-c", TRANSFORMERS, str(llm), str(root / "saved")
        ),
    }
    for turn in range(3):
        for folder in ("imported", "exported", "saved"):
            shutil.rmtree(root / folder, ignore_errors=True)
        for name, command in run.items():
            taken, memory = command()
            seconds[name].append(taken)
            print(
                f"turn {turn}: {name:<14}{taken:7.1f} s  {count / 1e6 / taken:6.0f} MB/s  peak"
                f" {memory:.2f} GiB",
                flush=True,
            )
    ours, theirs_ = (statistics.median(seconds[name]) for name in ("import", "transformers"))
    export = statistics.median(seconds["export"])
    print(
        f"{count / 1e9:.2f} GB, medians: import {ours / theirs_:.2f}, export {export / theirs_:.2f}"
        " of from_pretrained + save_pretrained"
    )


def manifest(workdir: Path) -> dict[str, str]:
    """Hashes of an imported checkpoint."""
    (store,) = (workdir / "frozen").iterdir()
    return json.loads((store / "manifest.json").read_text())


def main() -> None:
    """Runs what is asked for."""
    asked = parser(__doc__)
    asked.add_argument("--dir", help="new directory on the disk to be measured")
    asked.add_argument(
        "--layers", type=int, default=26, help="of the language model; the paper's has 40"
    )
    asked.add_argument(
        "--peer", action="store_true", help="the comparison with transformers instead"
    )
    args = asked.parse_args()
    if not args.dir and not args.smoke:
        asked.error("give --dir")
    with tempfile.TemporaryDirectory() as aside:
        args.dir = args.dir or aside
        (peer if args.peer else large)(args)


if __name__ == "__main__":
    main()
