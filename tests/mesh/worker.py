"""One of several processes that train the test model: `python -m tests.mesh.worker PROCESS PROCESSES PORT WORKDIR STEPS MESH`."""

import ast
import sys

import jax
import numpy as np

from evlm_jax import processes
from tests.mesh.devices import config, trained_on
from tests.tiny import TinyData


class OwnRows(TinyData):
    """The rows of a process."""

    def __init__(self, cfg, own):
        super().__init__(cfg)
        self.own = np.array(own)

    def __next__(self):
        batch, info = super().__next__()
        return jax.tree.map(lambda x: x[self.own], batch), info | {"keys": [info["keys"][row] for row in self.own]}


if __name__ == "__main__":
    process, count, port, workdir, steps, mesh = sys.argv[1:]
    if int(count) > 1:
        processes.join(f"localhost:{port}", int(count), int(process))
    cfg = config(ast.literal_eval(mesh), policy={"zero": 3, "frozen": "sharded", "images": "all"}, steps=int(steps))
    trained_on(cfg, workdir, OwnRows, lambda step, _: print("step", step, flush=True))
