"""From plain dicts to frozen dataclasses: nothing unknown, nothing missing, nothing of another type."""

import dataclasses
import types
import typing


def build(kind, value, prefix: str):
    """`value` as an instance of the annotation `kind`; `prefix` is the key's full name so far.

    Raises:
      ValueError: unknown key, missing key, or a value of the wrong type; the message has the full names.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"config: {prefix or 'root'} must be a section with keys, got {value!r}")
        hints = typing.get_type_hints(kind)
        join = lambda key: f"{prefix}.{key}" if prefix else key
        if unknown := [join(k) for k in value if k not in hints]:
            raise ValueError(f"config: unknown key {', '.join(unknown)}; {kind.__name__} has {', '.join(hints)}")
        if missing := [join(k) for k in hints if k not in value]:
            raise ValueError(f"config: missing key {', '.join(missing)}")
        return kind(**{k: build(hints[k], value[k], join(k)) for k in hints})
    if typing.get_origin(kind) is typing.Literal:
        if value not in (allowed := typing.get_args(kind)) or isinstance(value, bool):
            raise ValueError(f"config: {prefix} is {value!r}; use one of {', '.join(map(str, allowed))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"config: {prefix} must be a tuple, got {value!r}")
        args = typing.get_args(kind)
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"config: {prefix} needs {len(args)} values, got {len(value)}")
        return tuple(build(args[0], v, f"{prefix}[{i}]") for i, v in enumerate(value))
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"config: {prefix} must be {' or '.join(o.__name__ for o in options)}, got {value!r}")
