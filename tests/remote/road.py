"""A tiny experiment of which everything lies in a bucket: towers, and data as tar, parquet and
ArrayRecord.
"""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from evlm_jax import paths
from evlm_jax.config import EVLMConfig, to_dict
from tests.data.made import png, row, write_images, write_tar
from tests.helpers.checkpoints import dinov2_directory, llama_directory
from tests.helpers.tiny import tiny_config

ROWS = 12
EXPERIMENT = """import json

from ml_collections import ConfigDict


def get_config(form=""):
    return ConfigDict(json.loads({text!r}), convert_dict=True)
"""


def make(root: str, scratch: Path, **sections) -> EVLMConfig:
    """Writes everything in `scratch`, copies it to `root`; the config of what is there."""
    sources = [
        f"img2dataset:{root}/data/a.tar",
        f"llava:{root}/data/b.parquet",
        f"llava:{root}/data/c.array_record",
    ]
    data = {
        "sources": tuple(sources),
        "weights": (1.0,) * 3,
        "window": 4,
        "length": 96,
        "targets": 48,
        "block_pairs": 24,
    } | sections.pop("data", {})
    cfg = tiny_config(
        data=data,
        train={"steps": 4, "save_every": 2, "keep": 2} | sections.pop("train", {}),
        **sections,
    )
    dinov2_directory(scratch / "vision", cfg)
    llama_directory(scratch / "llm", cfg)
    (scratch / "data").mkdir()
    write_tar(scratch / "data/a.tar", range(ROWS))
    turns = [
        row(f"r{i}", None, "<image>which?", f"number{i}")["conversations"] for i in range(ROWS)
    ]
    pq.write_table(
        pa.table({"image": [png(i) for i in range(ROWS)], "conversations": turns}),
        scratch / "data/b.parquet",
    )
    write_images(scratch / "data/pictures", ROWS)
    writer = ArrayRecordWriter(str(scratch / "data/c.array_record"), "group_size:1")
    for i in range(ROWS):
        writer.write(
            json.dumps(row(f"c{i}", f"pictures/{i}.png", "<image>colour?", f"shade{i}")).encode()
        )
    writer.close()
    for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
        paths.write(f"{root}/{file.relative_to(scratch).as_posix()}", file.read_bytes())
    return replace(cfg, init=replace(cfg.init, vision=f"{root}/vision", llm=f"{root}/llm"))


def experiment(file: Path, cfg: EVLMConfig) -> str:
    """The config as an experiment file, for the command line."""
    file.write_text(EXPERIMENT.format(text=json.dumps(to_dict(cfg))))
    return str(file)
