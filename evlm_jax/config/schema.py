"""From plain dicts to frozen dataclasses: nothing unknown, nothing missing but what has a default,
nothing of another type.
"""

import dataclasses
import math
import re
import types
import typing

from evlm_jax.config import ranges

Pattern = typing.NewType("Pattern", str)  # a regular expression


def build(kind, value, prefix: str):
    """`value` as an instance of the annotation `kind`; `prefix` is the key's full name so far.

    Raises:
      ValueError: unknown key, missing key, a value of the wrong type, a number out of its range;
        the message has the full names.
    """
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, prefix)
    if typing.get_origin(kind) is typing.Literal:
        if value not in (allowed := typing.get_args(kind)) or isinstance(value, bool):
            raise ValueError(
                f"config: {prefix} is {value!r}; use one of {', '.join(map(str, allowed))}"
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"config: {prefix} must be a tuple, got {value!r}")
        args = typing.get_args(kind)
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"config: {prefix} needs {len(args)} values, got {len(value)}")
        return tuple(build(args[0], v, f"{prefix}[{i}]") for i, v in enumerate(value))
    if kind is Pattern:
        try:
            re.compile(build(str, value, prefix))
        except re.error as error:
            raise ValueError(
                f"config: {prefix} is {value!r}, which is no regular expression: {error}"
            ) from error
        return value
    if typing.get_origin(kind) is typing.Annotated:
        return ranges.check(
            kind, build(typing.get_args(kind)[0], value, prefix), f"config: {prefix}"
        )
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = [one for one in typing.get_args(kind) if one is not types.NoneType]
        if value is None and len(options) < len(typing.get_args(kind)):
            return None
        many = isinstance(value, (tuple, list))  # which of two options it is
        fit = [one for one in options if (typing.get_origin(one) is tuple) == many]
        return build((fit or options)[0], value, prefix)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config: {prefix} must be {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"config: {prefix} must be finite, got {value!r}")
    return value


def _section(kind, value, prefix: str):
    if not isinstance(value, dict):
        raise ValueError(f"config: {prefix or 'root'} must be a section with keys, got {value!r}")
    hints = typing.get_type_hints(kind, include_extras=True)

    def join(key):
        return f"{prefix}.{key}" if prefix else key

    if unknown := [join(k) for k in value if k not in hints]:
        raise ValueError(
            f"config: unknown key {', '.join(unknown)}; {kind.__name__} has {', '.join(hints)}"
        )
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [join(k) for k in needed if k not in value]:
        raise ValueError(f"config: missing key {', '.join(missing)}")
    return kind(**{k: build(hints[k], value[k], join(k)) for k in hints if k in value})


def check_key(kind, key: str) -> None:
    """Raises ValueError unless `key` ("optim.lr") is a field of the dataclass `kind` or of its
    sections.
    """
    for name in key.split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            has = f"; {kind.__name__} has {', '.join(hints)}" if hints else ""
            raise ValueError(f"config: unknown key {key}{has}")
        kind = hints[name]
