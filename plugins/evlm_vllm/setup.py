"""Packaging of the plug-in, in an environment of its own: vLLM pins what ours cannot have."""

from setuptools import setup

setup(
    name="evlm-vllm",
    version="0.1.0",
    description="Serves exports of EVLM (evlm convert export --format hf) in vLLM",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["evlm_vllm"],
    # vLLM itself is not named: its builds for CPU and GPU have several names. register() says
    # which minor version it must be.
    entry_points={"vllm.general_plugins": ["evlm = evlm_vllm:register"]},
)
