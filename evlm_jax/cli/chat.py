"""`evlm chat`: its arguments, and what it does."""

import argparse
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from typing import Annotated

from evlm_jax.cli import generate
from evlm_jax.config.ranges import NewTokens, Range, argument

Port = Annotated[int, Range(1, 2**16 - 1)]
MISSING = (
    "chat needs Gradio, which wants Pillow 12: in an environment of its own, python -m pip"
    ' install "evlm_jax[chat]"'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them; the options of sampling are those of `evlm generate`."""
    parser.add_argument(
        "--checkpoint", required=True, help="directory of a training run, or of an import"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets the whole network use the page",
    )
    parser.add_argument("--port", type=argument(Port), default=7860, help="to listen at")
    parser.add_argument(
        "--frames",
        help="of a video: a number, evenly spread, or a rate, as 2fps; 16 where left out",
    )
    parser.add_argument(
        "--max-new-tokens", type=argument(NewTokens), default=64, help="most tokens of an answer"
    )
    generate.add_sampling(parser)


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted. Uploaded files are deleted at the end.

    Raises:
      ImportError: Gradio is missing.
      OSError: the address cannot be listened at.
      ValueError: the model cannot be loaded, or an option says nothing.
    """
    from evlm_jax.data import video
    from evlm_jax.data.formats import captions

    sampling = generate.sampling(args)
    if importlib.util.find_spec("gradio") is None:
        raise ImportError(MISSING)
    frames = args.frames or captions.FRAMES
    video.spread(frames, 1.0)
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        why = error.strerror.partition(" (")[0]
        raise OSError(
            f"cannot listen at {args.host}, port {args.port}: {why}; give another --port or --host"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="evlm-chat-") as uploads:
        # Gradio and its parts read them when they are imported.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": uploads,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from evlm_jax.chat import page
        from evlm_jax.chat.conversation import Chat
        from evlm_jax.runs import load_trained

        trained = load_trained(args.checkpoint)
        chat = Chat(trained, frames, args.max_new_tokens, **sampling)
        print("evlm chat: the first start compiles, later ones read what it kept:", flush=True)
        for part in chat.warm_up():
            print(f"  {part}", flush=True)
        served = page.make(chat, args.checkpoint)
        print(f"evlm chat: {page.serve(served, args.host, args.port)} (Ctrl+C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            served.close()
