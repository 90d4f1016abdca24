"""Tokens a second of vLLM beside transformers, on one export and in one run, in float32:
`python plugins/evlm_vllm/speed.py FOLDER` with vLLM's Python.

Answers go on behind their end, so that both make as many tokens; one image a request."""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams


def chat(number: int) -> tuple[Image.Image, list[dict]]:
    """A question about a picture."""
    colour = tuple(37 * number * step % 256 for step in (1, 2, 3))
    parts = [{"type": "image"}, {"type": "text", "text": f"What is picture {number}?"}]
    return Image.new("RGB", (64, 64), colour), [{"role": "user", "content": parts}]


def of_transformers(folder: str, chats, tokens: int) -> dict[str, float]:
    """Seconds of all requests in one batch, and one after the other."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def seconds(groups):
        begin = time.perf_counter()
        for group in groups:
            texts = [
                processor.apply_chat_template(chat, add_generation_prompt=True) for _, chat in group
            ]
            pictures = [[picture] for picture, _ in group]
            model.generate(**processor(text=texts, images=pictures), **how)
        return time.perf_counter() - begin

    seconds([chats[:1]])  # warm
    return {
        "transformers, one batch": seconds([chats]),
        "transformers, one by one": seconds([[chat] for chat in chats]),
    }


def of_vllm(folder: str, chats, tokens: int) -> float:
    """Seconds of all requests, given at once."""
    llm = LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=len(chats),
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    asked = [
        [
            {
                "role": "user",
                "content": [{"type": "image_pil", "image_pil": picture}, chat[0]["content"][1]],
            }
        ]
        for picture, chat in chats
    ]
    llm.chat(asked[:1], sampling, use_tqdm=False)  # warm
    begin = time.perf_counter()
    llm.chat(asked, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of `evlm convert export --format hf`")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    args = parser.parse_args()
    chats = [chat(number) for number in range(args.requests)]
    # transformers first: vLLM makes its own class of the config known to it
    times = of_transformers(args.folder, chats, args.tokens)
    times["vLLM"] = of_vllm(args.folder, chats, args.tokens)
    for name, seconds in times.items():
        print(f"{name}: {args.requests * args.tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
