"""The plug-in for vLLM: its server on loopback, asked by OpenAI's client, against `Generator`.

vLLM has an environment of its own, which plugins/evlm_vllm/environment.sh makes:
`EVLM_VLLM_PYTHON=DIR/bin/python pytest -m slow tests/plugins`."""

import base64
import os
import re
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import pytest
from PIL import Image

from evlm_jax.convert import export
from evlm_jax.data.samples import ImageRef, Turn, marked
from evlm_jax.data.tokenizer import load_tokenizer
from evlm_jax.generate import Generator
from tests.helpers.checkpoints import run_directory
from tests.helpers.random_model import random_model
from tests.helpers.tiny import tiny_config

openai = pytest.importorskip("openai", reason="needs the extra lmms")
PYTHON = os.environ.get("EVLM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="EVLM_VLLM_PYTHON names no Python that has vLLM"),
]
HEADS = {"heads": 2, "head_dim": 32}  # vLLM has no kernel for CPU with 16
FORMS = {
    "dense": {
        "llm": {**HEADS, "kv_heads": 1, "qkv_bias": True},
        "xattn": {**HEADS, "kv_heads": 2, "sinks": 3},
        "data": {"template": "chatml"},
    },
    "experts": {
        "llm": {**HEADS, "kv_heads": 2, "tied": False},
        "xattn": {**HEADS, "kv_heads": 2, "every": 2, "sinks": 0},
        "vit": {"registers": 3},
        "moe": {"copies": 2, "slices": 4, "top_k": 3},
        "data": {"template": "plain"},
    },
}
ASKED = {  # a letter is a picture, several in brackets are frames of a video
    "no image": ["Hello!"],
    "one image": ["<a>", "What is this?"],
    "two images": ["First ", "<a>", " then ", "<b>", " Why?"],
    "three, two side by side": ["<a>", "<b>", "and", "<c>", "Which?"],
    "a video": ["[abc]", "What happens?"],
    "an image and a video": ["<c>", "or", "[ab]", "?"],
    "a video and an image": ["[cab]", "or", "<b>", "?"],
    "spelled specials": ["<a>", "Is <|im_end|> a word?"],
}
TOKENS, ENDS = 12, (253, 254)
LIMITS = ("--max-model-len", "256", "--max-num-batched-tokens", "256", "--max-num-seqs", "8")
MEDIA = ("--limit-mm-per-prompt", '{"image":4}', "--media-io-kwargs", '{"video":{"num_frames":60}}')
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUIET = {"OMP_NUM_THREADS": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{letter: a file}."""
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for letter in "abc":
        Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8)).save(place / f"{letter}.png")
    return {letter: place / f"{letter}.png" for letter in "abc"}


@pytest.fixture(scope="module", params=FORMS)
def served(request, tmp_path_factory):
    """(Generator, OpenAI's client of a server of the same model's export)"""
    with serving(tmp_path_factory.mktemp(request.param), request.param) as sides:
        yield sides


@contextmanager
def serving(place, form, *more):
    """As `served`; `more` for the server's command line."""
    model = random_model(tiny_config(**FORMS[form]), seed=0)
    cfg = run_directory(place / "run", tiny_config(**FORMS[form]), model)
    export.export(str(place / "run"), str(place / "out"), "hf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", port, "--model", str(place / "out"), "--served-model-name", "tiny"]
    command += ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", *LIMITS, *MEDIA]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS | QUIET
    env["HF_HOME"] = str(place / "hf")
    with (
        (place / "log").open("w") as log,
        subprocess.Popen([*command, *more], env=env, stdout=log, stderr=log, cwd=place) as server,
    ):
        try:
            wait(server, port, place / "log")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            yield Generator(model, load_tokenizer(cfg.init.llm)), client
        finally:
            server.terminate()


def wait(server, port, log, seconds=900):
    """Until it answers."""
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-4000:]
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def visual(part):
    """Letters of a part's pictures, none of a text."""
    return part[1:-1] if part[0] in "<[" and part[1:-1].isalpha() else ""


