"""The notebook of docs/tutorials runs as it stands, from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.parity import needs_asset

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "ten_pictures.ipynb"
BEHIND = """
same = jax.tree.map(np.array_equal, again.params, model.params)
facts = {"losses": losses, "answers": answers, "captions": captions, "words": len(maps)}
facts |= {"same": all(jax.tree.leaves(same)), "glow": int(np.ptp(np.asarray(shown)))}
print(json.dumps(facts))
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_it_is_stored_small_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 60_000
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells())


@pytest.mark.ci
@needs_asset("smollm2-135m-instruct")
def test_ten_pictures_are_learned_looked_at_and_exported(tmp_path):
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(["import json", *code, BEHIND])],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["losses"][-1] < 0.1 < 8 < facts["losses"][0]
    assert facts["answers"][:10] == facts["captions"] and len(facts["answers"]) == 12
    assert facts["words"] == 6 and facts["glow"] > 100
    assert facts["same"] and list(tmp_path.glob("*/hf/model.safetensors"))
