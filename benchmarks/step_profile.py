"""Where a training step's time goes by the profilers of JAX and of PyTorch, for demo_speed.py."""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

KINDS = {  # of an operation, by the first word that its name has
    "products": ("ynn", "dot", "onednn", "eigen", "mm", "linear", "attention"),
    "casts": ("convert", "_to_copy"),
    "copies": ("copy", "transpose", "dynamic", "slice", "concatenate", "gather", "index", "cat"),
}
NO_WORK = ("Thunk", "Await", "ThreadPool", "ParseArguments", "while", "call")


def kind(name: str) -> str:
    """Of an operation; "others" are sums, functions of single numbers, and fills."""
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "others")


def of_jax(step: Callable[[], None]) -> Counter:
    """{kind: seconds} of a compiled step on CPUs, summed over threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    seconds = Counter()
    for event in events:
        ran = "tf_XLA" in threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and ran and not any(w in event["name"] for w in NO_WORK):
            seconds[kind(event["name"])] += event["dur"] / 1e6
    return seconds


def of_torch(step: Callable[[], None]) -> Counter:
    """{kind: seconds} of a step in PyTorch on CPUs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds = Counter()
    for event in found.key_averages():
        seconds[kind(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def line(seconds: Counter) -> str:
    """The seconds of each kind, most first."""
    return ", ".join(f"{kind} {value:.2f}" for kind, value in seconds.most_common())
