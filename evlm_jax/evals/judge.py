"""Judges of free text: any function of a prompt. An OpenAI-compatible endpoint, or a function of yours."""

import importlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

ATTEMPTS = 5


def open_judge(spec: str, model: str = "") -> Callable[[str], str]:
    """A judge from the command line.

    Args:
      spec: "https://HOST/v1", which is asked for `model` with the key in OPENAI_API_KEY, if there is one; or "module:function".
    Raises:
      ValueError: neither of them.
    """
    if spec.startswith(("http://", "https://")):
        if not model:
            raise ValueError("--judge-model: name the model that the endpoint shall use")
        return Endpoint(spec, model)
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"--judge {spec!r}: give https://HOST/v1, or module:function")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--judge {spec!r}: {error}") from error


class Endpoint:
    """Chat completions over HTTP, greedy; what may pass (limits, outages) is tried again."""

    def __init__(self, url: str, model: str, wait: float = 2.0):
        self.url, self.model, self.wait = url.rstrip("/") + "/chat/completions", model, wait

    def __call__(self, prompt: str) -> str:
        """The reply. Raises OSError naming the endpoint when it stays out of reach or answers something else."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise OSError(f"judge {self.url}: not a chat completion: {type(error).__name__}: {error}") from error
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429) and error.code < 500 or attempt == ATTEMPTS - 1:
                    raise OSError(f"judge {self.url}: {error.code} {error.reason}") from error
            except urllib.error.URLError as error:
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"judge {self.url}: {error.reason}") from error
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")
