"""Whether a store of objects answers, asked once for each bucket and in a bounded time.

Its clients look for credentials on metadata servers, and repeat what failed, for minutes.
"""

import concurrent.futures
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

import fsspec

PATIENCE = 15.0  # seconds that a client has for its first answer
GLANCE = 3.0  # seconds that its host has, without credentials, once the client had none
# scheme -> variables that name another host, the host
HOSTS = {
    "gs": (("STORAGE_EMULATOR_HOST",), "https://storage.googleapis.com"),
    "s3": (("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "https://s3.amazonaws.com"),
}
MENDS = {
    "gs": "give credentials (gcloud auth application-default login, or a file in"
    " GOOGLE_APPLICATION_CREDENTIALS; NO_GCE_CHECK=true for a public bucket)",
    "s3": "give credentials (aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
}
Result = TypeVar("Result")

_answered: set[str] = set()


def ask(path: str) -> None:
    """Checks that the store of a remote path answers.

    Raises:
      OSError: it does not; the line names the cause: network, credentials or bucket.
    """
    bucket = "/".join(path.split("/", 3)[:3])
    if bucket in _answered:
        return
    scheme = bucket.partition("://")[0]
    key = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if scheme == "gs" and key and not os.path.isfile(key):  # gcsfs would go on without
        raise OSError(f"{path}: GOOGLE_APPLICATION_CREDENTIALS={key}: no such file")
    try:
        within(PATIENCE, _look, path, bucket)
    except TimeoutError as error:
        raise OSError(f"{path}: {error}: {_cause(scheme)}") from error
    except FileNotFoundError as error:
        raise OSError(f"{path}: no such bucket: give one that there is") from error
    except (ImportError, ValueError):  # of the scheme: whoever reads tells
        raise
    except Exception as error:  # clients raise errors of any kind
        mend = MENDS.get(scheme, "see to the address")
        raise OSError(f"{path}: {_line(error)}; {mend}, and see to the network") from error
    _answered.add(bucket)


def within(seconds: float, function: Callable[..., Result], *args) -> Result:
    """Result of a function, or its exception. Raises TimeoutError after `seconds`; the function
    then continues in a thread whose result is dropped.
    """
    future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not concurrent.futures.wait([future], seconds).done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return future.result()


def _look(path: str, bucket: str) -> None:
    """Asks for a path, and for its bucket where there is no such path."""
    system, inner = fsspec.core.url_to_fs(path)
    try:
        system.info(inner)
    except FileNotFoundError:
        if bucket.partition("://")[0] not in HOSTS:
            return
        try:
            system.info(system._strip_protocol(bucket))
        except FileNotFoundError:
            raise
        except Exception:  # who may use its objects need not see a bucket
            pass


def _cause(scheme: str) -> str:
    """Why a client had no answer: asks its host without one."""
    if scheme not in HOSTS:
        return "see to the address and the network"
    names, usual = HOSTS[scheme]
    host = next(filter(None, map(os.environ.get, names)), usual)
    try:
        within(GLANCE, urllib.request.urlopen, host, None, GLANCE)
    except urllib.error.HTTPError:  # an answer
        pass
    except (OSError, ValueError) as error:
        return f"{host} cannot be reached ({_line(error)}): see to the network"
    return f"{host} can be reached, so credentials are not found: {MENDS[scheme]}"


def _line(error: Exception) -> str:
    """Its message on one line."""
    return " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
