"""Judges of free text: any function of a prompt. An OpenAI-compatible endpoint, or a function of
yours.

A judge has a name, which is saved with what it said: replies of two judges are not averaged.
"""

import http.client
import importlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import NamedTuple

ATTEMPTS = 5


class Judge(NamedTuple):
    """A function from a prompt to a reply."""

    name: str
    ask: Callable[[str], str]

    def __call__(self, prompt: str) -> dict:
        """What a row keeps of its judgement. Raises ValueError where the judge fails, or its reply
        is no text.
        """
        try:
            reply = self.ask(prompt)
        except OSError:
            raise
        except Exception as error:  # a function of the user's raises errors of any kind
            raise ValueError(f"judge {self.name}: {type(error).__name__}: {error}") from error
        if not isinstance(reply, str):
            raise ValueError(f"judge {self.name}: replied {reply!r}, which is no text")
        return {"judgement": reply, "judge": self.name}


def judges(rows: Sequence[dict]) -> list[str]:
    """Who judged the rows. Raises ValueError for more than one."""
    found = sorted({row.get("judge", "an unnamed judge") for row in rows if "judgement" in row})
    if len(found) > 1:
        raise ValueError(
            f"the answers were judged by {' and by '.join(found)}: let one judge all of them, into"
            " a new --out"
        )
    return found


def open_judge(spec: str, model: str = "") -> Judge:
    """A judge from the command line.

    Args:
      spec: "https://HOST/v1", an endpoint for `model`, with the key in OPENAI_API_KEY, if there is
        one; or "module:function".
    Raises:
      ValueError: neither of them.
    """
    if spec.startswith(("http://", "https://")):
        if not model:
            raise ValueError("--judge-model: name the model that the endpoint shall use")
        endpoint = Endpoint(spec, model)
        return Judge(f"{model} at {endpoint.url}", endpoint)
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"--judge {spec!r}: give https://HOST/v1, or module:function")
    try:
        ask = getattr(importlib.import_module(module), name)
    except Exception as error:  # so does a module of the user's
        raise ValueError(f"--judge {spec!r}: {type(error).__name__}: {error}") from error
    if not callable(ask):
        raise ValueError(f"--judge {spec!r}: is a {type(ask).__name__}, not a function")
    return Judge(spec, ask)


class Redirected(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key is for the address that was given, and a redirected POST would
    become a GET.
    """

    def redirect_request(self, *_):
        return None


class Endpoint:
    """Chat completions over HTTP, greedy; what may pass (limits, outages, connections and replies
    that are cut off) is tried again.
    """

    def __init__(self, url: str, model: str, wait: float = 2.0):
        self.url, self.model, self.wait = url.rstrip("/") + "/chat/completions", model, wait
        self._opener = urllib.request.build_opener(Redirected)

    def __call__(self, prompt: str) -> str:
        """The reply. Raises OSError naming the endpoint when it stays out of reach or answers
        something else.
        """
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(ATTEMPTS):
            try:
                with self._opener.open(request, timeout=120) as reply:
                    return _said(reply.read())
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}"
                if 300 <= error.code < 400:
                    raise OSError(
                        f"judge {self.url}: redirects to {error.headers.get('Location')}; give that"
                        " as --judge"
                    ) from error
                if error.code not in (408, 429) and error.code < 500:
                    raise OSError(f"judge {self.url}: {why}") from error
            except (OSError, http.client.HTTPException, Passing) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except (KeyError, IndexError, TypeError) as error:
                raise OSError(
                    f"judge {self.url}: not a chat completion: {type(error).__name__}: {error}"
                ) from error
            if attempt < ATTEMPTS - 1:
                time.sleep(self.wait * 2**attempt)
        raise OSError(f"judge {self.url}: {why}, {ATTEMPTS} times")


class Passing(Exception):
    """A reply that may be another one the next time."""


def _said(content: bytes) -> str:
    """The text of a chat completion.

    Raises Passing for one that is cut off or empty, KeyError and the like for something else.
    """
    try:
        reply = json.loads(content)
    except ValueError as error:
        raise Passing(f"not a chat completion: {error}") from error
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise Passing(f"the reply has no text but {json.dumps(text)}")
    return text
