"""The door from an experiment file to the code is strict both ways; overrides on the command line;
the shipped experiments.
"""

import ast
import dataclasses
import inspect
import json
import math
import re
import typing
from pathlib import Path

import pytest

import evlm_jax
from evlm_jax import cli, config
from evlm_jax.config import from_config_dict, to_dict
from evlm_jax.config.load import load_config
from experiments import base, demo

DEMO = str(Path(demo.__file__))
GENERATE, EVAL = (
    ("generate", "--checkpoint", "c", "--prompt", "a"),
    (
        "eval",
        "--checkpoint",
        "c",
        "--task",
        "t",
    ),
)


@pytest.mark.parametrize(
    "made",
    [
        base.get_config(),
        *(demo.get_config(form) for form in ("", "gemma", "fast", "full", "moe", "lora")),
    ],
)
def test_shipped_experiments_pass_the_door_and_come_back(made):
    cfg = from_config_dict(made)
    assert from_config_dict(to_dict(cfg)) == cfg


def broken(section: str, **fields):
    made = demo.get_config().to_dict()
    for name, value in fields.items():
        if value is None:
            del made[section][name]
        else:
            made[section][name] = value
    return made


@pytest.mark.parametrize(
    "made, message",
    [
        (broken("train", stepz=3), "unknown key train.stepz; TrainConfig has steps, "),
        (broken("train", steps=None), "missing key train.steps"),
        (broken("train", steps="many"), "train.steps must be int, got 'many'"),
        (broken("train", steps=True), "train.steps must be int, got True"),
        (broken("vit", taps=(8, 13)), "vit.taps must lie in 1..vit.depth = 12"),
        (broken("vit", taps=(0, 8)), r"vit.taps\[0\] must be at least 1, got 0"),
        (broken("vit", mean=(0.5, 0.5)), "vit.mean needs 3 values, got 2"),
        (
            broken("optim", phases=({"start": 0.0, "warmup": 0, "rules": ({"rate": 1.0},)},)),
            r"rules\[0\].rate",
        ),
        (broken("data", weights=(1.0,)), "data.weights needs one weight for each of data.sources"),
        (
            broken("llm", logn=1),
            "llm.logn must be the trained context in tokens, at least 2, or 0 for never",
        ),
        (broken("train", steps=10**30), "train.steps must be at least 1 and at most 2147483647, g"),
        (broken("optim", no_decay=("(",)), r"optim.no_decay\[0\] is '\(', which is no regular exp"),
        (
            broken("optim", phases=({"rules": ({"pattern": "[", "lr": 1.0},)},)),
            r"optim.phases\[0\].rules\[0\].pattern is '\[', which is no regular expression",
        ),
        (broken("vit", image_size=(112, 110)), "vit.image_size must be a multiple of vit.patch"),
        (broken("vit", image_size=(112, 0)), r"vit.image_size\[1\] must be at least 1, got 0"),
        (broken("vit", image_size=(112,)), "vit.image_size needs 2 values, got 1"),
        (broken("llm", dynamic_ntk=-1), "llm.dynamic_ntk must be at least 0, got -1"),
        (
            broken("train", dtype="float16"),
            "train.dtype is 'float16'; use one of float32, bfloat16",
        ),
        (demo.get_config().to_dict() | {"vit": 3}, "vit must be a section with keys, got 3"),
    ],
)
def test_errors_name_the_field_in_full(made, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(made)


def numbers(kind, value, path=()):
    """(path, kind of number) of every number of a config."""
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from numbers(hint, value[name], (*path, name))
    elif typing.get_origin(kind) is tuple:
        for i, entry in enumerate(value):
            yield from numbers(typing.get_args(kind)[0], entry, (*path, i))
    elif typing.get_origin(kind) is typing.Union:
        yield from numbers(typing.get_args(kind)[0], value, path)
    elif typing.get_origin(kind) is typing.Annotated or kind in (int, float):
        yield path, kind


def test_every_number_has_a_range_and_is_refused_beyond_it():
    plain = to_dict(from_config_dict(demo.get_config()))
    found = list(numbers(config.EVLMConfig, plain))
    assert len(found) > 90
    for path, kind in found:
        assert kind not in (int, float), f"{path} has no range"
        (span,) = kind.__metadata__
        beyond = [span.low if span.above else span.low - 1] + (
            [] if span.high == math.inf else [span.high if span.below else span.high + 1]
        )
        for value in [
            *beyond,
            *((math.nan, math.inf, -math.inf) if kind.__origin__ is float else ()),
        ]:
            made = json.loads(json.dumps(plain))
            place = made
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = type(value)(value) if kind.__origin__ is float else int(value)
            name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]
            with pytest.raises(ValueError, match=re.escape(f"config: {name} must be ")):
                from_config_dict(made)


