"""One of several processes that train the test model: `python -m tests.mesh.worker PROCESS
PROCESSES PORT WORKDIR STEPS MESH [HOST]`.

HOST is the process that cannot read the pictures of a row in batch 2 (1-based), and reads another
word in batch 5."""

import ast
import hashlib
import sys

import jax
import numpy as np
from flax import nnx

from evlm_jax.parallel import distributed
from tests.helpers.tiny import TinyData
from tests.mesh.devices import config
from tests.mesh.runs import trained_on


class OwnRows(TinyData):
    """The rows of a process."""

    def __init__(self, cfg, own):
        super().__init__(cfg)
        self.own = np.array(own)

    def __next__(self):
        batch, info = super().__next__()
        return jax.tree.map(lambda x: x[self.own], batch), info | {
            "keys": [info["keys"][row] for row in self.own]
        }


class Damaged(OwnRows):
    """What one process reads of rows that another one reads as well."""

    def __next__(self):
        batch, info = super().__next__()
        if self.next == 2:  # as data.pipeline.collate leaves a document
            for array, value in ((batch.pixels, 0), (batch.targets, -1)):
                array[0] = value
        if self.next == 5:
            batch.tokens[0, 0] += 1
        return batch, info


def tell(step, model) -> None:
    """What this process holds of parameters that all hold whole."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model())):
        if leaf.is_fully_replicated:
            found.update(np.asarray(leaf.addressable_data(0)).tobytes())
    print("copy", step, found.hexdigest(), flush=True)


if __name__ == "__main__":
    process, count, port, workdir, steps, mesh, *host = sys.argv[1:]
    if int(count) > 1:
        distributed.initialize_distributed(f"localhost:{port}", int(count), int(process))
    policy = {"zero": 3, "frozen": "sharded", "images": "rows" if host else "all"}
    plain = {"remat": "none", "loss_chunk": 0}  # which compiles sooner
    cfg = config(ast.literal_eval(mesh), policy=policy, steps=int(steps), **plain)
    on_step = tell if host else lambda step, _: print("step", step, flush=True)
    trained_on(cfg, workdir, Damaged if host == [process] else OwnRows, on_step)
