"""Shapes that docstrings state are those of the arrays that pass through the model."""

import ast
import re
import sys
from pathlib import Path

import jax
import pytest

import evlm_jax
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.planning import programs
from tests.helpers.tiny import tiny_config

ROOT = Path(evlm_jax.__file__).parent
ARGUMENT = re.compile(r"((?:\w+(?:, | and | or )?)+) \[([^\]]+)\]")
DIMENSION = re.compile(r"\.\.\.|\w+'?")


def dimensions(text: str) -> list[str] | None:
    """Of "B, T, N, H"; None where one of them is an expression."""
    found = text.split(", ")
    return found if all(DIMENSION.fullmatch(name) for name in found) else None


def stated(doc: str, parameters: list[str]) -> dict[str, list[str]]:
    """{parameter, or "return": its dimensions} of "x [B, T, D], y [B, T] -> [B, T, D]"."""
    before, arrow, behind = re.sub(r"\s+", " ", doc).partition(" -> ")
    if not arrow:
        return {}
    found = {}
    for names, text in ARGUMENT.findall(before):
        found |= dict.fromkeys(set(re.split(r", | and | or ", names)) & {*parameters}, text)
    if not found and (alone := re.search(r"\[([^\]]+)\]$", before)):
        found = {parameters[0]: alone[1]}
    if result := re.match(r"\(?(?:[\w ]+ )?\[([^\]]+)\]", behind):
        found["return"] = result[1]
    return {name: sizes for name, text in found.items() if (sizes := dimensions(text))}


def docstrings() -> dict[tuple[str, int], tuple[str, dict[str, list[str]]]]:
    """{(file, first line of a function): (its name, what it states)} of models/ and ops/."""
    found = {}

    def visit(file, node, owner):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                visit(file, child, child)
            elif isinstance(child, ast.FunctionDef):
                doc = ast.get_docstring(child)
                if child.name == "__call__" and not doc:
                    doc = ast.get_docstring(owner)
                names = [a.arg for a in child.args.args if a.arg != "self"]
                if doc and names and (what := stated(doc, names)):
                    name = f"{owner.name}.{child.name}" if owner else child.name
                    line = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    found[str(file), line] = (name, what)

    for folder in ("models", "ops"):
        for file in (ROOT / folder).glob("*.py"):
            visit(file, ast.parse(file.read_text()), None)
    return found


def is_array(leaf) -> bool:
    return hasattr(leaf, "shape")


def fit(sizes: list[str], shape: tuple[int, ...], letters: dict[str, int]) -> bool:
    """Whether a shape has these dimensions; a letter has one value within a call."""
    if "..." in sizes:
        at = sizes.index("...")
        behind = len(sizes) - at - 1
        if len(shape) < at + behind:
            return False
        sizes, shape = sizes[:at] + sizes[at + 1 :], shape[:at] + shape[len(shape) - behind :]
    return len(sizes) == len(shape) and all(
        (int(name) if name.isdigit() else letters.setdefault(name, n)) == n
        for name, n in zip(sizes, shape)
    )


@pytest.mark.ci
def test_docstrings_state_the_shapes_that_there_are():
    """Traced, not run: a forward pass with experts, a prefill, a step of decoding."""
    data = {"image_group": 2, "images": 3}
    cfg = tiny_config(vit={"image_size": (8, 12)}, data=data, moe={"copies": 2})
    functions, letters, wrong, checked = docstrings(), {}, set(), set()

    def look(frame, event, value):
        code = frame.f_code
        known = functions.get((code.co_filename, code.co_firstlineno))
        if known is None or event not in ("call", "return"):
            return
        name, what = known
        arrays = dict(frame.f_locals) if event == "call" else {"return": value}
        bound = letters.setdefault(frame, {}) if event == "call" else letters.pop(frame)
        for n in what.keys() & arrays.keys():
            for leaf in filter(is_array, jax.tree.leaves(arrays[n])[:1]):
                checked.add(name)
                if not fit(what[n], leaf.shape, bound):
                    wrong.add(f"{name}: {n} {what[n]} is {leaf.shape}")

    layout = make_layout(cfg)
    sys.setprofile(look)
    try:
        for what in ("eval", "prefill", "decode"):
            programs.build(cfg, layout, what)
    finally:
        sys.setprofile(None)
    assert not wrong, "\n".join(sorted(wrong))
    assert len(checked) >= 20 and {"attention", "grouped_attention", "MoE.__call__"} <= checked