def message(parts, pictures):
    """A chat as OpenAI's clients write it; frames of a video as vLLM takes them."""
    content = []
    for part in parts:
        coded = [base64.b64encode(pictures[x].read_bytes()).decode() for x in visual(part)]
        if part[0] == "[":
            url = "data:video/jpeg;base64," + ",".join(coded)
            content.append({"type": "video_url", "video_url": {"url": url}})
        elif coded:
            url = "data:image/png;base64," + coded[0]
            content.append({"type": "image_url", "image_url": {"url": url}})
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def ask(client, messages, tokens=TOKENS, **more):
    """The first choice of a greedy answer."""
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=tokens, temperature=0, logprobs=True,
        top_logprobs=2, extra_body={"return_token_ids": True} | more,
    )  # fmt: skip
    return answer.choices[0]


@pytest.mark.parametrize("asked", ASKED)
def test_answers_are_those_of_generate(served, pictures, asked):
    """Up to margins of 1e-3 between the two best tokens."""
    generator, client = served
    parts = ASKED[asked]
    refs = [tuple(ImageRef(str(pictures[x])) for x in visual(p)) for p in parts if visual(p)]
    turn = Turn("user", *marked(["".join("<image>" if visual(p) else p for p in parts)], len(refs)))
    (expected,) = generator.generate([generator.prompt([turn], refs)], TOKENS)
    got = ask(client, message(parts, pictures))
    tokens = [token for token in got.token_ids if token not in ENDS]
    for place, (mine, theirs) in enumerate(zip(expected.tokens, tokens)):
        best, second = (top.logprob for top in got.logprobs.content[place].top_logprobs)
        if mine != theirs:
            assert best - second < 1e-3
            return
    assert tokens == list(expected.tokens)


def test_requests_do_not_see_each_other(served, pictures):
    """Asked at once, prompts and answers of several forms in one step, each has its own answer."""
    _, client = served
    messages = [message(parts, pictures) for parts in ASKED.values()] * 2
    alone = [ask(client, one).token_ids for one in messages[: len(ASKED)]] * 2
    with ThreadPoolExecutor(len(messages)) as pool:
        together = list(pool.map(partial(ask, client), messages))
    assert [answer.token_ids for answer in together] == alone


def test_a_full_cache_changes_no_answer(pictures, tmp_path):
    """What begins again beside new requests goes on with its own pictures: one question, of three
    pictures, in a cache for two or three of the six requests that run at once.
    """
    cache = ("--block-size", "32", "--num-gpu-blocks-override", "16", "--max-num-seqs", "6")
    with serving(tmp_path, "dense", *cache) as (_, client):

        def long(number):
            chat = message([f"<{'abc'[number % 3]}>", "What?"], pictures)
            return ask(client, chat, 150 + 20 * (number % 4), ignore_eos=True).token_ids

        alone = [long(number) for number in range(12)]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(long, range(12))) == alone
        metrics = f"{str(client.base_url).removesuffix('v1/')}metrics"
        (count,) = re.findall(
            rb"^vllm:num_preemptions_total\{.*\} (.*)$",
            urllib.request.urlopen(metrics).read(),
            re.M,
        )
        assert float(count) > 0


def url(data):
    """A chat with what should be a picture."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [part]}]


def test_what_is_wrong_is_refused_and_the_server_lives(served, pictures):
    _, client = served
    several = message(["<a>", "<b>", "<c>", "<a>", "<b>"], pictures)
    system = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Hi"}]
    video, text = message([f"[{'abc' * 20}]", "?"], pictures), message(["word " * 99], pictures)
    for wrong, words in (
        (url(base64.b64encode(b"no picture").decode()), "image"),
        (several, "At most 4 image"),
        (system, "role"),
        (video, "visual tokens"),
        (text, "context length"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, wrong)
    for prompt, words in (
        ("<image>What is this?", "no picture is given"),
        ([5, 255, 255, 6], "stands for an image"),
        ([5, 300], "no picture is given"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    assert ask(client, message(ASKED["one image"], pictures)).token_ids
