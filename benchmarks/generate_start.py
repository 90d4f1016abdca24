"""How long `evlm generate` takes from its second start on, beside the same of an older checkout, in
turns.

    python -m benchmarks.generate_start --checkpoint runs/demo --image cat.png --against ../old
        # git worktree add ../old COMMIT
    python -m benchmarks.generate_start --smoke     # this side alone, on a tiny run

Both sides run in the environment that is installed, each with the cache of compiled programs that
it keeps by itself, which may be none."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "format0_dense"


def seconds(source: Path, words: list[str], folder: Path) -> float:
    """Wall time of one start. Raises CalledProcessError where it fails."""
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    } | {"PYTHONPATH": str(source)}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-P", "-m", "evlm_jax", "generate", *words],
        env=environment,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def main() -> None:
    """Prints the wall time of each start, and the ratio of the fastest ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--prompt", default="what color is the shape?")
    parser.add_argument("--against", type=Path, help="an older checkout")
    parser.add_argument(
        "--starts", type=int, default=3, help="that are timed, behind one that is not"
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    folder, checkpoint, images, starts = (
        Path.cwd(),
        args.checkpoint.absolute(),
        [path.absolute() for path in args.image],
        args.starts,
    )
    if args.smoke:
        folder, checkpoint, images, starts = (
            GOLDEN,
            GOLDEN / "run",
            [GOLDEN / "pictures" / "0.png"],
            1,
        )
    words = [
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        args.prompt,
        "--max-new-tokens",
        "16",
        *(f"--image={path}" for path in images),
    ]
    sides = {"this": ROOT} | ({"older": args.against.absolute()} if args.against else {})
    took: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + starts):
        for name, source in sides.items():
            took[name].append(seconds(source, words, folder))
            print(f"{name}, start {number + 1}: {took[name][-1]:.1f} s", flush=True)
    best = {name: min(values[1:]) for name, values in took.items()}
    if args.against:
        print(
            f"from the second start on: {best['this']:.1f} s, {best['this'] / best['older']:.2f} of"
            f" {best['older']:.1f} s"
        )


if __name__ == "__main__":
    main()
