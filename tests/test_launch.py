"""The files of docs/launch: what they launch is a valid config on the devices that they ask for,
and they start again what was preempted, and only that.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from evlm_jax import cli
from evlm_jax.config.load import load_config
from evlm_jax.parallel.status import PREEMPTED
from tests.test_docs import blocks, fits

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The experiment that pages spell, in a folder that is the working directory."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for _, _, block in blocks("python"):
        if name := re.match(r"# (experiments/\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "experiments" / "mine_14b.py"


def launched(words: list[str], devices: int):
    """The arguments of `evlm train`, whose config fits so many devices."""
    args, overrides = cli.make_parser().parse_known_args(words)
    assert args.run is cli._train and args.distributed and args.init and args.workdir
    cfg = load_config(args.config, overrides)
    assert cfg.data.sources
    fits(cfg, devices)
    return args


def test_the_jobset(config):
    settings, jobset = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert settings["data"]["mine_14b.py"] == config.read_text()
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (job,) = (entry["template"]["spec"] for entry in jobset["spec"]["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    devices, chips = math.prod(map(int, shape.split("x"))), container["resources"]["limits"]
    assert job["parallelism"] == job["completions"] == devices // chips["google.com/tpu"]
    words = [word.replace("/config/", f"{config.parent}/") for word in container["args"]]
    launched(words, devices)
    (volume,) = pod["volumes"]
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]


def test_the_jobset_starts_again_what_was_preempted():
    *_, jobset = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    (job,) = (entry["template"]["spec"] for entry in jobset["spec"]["replicatedJobs"])
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    rules = job["podFailurePolicy"]["rules"]
    codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert [code["values"] for code in codes] == [[PREEMPTED]]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (PREEMPTED, True)])
def test_the_slurm_script(status, again, config):
    """With an `srun` that writes down what it would start."""
    tools = config.parent / "bin"
    tools.mkdir()
    for name, end in (("srun", status), ("scontrol", 0)):
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {name}.words\nexit {end}\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = LAUNCH / "train.slurm"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    words = Path("srun.words").read_text().split()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), re.M))
    launched(words[words.index("evlm") + 1 :], int(asked["nodes"]) * int(asked["gpus-per-node"]))
    assert asked["ntasks-per-node"] == "1" and asked["signal"].startswith("TERM@")
    assert Path("scontrol.words").exists() == again
    if again:
        assert Path("scontrol.words").read_text().split() == ["requeue", "7"]


def test_the_image():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split())
    extras = re.findall(r"EXTRAS=([\w,]+)", text)
    known = set(re.findall(r'^ {8}"(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
    assert extras and {extra for one in extras for extra in one.split(",")} <= known
    assert shlex.split(re.findall(r"^ENTRYPOINT \[(.*)\]$", text, re.M)[0]) == ["evlm"]
