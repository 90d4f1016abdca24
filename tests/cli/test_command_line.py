"""What the command line says: one line about every error, no traceback but for a bug; help with
defaults.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evlm_jax import cli
from evlm_jax.evals.command import mesh_of
from evlm_jax.parallel.status import Stopped

ROOT = Path(cli.__file__).parents[2]
NONSENSE = (
    "nope",
    "",
    "-1",
    "0",
    "nan",
    "1e400",
    "2**70",
    str(2**70),
    "1" * 400,
    "x:y",
    "a,,b",
    "\udcff",
    "/dev/null",
    str(ROOT),
    "\0",
)


def says(words, capsys):
    """(exit status, the line about the error): argparse's own behind its usage, or ours alone."""
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    lines = capsys.readouterr().err.strip().splitlines()
    if status == 2:
        return status, lines[-1]
    assert len(lines) == 1, lines
    return status, lines[0]


def parsers(parser, words=()):
    """(its words, parser) of every subcommand without subcommands."""
    nested = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    for action in nested:
        for name, inner in action.choices.items():
            yield from parsers(inner, (*words, name))
    if not nested:
        yield words, parser


EXPERIMENT = (
    "from experiments.demo import get_config as demo\n\n\ndef get_config(arg=None):\n    {}\n   "
    " return demo()\n"
)
WRONG = {
    "no file nowhere.py; give an experiment": ["train", "--config", "nowhere.py", "--workdir", "w"],
    "SyntaxError: ": ["train", "--config", "README.md", "--workdir", "w"],
    "KeyError: 'nope'; see the file for what may stand": [
        "flops",
        "--config",
        "experiments/demo.py:nope",
    ],
    "ranges.py: has no function get_config": [
        "plan",
        "--config",
        "evlm_jax/config/ranges.py",
        "--topology",
        "cpu:1",
    ],
    "must be FIRST:LAST, as 10:12, got '5'": [
        "train",
        "--config",
        "experiments/demo.py",
        "--workdir",
        "w",
        "--profile",
        "5",
    ],
    "README.md: not a result of `evlm eval`": ["score", "README.md"],
    "must be a whole number, at least 0": [
        "generate",
        "--checkpoint",
        "c",
        "--prompt",
        "p",
        "--seed",
        str(2**70),
    ],
    "--topology cpu:0: give a number of devices": [
        "plan",
        "--config",
        "experiments/demo.py",
        "--topology",
        "cpu:0",
    ],
    "v5e:16x16x16: TPU v5e is a torus of 2 axes, not of 3": [
        "plan",
        "--config",
        "experiments/demo.py",
        "--topology",
        "v5e:16x16x16",
    ],
    "nowhere: no such folder": [
        "generate",
        "--checkpoint",
        "nowhere",
        "--prompt",
        "p",
    ],
    "none.mp4: cannot decode the video": [
        "generate",
        "--checkpoint",
        "nowhere",
        "--prompt",
        "p",
        "--video",
        "none.mp4",
    ],
    "--frames 4 is of a video: give --video": [
        "generate",
        "--checkpoint",
        "c",
        "--prompt",
        "p",
        "--frames",
        "4",
    ],
    "2 <image> markers for 0 images": [
        "generate",
        "--checkpoint",
        "c",
        "--prompt",
        "<image> or <image>",
    ],
    "--answers 3: at temperature 0": [
        "generate",
        "--checkpoint",
        "c",
        "--prompt",
        "p",
        "--answers",
        "3",
    ],
    "must be a number, at least 0": [
        "generate",
        "--checkpoint",
        "c",
        "--prompt",
        "p",
        "--temperature",
        "-1",
    ],
    "/nowhere: no such folder": ["demo", "--moe", "nowhere"],
    "must be VARIANT/SEED, as base/0, got 'nope'": [
        "ablate",
        "--variants",
        "a",
        "--out",
        "w",
        "--run",
        "nope",
    ],
    "--cores 4096: this machine has": [
        "ablate",
        "--variants",
        "a",
        "--out",
        "w",
        "--run",
        "base/0",
        "--cores",
        "4096",
    ],
    "--out /proc/x: /proc: cannot write there": "data inspect demo:fast --out /proc/x".split(),
    "--json /proc/x: /proc: cannot write there": "flops --config demo --json /proc/x".split(),
    "/nowhere: no such fold": "ablate --variants a --out w --init nowhere".split(),
    "--judge-model m is of an endpoint": (
        "eval --checkpoint c --task photos --judge-model m".split()
    ),
    "--top-p and --min-p are of draws": "generate --checkpoint c --prompt p --top-k 5".split(),
    "--top-k, --top-p and --min-p are of": "chat --checkpoint c --min-p 0.5".split(),
    "docs is a folder: give the result file": "score docs".split(),
    "README.md is a file: give the folder of a run": "upcycle --checkpoint README.md".split()
    + "--config experiments/evlm_14b.py:moe --out w".split(),
    "--json docs: docs is a folder": "flops --config demo --json docs".split(),
    "docs is a folder: give": "eval --checkpoint c --task photos --out docs".split(),
    "gs:/b/run names no bucket": "generate --checkpoint gs:/b/run --prompt p".split(),
    "gs:// names no bucket": "generate --checkpoint gs:// --prompt p".split(),
    "say nothing without --coordinator": (
        "train --config demo --workdir /proc/x --processes 2 --process 1".split()
    ),
    "--coordinator here: give HOST:PORT": (
        "train --config demo --workdir /proc/x --coordinator here".split()
    ),
    "--process 2 of --processes 2": (
        "train --config demo --workdir /proc/x --coordinator a:1 --processes 2 --process 2".split()
    ),
    "none.png: No such file": [
        "generate",
        "--checkpoint",
        "nowhere",
        "--prompt",
        "p",
        "--image",
        "none.png",
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_one_line_says_what_and_where(message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, line = says(WRONG[message], capsys)
    assert status and message in line and "this is a bug" not in line


def test_a_step_that_is_not_there_is_said_before_towers_are_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EVLM_CACHE", str(tmp_path / "empty"))
    words = ["train", "--config", "demo:fast", "--workdir", str(tmp_path / "w"), "--step", "5"]
    assert "w has no checkpoint of step 5; finalised steps: none" in says(words, capsys)[1]


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise RuntimeError('no luck')", "line 5: RuntimeError: no luck"),
        ("1 / 0", "line 5: ZeroDivisionError: division by zero"),
        (
            "import nothing_of_that_name",
            "line 5: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("return {}", "get_config must return an ml_collections.ConfigDict, and gave dict"),
    ],
)
def test_an_experiment_that_fails_is_named_with_its_line(body, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(EXPERIMENT.format(body))
    status, line = says(["flops", "--config", str(tmp_path / "mine.py")], capsys)
    assert (
        status == 1
        and line.startswith(f"evlm: --config {tmp_path / 'mine.py'}: ")
        and message in line
    )


@pytest.mark.parametrize(
    "words, parser",
    [
        pytest.param(*found, id=" ".join(found[0]))
        for found in parsers(cli.make_parser())
        if found[0] != ("demo",)
    ],
)  # which would begin
def test_no_argument_brings_a_traceback(words, parser, capsys, tmp_path, monkeypatch):
    """Each argument of each subcommand in turn is nonsense, the required others lead nowhere."""
    monkeypatch.chdir(tmp_path)
    if words == ("fetch",):
        monkeypatch.setenv("EVLM_CACHE", str(tmp_path))
    actions = [
        action
        for action in parser._actions
        if not isinstance(action, (argparse._HelpAction, argparse._StoreConstAction))
    ]
    for wrong in [action for action in actions if action.nargs != 0]:
        for nonsense in NONSENSE:
            given = []
            for action in actions:
                if action is wrong or action.required:
                    value = nonsense if action is wrong else "nowhere"
                    given.append(
                        f"{action.option_strings[0]}={value}" if action.option_strings else value
                    )
            status, line = says([*words, *given], capsys)
            assert status and "this is a bug" not in line, (words, given, line)


def test_a_bug_is_said_to_be_one_and_shown_where_asked(monkeypatch, capsys):
    def broken(args, overrides):
        raise KeyError("inside")

    monkeypatch.setitem(cli.COMMANDS, "fetch", (lambda parser: None, broken, "breaks"))
    monkeypatch.delenv("EVLM_DEBUG", raising=False)
    assert says(["fetch"], capsys) == (
        1,
        "evlm: this is a bug, please report it with what EVLM_DEBUG=1 shows: KeyError: 'inside'",
    )
    monkeypatch.setenv("EVLM_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["fetch"])


def test_of_two_values_neither_is_dropped(capsys):
    """Nor where the first is the default; --image and --stop may be given several times."""
    words = "generate --checkpoint none --prompt q --stop a --stop b".split()
    assert "none" in says(words, capsys)[1]
    status, line = says([*words, "--seed", "0", "--see", "1"], capsys)
    assert status == 2 and line.endswith("--seed is given twice")
    with pytest.raises(ValueError, match="--mesh data=4,data=4 has a field twice"):
        mesh_of("data=4,data=4")


@pytest.mark.parametrize(
    "error, line",
    [
        (
            ValueError("a\nb: shapes do not fit:\n  one,\n  two\n  three"),
            r"a\nb: shapes do not fit: one, two; three",
        ),
        (ValueError("\x1b[2J \u2028 \udcff"), r"\x1b[2J \u2028 \udcff"),
        (Stopped("stopped\nhere", 75), r"stopped\nhere"),
        (NotADirectoryError(20, "no", "README.md/x/y.json"), "README.md is a file: give a folder"),
        (IsADirectoryError(21, "no", "docs"), "docs is a folder: give a file"),
        (FileNotFoundError(2, "No such file", "x.json"), "x.json: No such file"),
    ],
)
def test_an_error_is_one_line_whatever_it_holds(error, line, monkeypatch, capsys):
    def broken(args, overrides):
        raise error

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(cli.COMMANDS, "fetch", (lambda parser: None, broken, "breaks"))
    assert says(["fetch"], capsys)[1] == f"evlm: {line}"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stopped(args, overrides):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "fetch", (lambda parser: None, stopped, "is stopped"))
    assert says(["fetch"], capsys) == (130, "evlm: interrupted")


def test_a_reader_that_goes_away_is_no_error():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m evlm_jax --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert not done.stderr and "usage" in done.stdout


def test_help_tells_every_default_and_the_version_is_told(capsys):
    for words, parser in parsers(cli.make_parser()):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if (
                action.default not in (None, False, "", [], argparse.SUPPRESS)
                or action.default == 0
                and action.default is not False
            ):
                assert f"default: {action.default}" in text, (words, action.dest)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(r"evlm \d+\.\d+\S*\n", capsys.readouterr().out)


def test_programs_that_were_compiled_are_kept_by_every_command(tmp_path):
    """The variable is set before JAX is imported, whatever the command."""
    script = (
        "import sys; from evlm_jax import cli; cli.main(['fetch', 'nothing']); import jax;"
        " print(jax.config.jax_compilation_cache_dir)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    environment |= {"PYTHONPATH": str(ROOT), "EVLM_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "compiled")


def test_a_damaged_result_is_named(tmp_path, capsys):
    (tmp_path / "half.json").write_text(json.dumps({"task": "gqa"})[:-3])
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "none.json").write_text(json.dumps({"task": "gqa", "examples": None}))
    for name in ("half.json", "other.json", "deep.json", "none.json"):
        status, line = says(["score", str(tmp_path / name)], capsys)
        assert status == 1 and f"{tmp_path / name}: not a result of `evlm eval`" in line
    row = {"id": "0", "cluster": "0", "prompt": "q", "answer": "a", "prediction": "a"}
    for change, message in (
        ({"prediction": None}, "example 1: 'prediction' must be a text"),
        ({"answer": 5}, "gqa: the answers are not of the form that it scores: "),
        ({"id": "1"}, "row.json: the id '1' stands there twice"),
    ):
        result = {"task": "gqa", "examples": [row | change, row | {"id": "1"}]}
        (tmp_path / "row.json").write_text(json.dumps(result))
        status, line = says(["score", str(tmp_path / "row.json")], capsys)
        assert status == 1 and message in line
