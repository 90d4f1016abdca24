"""`evlm` as a process."""

import os
import subprocess
import sys

import pytest

SAYS = (
    'import os\n\ndef get_config(arg=None):\n    raise ValueError("tunables " +'
    ' os.environ["GLIBC_TUNABLES"])\n'
)
USUAL = "glibc.malloc.hugetlb=1"


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked of glibc")
@pytest.mark.parametrize(
    "own, found", [(None, USUAL), ("glibc.malloc.perturb=0", "glibc.malloc.perturb=0")]
)
def test_the_command_runs_on_large_pages_with_all_its_arguments(tmp_path, own, found):
    (tmp_path / "says.py").write_text(SAYS)
    environment = {
        name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"
    } | ({"GLIBC_TUNABLES": own} if own else {})
    words = ["train", "--config", str(tmp_path / "says.py"), "--workdir", str(tmp_path / "a b")]
    for command in (
        [sys.executable, "-m", "evlm_jax"],
        [os.path.join(os.path.dirname(sys.executable), "evlm")],
    ):
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip() == f"evlm: --config {words[2]}: line 4: tunables {found}"


BAR = (
    "import tqdm\n\ndef get_config(arg=None):\n    for _ in tqdm.tqdm(range(9), miniters=1): pass\n"
    '    raise ValueError("done")\n'
)


@pytest.mark.parametrize("interval, drawn", [(None, 2), ("0", 11)])
def test_a_log_gets_a_line_of_progress_now_and_then(tmp_path, interval, drawn):
    (tmp_path / "bar.py").write_text(BAR)
    environment = {name: value for name, value in os.environ.items() if "TQDM" not in name} | (
        {"TQDM_MININTERVAL": interval} if interval else {}
    )
    words = ["train", "--config", str(tmp_path / "bar.py"), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "evlm_jax", *words], env=environment, capture_output=True
    )
    assert done.stderr.count(b"\r") == drawn


@pytest.mark.parametrize(
    "own", [None, pytest.param("glibc.malloc.perturb=0", marks=pytest.mark.ci)]
)
def test_streams_that_are_closed_are_nobody_s(own):
    environment = os.environ | ({"GLIBC_TUNABLES": own} if own else {})
    command = f"{sys.executable} -m evlm_jax --version"
    done = subprocess.run(
        ["sh", "-c", f"{command} <&- 2>&-; {command} >&-; {command} nonsense <&- >&- 2>&-"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("evlm ") and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
