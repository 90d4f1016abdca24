"""`evlm` and `python -m evlm_jax`: the command line, in a process that asks for large pages of
memory.
"""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"


def main() -> int:
    """Runs the command line, once more with glibc's malloc on large pages unless its tunables are
    set already. Returns the exit status.

    XLA:CPU takes the buffers of every update anew from malloc. On pages of 4 KiB their faults are a
    tenth to a quarter of a small model's step (docs/decisions.md, D-TRAIN-8).
    """
    _open_closed_streams()
    if not sys.stderr.isatty():  # a log: progress every 20 seconds, not ten times a second
        os.environ.setdefault("TQDM_MININTERVAL", "20")
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from evlm_jax.cli import main

    return main()


def _open_closed_streams() -> None:
    """What a daemon closed would be the number of the next file that is opened, a checkpoint's
    perhaps, and have the words of C++ in it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


if __name__ == "__main__":
    sys.exit(main())