def test_every_field_is_read():
    """A field that no line of the package reads would be an option without effect."""
    read = set()
    for path in Path(evlm_jax.__file__).parent.rglob("*.py"):
        if path.parts[-2:] != ("config", "relations.py"):  # to be checked is not to be read
            nodes = ast.walk(ast.parse(path.read_text()))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    kinds = [
        kind
        for _, kind in inspect.getmembers(config, dataclasses.is_dataclass)
        if "ranges" not in kind.__module__
    ]
    assert len(kinds) == 19
    unread = [
        f"{kind.__name__}.{field.name}"
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.name not in read
    ]
    assert not unread


@pytest.mark.parametrize(
    "words, message",
    [
        (
            [*GENERATE, "--temperature", "nan"],
            "--temperature: must be a number, at least 0, got 'nan'",
        ),
        (
            [*GENERATE, "--top-p", "1.5"],
            "--top-p: must be a number, above 0 and at most 1, got '1.5'",
        ),
        (
            [*GENERATE, "--max-new-tokens", "0"],
            "--max-new-tokens: must be a whole number, at least 1",
        ),
        (
            [*GENERATE, "--seed", str(2**70)],
            "--seed: must be a whole number, at least 0 and at most 4294967295",
        ),
        ([*GENERATE, "--image", ""], "an empty argument behind --image: give a value, or leave it"),
        ([*GENERATE, "--video="], "an empty argument behind --video"),
        (["train", "--config", "demo", "--workdir", ""], "an empty argument behind --workdir"),
        (["score", ""], "an empty argument behind score"),
        (
            [*GENERATE, "--max-new-tokens", "9" * 20],
            "--max-new-tokens: must be a whole number, at least 1 and at most 1048576, got",
        ),
        ([*EVAL, "--limit", "-1"], "--limit: must be a whole number, at least 1, got '-1'"),
        ([*EVAL, "--batch", "0"], "--batch: must be a whole number, at least 1, got '0'"),
    ],
)
def test_numbers_of_the_command_line_have_ranges(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_no_argument_is_a_number_without_a_range():
    """Each `type=` of a number goes through ranges.argument."""
    for path in Path(evlm_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                kinds = [
                    word.value.id
                    for word in node.keywords
                    if word.arg == "type" and isinstance(word.value, ast.Name)
                ]
                assert not {"int", "float"} & set(kinds), (path, node.lineno)


def test_an_experiment_by_name(tmp_path, monkeypatch):
    """Also where the working directory has no experiments; one that it has comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_config("demo:fast") == from_config_dict(demo.get_config("fast"))
    with pytest.raises(ValueError, match=r"no file experiments/nothing\.py; give an experiment"):
        load_config("nothing:fast")
    (tmp_path / "experiments").mkdir()
    own = "from experiments.demo import get_config as ours\n\n\ndef get_config():\n"
    own += "    config = ours()\n    config.name = 'own'\n    return config\n"
    (tmp_path / "experiments" / "demo.py").write_text(own)
    assert load_config("demo").name == "own"


def test_overrides():
    overrides = [
        "--config.optim.lr=1e-4",
        "--config.vit.taps=(2, 4)",
        "--config.init.llm=/models/a b",
        "--config.data.isolate=False",
    ]
    cfg = load_config(f"{DEMO}:fast", overrides)
    assert (cfg.optim.lr, cfg.vit.taps, cfg.init.llm, cfg.data.isolate) == (
        1e-4,
        (2, 4),
        "/models/a b",
        False,
    )
    assert cfg.train == from_config_dict(demo.get_config("fast")).train


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--config", "nowhere.py", "--workdir", "w"], "no file nowhere.py"),
        (
            ["train", "--config", DEMO, "--workdir", "w", "--config.optim.rate=1"],
            "unknown key optim.rate; OptimConfig has lr, ",
        ),
        (
            ["train", "--config", DEMO, "--workdir", "w", "--config.rate.lr=1"],
            "unknown key rate.lr; EVLMConfig has name, vit, ",
        ),
        (["train", "--config", DEMO, "--workdir", "w", "--lr=1"], "unknown argument --lr=1"),
        (
            ["train", "--config", DEMO, "--workdir", "w"]
            + ["--config.data.pool=1", "--config.data.image_group=2"],
            "--config.data.image_group is given twice",
        ),
        (
            ["convert", "import", "--config", DEMO, "--llm", "a", "--out", "o"]
            + ["--config.init.llm=b"],
            "--config.init.llm is given twice, maybe as another argument",
        ),
        (
            ["train", "--config", DEMO, "--workdir", "w", "--config.train.steps=1.5"],
            "train.steps must be int, got 1.5",
        ),
        (["fetch", "nothing"], "nothing"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere"),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("evlm: ") and message in said and said.count("\n") == 1
