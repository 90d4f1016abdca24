"""How the command line speaks: help with defaults, the version, one line about an error."""

import argparse
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from evlm_jax.assets import AssetError, cache_root

CLIENTS = (
    "gcsfs",
    "google",
    "botocore",
    "aiobotocore",
    "aiohttp",
    "requests",
)  # of stores; their errors are of no common kind


class Parser(argparse.ArgumentParser):
    """The command's parser and those of its actions: help shows the defaults."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)
        self.register("action", None, Once)

    def error(self, message: str) -> NoReturn:
        """Usage, and one line about what is wrong."""
        super().error(one_line(message))


class Once(argparse.Action):
    """Stores the value of an argument that may be given once: of two, neither is dropped."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        given = vars(namespace).setdefault("given", set())
        if self.dest in given and option_string:
            parser.error(f"{option_string} is given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out defaults that carry no information."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = (
            action.default is None or isinstance(action.default, bool) or action.default in ("", [])
        )
        return action.help if nothing else super()._get_help_string(action)


class Version(argparse.Action):
    """Looks up the version only when it is printed."""

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import version

        print(f"evlm {version('evlm-jax')}")
        parser.exit()


def one_line(text: str) -> str:
    """A message as one line that any terminal takes: what is listed below one another in it stands
    behind one another, and what a name holds besides letters is spelled.
    """
    listed = re.sub(r"([:;,]?)\s*\n\s+", lambda found: f"{found[1] or ';'} ", text.strip())
    control = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(control, lambda found: repr(found[0])[1:-1], listed)


def reported(error: Exception) -> str:
    """The line about an error: what a user can mend is said by whoever raised it."""
    if isinstance(
        error, (ValueError, OSError, ImportError, FloatingPointError, AssetError)
    ) and str(error):
        file = str(getattr(error, "filename", None) or "")
        of_cache = file and file.startswith(f"{cache_root()}{os.sep}")
        said = _of_file(error, file) if file and getattr(error, "strerror", None) else str(error)
        return f"{said}; EVLM_CACHE names another cache" if of_cache else said
    first = next(iter(str(error).splitlines()), "")
    if type(error).__module__.partition(".")[0] in CLIENTS:
        return (
            f"a bucket did not answer as it should: {first or type(error).__name__}; see to the"
            " credentials and the network"
        )
    if (
        type(error).__name__ == "JaxRuntimeError"
        or isinstance(error, MemoryError)
        or first.startswith("Unable to initialize backend")
    ):  # out of memory, no such device, a lost host
        return f"{first or 'out of memory'} (EVLM_DEBUG=1 shows where)"
    return (
        f"this is a bug, please report it with what EVLM_DEBUG=1 shows: {type(error).__name__}:"
        f" {first}"
    )


def _of_file(error: OSError, file: str) -> str:
    """What the system says of a file, without its number; and what was expected there."""
    if isinstance(error, IsADirectoryError):
        return f"{file} is a folder: give a file"
    if isinstance(error, NotADirectoryError):
        above = (path for path in (Path(file), *Path(file).parents) if os.path.lexists(path))
        return f"{next(above, file)} is a file: give a folder"
    return f"{file}: {error.strerror}"


def reported_once() -> None:
    """Threads of orbax and tensorstore, and clients of stores, print tracebacks of what the main
    thread raises as well: from here on they do not.
    """
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).addFilter(_without_traceback)
    for name in ("gcsfs", "google.auth"):  # warn of what they try one after the other
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(  # of a cache that is full or read-only: what is there is used
        "ignore", "Error (reading|writing) persistent compilation cache"
    )
    sys.unraisablehook = _unraisable


def _without_traceback(record: logging.LogRecord) -> bool:
    """Whether it is about something else than an error."""
    return not record.exc_info


def _unraisable(unraisable) -> None:
    """Without the answers that come to orbax's loops when a failed save has closed them."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
