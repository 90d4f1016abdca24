"""Adapters in the format of PEFT, there and back: a folder with adapter_config.json and
adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight     [out, rank]

Between the first prefix and `.lora_A` stands the name of a module, which the tables of exports and
imports know. A module that holds several of our matrices has one adapter for all of them, which is
none of ours: refused by name."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from evlm_jax.checkpoint import store
from evlm_jax.checkpoint.lazy_tensors import Tensor, Tensors, read_json
from evlm_jax.checkpoint.safetensors_file import finite, read_safetensors, write_safetensors
from evlm_jax.config import EVLMConfig, LoRAConfig
from evlm_jax.convert.engine import FLOATS, parameter_shapes
from evlm_jax.convert.naming import LINEAR, Family
from evlm_jax.convert.tables import FAMILIES
from evlm_jax.data.tokenizer import source_of_run
from evlm_jax.models.lora import is_adapter
from evlm_jax.paths import place, write
from evlm_jax.runs import write_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Fields that change nothing of what is computed here: the tensors say which modules there are,
# dropout is of training, the last two count only beside fields that are refused.
INERT = frozenset(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode"
    " target_modules exclude_modules layers_to_transform layers_pattern lora_dropout"
    " megatron_core qalora_group_size".split()
)
READ = frozenset(("r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"))
STARTS = (True, False, "gaussian")  # what others make of a kernel is no longer the base's


# ---------------------------------------------------------------------------------------------- out


def export_adapters(folder: epath.Path, tensors: Tensors, cfg: EVLMConfig, family: Family) -> None:
    """Writes the adapters among `tensors` for a model in the names of `family`.

    Raises:
      ValueError: there are none; one stands where the family has no module of its own.
    """
    if not cfg.lora.patterns:
        raise ValueError("export: the checkpoint has no adapters: use another --format")
    out, adapted = {}, set()
    for name in filter(is_adapter, tensors):
        kernel, _, side = name.rpartition("/")
        if (module := _module(family, f"{kernel}/kernel")) is None:
            raise ValueError(
                f"export: {family.name} has no module of its own for {kernel}, beside which an"
                " adapter stands: use another --format, into which adapters are merged"
            )
        adapted.add(module)
        out[f"{PREFIX}{module}.{SIDES[side]}.weight"] = transposed(tensors[name])
    modules = {_module(family, name) for name in tensors if name.endswith("/kernel")} - {None}
    write(folder / CONFIG, json.dumps(_described(cfg.lora, adapted, modules), indent=2) + "\n")
    write_safetensors(folder / WEIGHTS, out)


def _described(lora: LoRAConfig, adapted: set[str], modules: set[str]) -> dict[str, Any]:
    """adapter_config.json; modules go by their last name where all of that name are adapted."""

    def last(module):
        return module.rpartition(".")[2]

    partly = set(map(last, modules - adapted))
    targets = {module if last(module) in partly else last(module) for module in adapted}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(targets),
    }


def _module(family: Family, kernel: str) -> str | None:
    """The module of a family whose weight is this kernel, transposed, and nothing else."""
    for row in family.rows:
        found = row.pattern == LINEAR and len(row.paths) == 1 and row.unmatch(kernel)
        if found:
            return found[0].removesuffix(".weight")
    return None


def transposed(tensor: Tensor) -> Tensor:
    """A matrix [in, out] as [out, in], or back."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


# ----------------------------------------------------------------------------------------------- in


def adapt_run(source: str, adapter: str, out: str, step: int | None = None) -> None:
    """Writes the newest (or given) step of a run, and beside its matrices the adapters of a folder
    of PEFT, as a model: to train on, to merge, to answer with.

    Raises:
      FileExistsError: `out` exists.
      ValueError: the run has adapters; the folder's say what cannot be computed here, or stand
        beside what the model has not; all named.
    """
    tensors, cfg = store.open_params(source, step)
    if cfg.lora.patterns:
        raise ValueError(f"{source} has adapters: merge them first, with `evlm convert merge`")
    folder = place(adapter)
    lora = read_config(folder / CONFIG)
    kernels = {name for name in parameter_shapes(cfg) if name.endswith("/kernel")}
    found = to_canonical(folder / WEIGHTS, kernels)
    cfg = replace(cfg, lora=replace(lora, patterns=patterns_of(found, kernels)))
    _check(folder / WEIGHTS, found, cfg)
    plan = {"source": store.identity(source, step), "adapter": str(folder)}
    trained = store.trained(source, step) | found.keys()
    origin = {"adapted": source, "adapter": str(folder)}
    tokenizer = source_of_run(source, cfg.init.llm)
    write_model(cfg, {**tensors, **found}, out, plan, tokenizer, origin, trained)


