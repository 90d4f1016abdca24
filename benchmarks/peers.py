"""Language models of the same GGUF file in transformers and in llama.cpp, behind the function that
demo_speed.py times.

run(tokens [B, T], new) -> seconds of (prefill, `new` further greedy tokens of every row)
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray, int], tuple[float, float]]
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def transformers_run(gguf: Path, dtype: str) -> Run:
    """AutoModelForCausalLM with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype
    ).eval()

    @torch.no_grad()
    def run(tokens, new):
        start = time.perf_counter()
        out = model(torch.tensor(tokens), use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(new):
            out = model(
                out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True
            )
        return read - start, time.perf_counter() - read

    return run


def llama_cpp_run(gguf: Path, kind: str) -> Run:
    """llama.cpp through its C functions, all rows in one batch.

    `kind`: "f32", "f16", "q8_0" or "q4_1", made of the file first, or "as stored".
    """
    import llama_cpp as lib

    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    threads = os.cpu_count()
    if kind != "as stored":
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = (
            {"f32": 0, "f16": 1, "q4_1": 3, "q8_0": 7}[kind],
            True,
            threads,
        )
        wider = Path(tempfile.mkdtemp()) / f"{kind}.gguf"
        lib.llama_model_quantize(str(gguf).encode(), str(wider).encode(), ctypes.byref(params))
        gguf = wider
    model = lib.llama_model_load_from_file(str(gguf).encode(), lib.llama_model_default_params())
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(context, tokens: np.ndarray, first: int) -> np.ndarray:
        """Reads tokens [B, T] at positions first..; the best next token of each row."""
        rows, length = tokens.shape
        batch = lib.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        for i, (row, t) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(tokens[row, t]), first + t, 1
            batch.seq_id[i][0], batch.logits[i] = row, t == length - 1
        if status := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        last = [lib.llama_get_logits_ith(context, row * length + length - 1) for row in range(rows)]
        best = [np.ctypeslib.as_array(logits, (vocab,)).argmax() for logits in last]
        lib.llama_batch_free(batch)
        return np.array(best)[:, None]

    def run(tokens, new):
        rows, length = tokens.shape
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = (
            rows * (length + new + 8),
            tokens.size,
            rows,
        )
        params.n_threads = params.n_threads_batch = threads
        context = lib.llama_init_from_model(model, params)
        start = time.perf_counter()
        token = decode(context, tokens, 0)
        read = time.perf_counter()
        for i in range(new):
            token = decode(context, token, length + i)
        seconds = read - start, time.perf_counter() - read
        lib.llama_free(context)
        return seconds

    return run
