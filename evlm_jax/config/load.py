"""The config of an experiment, by name or by file, and what the command line overrides in it."""

import ast
import importlib.util
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import ml_collections

from evlm_jax.config import EVLMConfig, compat, from_config_dict, schema

CONFIG_HELP = (
    "FILE.py[:arg], or an experiment's name, as demo:fast; fields are overridden with"
    " --config.section.field=value"
)


def load_config(spec: str, overrides: list[str] = ()) -> EVLMConfig:
    """The config of an experiment file.

    Args:
      spec: "demo" or "demo:fast", one of the installed experiments; "mine.py" or "mine.py:fast", a
        file, "experiments/demo.py" also where the working directory has none. What follows the
        colon is the argument of `get_config`.
      overrides: "--config.optim.lr=1e-4" and the like; values are Python literals, anything else is
        text.
    Raises:
      ValueError: no such file, one that returns no config, an override of another form, a field
        that is unknown or given twice, or a wrong type; named in full.
    """
    path, _, arg = spec.partition(":")
    module = experiment(spec)
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"--config {path}: has no function get_config; see experiments/demo.py for what an"
            " experiment is"
        )
    config = guarded(spec, module.get_config, *([arg] if arg else []))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"--config {spec}: get_config must return an ml_collections.ConfigDict, and gave"
            f" {type(config).__name__}"
        )
    compat.link_former_names(config)
    given = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key.startswith("--config.") or not equals:
            raise ValueError(
                f"unknown argument {override}; config fields are set as"
                " --config.section.field=value"
            )
        key = set_field(config, key.removeprefix("--config."), text)
        if key in given:
            raise ValueError(
                f"--config.{key} is given twice, maybe as another argument: give it once"
            )
        given.add(key)
    return from_config_dict(config)


def experiment(spec: str) -> ModuleType:
    """The module of an experiment, which `spec` names as in `load_config`.

    Raises ValueError where there is no such file, or it fails.
    """
    path = spec.partition(":")[0]
    if path.isidentifier() and not Path(path).is_file():
        path = f"experiments/{path}.py"
    installed = Path(__file__).parents[2] / path
    if not Path(path).is_file() and path.startswith("experiments/") and installed.is_file():
        path = str(installed)
    if not Path(path).is_file():
        raise ValueError(
            f"--config: no file {path}; give an experiment such as demo:fast or experiments/demo.py"
        )
    name = f"experiment_{Path(path).stem}"
    found = importlib.util.spec_from_loader(name, SourceFileLoader(name, path))
    module = importlib.util.module_from_spec(found)
    guarded(path, found.loader.exec_module, module)
    return module


def guarded(spec: str, call: Callable, *values: object) -> object:
    """`call(*values)`, which is a user's code.

    Raises ValueError for whatever it raises, with the line of the user's file.
    """
    try:
        return call(*values)
    except Exception as error:
        path = spec.partition(":")[0]
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        about = (
            str(error)
            if type(error) is ValueError
            else f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        )
        if spec != path and isinstance(error, (KeyError, TypeError)):
            about += "; see the file for what may stand behind the colon"
        raise ValueError(f"--config {spec}: {f'line {line}: ' if line else ''}{about}") from error


def set_field(config: ml_collections.ConfigDict, key: str, text: str) -> str:
    """Sets the field `key` ("optim.lr", or a former name of one) from the command line; returns its
    present name.

    Raises ValueError for a key that does not exist.
    """
    key = compat.RENAMED.get(key, key)
    *sections, field = key.split(".")
    schema.check_key(EVLMConfig, key)
    for section in sections:
        if config.get(section) is None:  # has a default, which experiments leave out
            with config.unlocked(), config.ignore_type():
                config[section] = ml_collections.ConfigDict()
        config = config[section]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with (
        config.ignore_type(),
        config.unlocked(),
    ):  # from_config_dict checks types, with the field's full name
        config[field] = value
    return key
