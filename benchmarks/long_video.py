"""Memory and time of `evlm generate` about longer and longer videos, each a start of its own:
`python -m benchmarks.long_video --checkpoint runs/demo`."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from benchmarks import parser

GOLDEN = Path("tests/golden/format0_dense").absolute()
FRAMES = (64, 256, 1024)
SIDE = 128  # pixels of a frame


def write_clip(path: Path, frames: int) -> None:
    """Coloured squares, others in each frame, at one frame a second."""
    colours = np.random.default_rng(0).integers(0, 256, (frames, 4, 4, 3), np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.width = stream.height = SIDE
        for squares in colours:
            picture = squares.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def ask(checkpoint: Path, clip: Path, frames: int) -> tuple[float, float]:
    """Wall time in seconds, and most resident memory in GB. Raises CalledProcessError where it
    fails.
    """
    words = ["--checkpoint", checkpoint, "--video", clip, "--frames", str(frames)]
    command = [sys.executable, "-m", "evlm_jax", "generate", *words, "--prompt", "What is shown?"]
    begin = time.perf_counter()
    child = subprocess.Popen(command, cwd=GOLDEN, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - begin, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Prints a line a number of frames."""
    arguments = parser(__doc__)
    arguments.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    args = arguments.parse_args()
    counts, checkpoint = FRAMES, args.checkpoint.absolute()
    if args.smoke:
        counts, checkpoint = (70,), GOLDEN / "run"
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, max(counts))
        for frames in counts:
            seconds, memory = ask(checkpoint, clip, frames)
            print(f"{frames:5} frames: {memory:.2f} GB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