def read_config(path: epath.Path) -> LoRAConfig:
    """Rank and alpha of an adapter_config.json.

    Raises:
      ValueError: it is of another method; a field says what is not computed here, or is not known
        and says anything but null, false or nothing; each is named.
    """
    said = read_json(path)
    if said.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {said.get('peft_type')!r}; LORA alone is read")
    rank, alpha = (_number(path, said, name) for name in ("r", "lora_alpha"))
    if rank != int(rank):
        raise ValueError(f"{path}: r is {rank}, which is no whole number")
    allowed = {"bias": ("none",), "use_rslora": (True, False), "init_lora_weights": STARTS}
    problems = [
        f"{name} = {said[name]!r}"
        for name in said
        if name not in INERT
        and (name not in READ or said[name] not in allowed.get(name, (said[name],)))
        and said[name] not in (None, False, [], {}, "")
    ]
    if problems:
        raise ValueError(f"{path} says {', '.join(problems)}, which is not computed here")
    # rsLoRA counts the product alpha / sqrt(rank) times.
    return LoRAConfig((), int(rank), alpha * (rank**0.5 if said.get("use_rslora") else 1.0))


def _number(path: epath.Path, said: Mapping[str, Any], name: str) -> float:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < np.inf:
        raise ValueError(f"{path}: {name} is {value!r}; it must be a positive number")
    return float(value)


def to_canonical(path: epath.Path, kernels: Collection[str]) -> dict[str, Tensor]:
    """Adapters of a file of PEFT by canonical name, for a model with these kernels: as the first
    family has them that has a place for each.

    Raises ValueError listing what no family has a place for.
    """
    tensors, lost = read_safetensors(path), []
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    for family in FAMILIES:
        places = {name: _place(family, name, kernels) for name in tensors}
        lost.append([name for name, ours in places.items() if ours is None])
        if not lost[-1]:
            return {
                ours: transposed(finite(path, name, tensors[name])) for name, ours in places.items()
            }
    raise ValueError(
        f"{path}: the model has no projection of its own beside which these stand:\n  "
        + "\n  ".join(min(lost, key=len))
    )


def _place(family: Family, name: str, kernels: Collection[str]) -> str | None:
    """Canonical name of a tensor of PEFT, for a model in the names of `family`."""
    found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", name)
    for prefix in family.prefixes if found else ():
        if found[1].startswith(prefix):
            foreign = found[1].removeprefix(prefix) + ".weight"
            names = [row.match(foreign) for row in family.rows if row.pattern == LINEAR]
            for kernel, *others in filter(None, names):
                if kernel in kernels and not others:
                    return f"{kernel.removesuffix('/kernel')}/{found[2].lower()}"
    return None


def patterns_of(adapters: Iterable[str], kernels: Iterable[str]) -> tuple[str, ...]:
    """Patterns of LoRAConfig that choose those of the kernels beside which adapters stand."""
    chosen = {f"{name.rpartition('/')[0]}/kernel" for name in adapters}
    layers = {}  # of each name without the number of its layer: numbers, by whether it is chosen
    for kernel in kernels:
        about = re.fullmatch(r"(\D+/)(\d+)(/.+)", kernel)
        key, number = ((about[1], about[3]), int(about[2])) if about else ((kernel, ""), None)
        layers.setdefault(key, {True: [], False: []})[kernel in chosen].append(number)
    out = []
    for (front, back), numbers in sorted(layers.items()):
        if numbers[True]:
            some = "|".join(map(str, sorted(numbers[True]))) if back else ""
            which = rf"({some})" if numbers[False] else r"\d+" if back else ""
            out.append(f"^{front}{which}{back}$")
    return tuple(out)


def _check(path: epath.Path, found: Tensors, cfg: EVLMConfig) -> None:
    """Raises ValueError listing what the adapters of `cfg` lack, or have in another shape."""
    sizes = parameter_shapes(cfg)
    problems = [f"nothing fills {name}" for name in sizes.keys() - found if is_adapter(name)]
    problems += [
        f"{name} is {found[name].shape}, the model and r need {sizes[name]}"
        for name in found
        if found[name].shape != sizes[name]
    ]
    problems += [
        f"{name} is {tensor.dtype}; weights are {', '.join(map(str, FLOATS))}"
        for name, tensor in found.items()
        if tensor.dtype not in FLOATS
    ]
    if problems:
        raise ValueError(f"{path} does not fit:\n  " + "\n  ".join(sorted(problems)))
