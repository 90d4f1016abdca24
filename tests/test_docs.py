"""Every command that README and docs show is one that the program takes; what they launch fits the
machines that they name. Decisions have ids, and those that are named exist, as do the files that
CONTRIBUTING.md names.
"""

import argparse
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from evlm_jax import cli
from evlm_jax.config.load import load_config
from evlm_jax.models import param_names
from evlm_jax.models.evlm import EVLM
from evlm_jax.parallel.mesh import AXES, Layout, check_mesh, check_parameters, mesh_shape
from evlm_jax.planning import search

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(
    r"(?:^|\s|')(evlm|python -m"
    r" (?:evlm_jax|benchmarks\.\w+))(?=\s)([^'\n;&|#]*(?:'[^'\n]*'[^'\n;&|#]*)*)"
)
DECISION = re.compile(r"\bD-[A-Z]+-\d+\b")
COUNT = re.compile(r"(\d+) (?:chips|GPUs)")


def blocks(language):
    """(file, text in front of it, block) of all pages."""
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        text = page.read_text("utf-8")
        for found in BLOCK.finditer(text):
            if found[1] == language:
                yield page.name, text[: found.start()], found[2]


def commands():
    """(file, program, words, what is said about it) of each command."""
    for page, before, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            about = before[-300:] + block
            for program, rest in COMMAND.findall(line.partition(" #")[0]):
                yield pytest.param(
                    program,
                    shlex.split(rest),
                    about,
                    id=f"{page}: {program} {' '.join(rest.split())}"[:100],
                )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The project's experiments, and those that the pages spell."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    for _, _, block in blocks("python"):
        if name := re.match(r"# (experiments/\w+\.py)\n", block):
            (folder / name[1]).write_text(block)
    return folder


COMMANDS = list(commands())


def test_there_are_commands():
    words = [
        param.values[1][0] if param.values[1] else ""
        for param in COMMANDS
        if param.values[0] == "evlm"
    ]
    assert {
        "train",
        "plan",
        "convert",
        "eval",
        "score",
        "generate",
        "upcycle",
        "ablate",
        "flops",
        "data",
        "demo",
        "chat",
    } <= set(words)
    assert any(param.values[0].startswith("python -m benchmarks") for param in COMMANDS)


@pytest.mark.parametrize("program, words, about", COMMANDS)
def test_it_is_taken(program, words, about, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if program.startswith("python -m benchmarks"):
        parsed(program.split()[-1], words, monkeypatch)
        return
    args, overrides = cli.make_parser().parse_known_args(words)
    assert hasattr(args, "config") or not overrides
    if getattr(args, "config", None):
        if args.run is cli._plan:
            chips = math.prod(map(int, re.findall(r"\d+", args.topology.partition(":")[2])))
            fits(search.planned(args, overrides, load_config), chips)
            return
        cfg = load_config(args.config, overrides)
        if args.run is cli._train:
            several = "--distributed" in words or any(
                word.startswith("--config.mesh") for word in words
            )
            assert cfg.data.sources
            fits(cfg, int(COUNT.findall(about)[-1]) if several else 1)


def parsed(name, words, monkeypatch):
    """The benchmark's own parser takes the words."""

    class Parsed(Exception):
        pass

    def parse(parser, *_):
        argparse.ArgumentParser.parse_known_args(parser, words)
        raise Parsed

    module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        module.main()


def fits(cfg, devices):
    """The mesh checks of training, on as many devices as the page says."""
    sizes = check_mesh(cfg, devices)
    layout = Layout(
        AbstractMesh(mesh_shape(cfg.mesh, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)),
        cfg.mesh,
    )
    shapes = nnx.state(nnx.eval_shape(lambda: EVLM(cfg, nnx.Rngs(0))))
    check_parameters(layout, shapes, lambda path: param_names.canonical(cfg, path)[0])


def test_each_decision_has_an_id_of_its_own():
    page = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith(("| id |", "| --- |"))
    ]
    ids = [line.split(" | ")[0].removeprefix("| ") for line in rows]
    assert all(map(DECISION.fullmatch, ids)), [i for i in ids if not DECISION.fullmatch(i)]
    assert len(set(ids)) == len(ids), sorted({name for name in ids if ids.count(name) > 1})
    evidence = re.findall(r"\b(?:tests|benchmarks)/[\w/]+(?:\.py)?", page)
    assert len(evidence) > 40 and not [name for name in evidence if not (ROOT / name).exists()]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    code = [
        path
        for folder in ("evlm_jax", "experiments", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    named = {
        name: path for path in pages + code for name in DECISION.findall(path.read_text("utf-8"))
    }
    assert "D-TRAIN-8" in named and named.keys() <= set(ids), {
        name: str(path) for name, path in named.items() if name not in ids
    }


def test_contributing_names_files_that_exist():
    prose = BLOCK.sub("", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    named = re.findall(r"`([\w./-]+)`", prose) + re.findall(r"\]\(([\w./-]+)\)", prose)
    paths = {name for name in named if "/" in name or name.endswith((".py", ".md", ".txt"))}
    assert len(paths) > 60 and not [name for name in sorted(paths) if not (ROOT / name).exists()]


@pytest.mark.ci
def test_the_site_builds_and_is_whole(tmp_path):
    """Without a warning; every link leads somewhere, and nothing is fetched from elsewhere."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(name, reason='needs the extra docs: pip install -e ".[docs]"')
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, (
        built.stderr
    )  # --quiet hides them
    pages = {path: path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 25 and sum(path.stat().st_size for path in tmp_path.rglob("*")) < 10e6
    for path, text in pages.items():
        if path.name in ("404.html", "mixture.html") or path.parent.name == "results":
            continue  # one for any place, and pages that are copied
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)", text)
        fetched += re.findall(r"<link[^>]* href=\"?([^\" >]+)", text)
        assert not [target for target in fetched if re.match(r"(\w+:)?//", target)], path
        for target in fetched + re.findall(r"<a [^>]*href=\"?([^\" >]+)", text):
            place, _, anchor = target.partition("#")
            if re.match(r"\w+:", target) or not place:
                continue
            other = (path.parent / place).resolve()
            assert other.exists(), (path.name, target)
            if anchor and other.suffix == ".html":
                assert re.search(rf"id=\"?{re.escape(unquote(anchor))}[\" >]", pages[other]), target
