"""Foreign checkpoint files as named tensors that are read one at a time.

Every reader returns a `Source`: the file's own metadata, and a `Tensor` by name. Opening a source
reads headers only."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from evlm_jax.checkpoint.atomic_dir import check
from evlm_jax.checkpoint.lazy_tensors import Source, Tensor, content, read_json
from evlm_jax.checkpoint.safetensors_file import NAME, read_folder, read_safetensors
from evlm_jax.convert import idefics, mllama
from evlm_jax.convert.gguf_file import read_gguf
from evlm_jax.convert.onnx_file import read_onnx
from evlm_jax.paths import here

WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel
HOLDERS = (
    "state_dict",
    "model",
    "module",
    "model_state_dict",
)  # keys of training checkpoints under which the weights are


def open_source(path: Path) -> Source:
    """Opens a Hugging Face directory, or a .safetensors, .gguf, .onnx or PyTorch file. Raises
    ValueError for anything else.
    """
    if path.is_dir():
        return mllama.plain(idefics.plain(_unwrapped(read_directory(path))))
    if path.suffix not in FILES:
        raise ValueError(
            f"{path}: cannot read a file {path.suffix or 'without a suffix'}; give a Hugging Face"
            f" directory or one of {', '.join(FILES)}"
        )
    return FILES[path.suffix](path if path.suffix == ".safetensors" else here(path))._replace(
        path=path
    )


def _unwrapped(source: Source) -> Source:
    """IDEFICS and Llama 3.2 Vision without what a wrapper put in front of all names, which `plain`
    renames; of any other model recognise.py takes it off.
    """
    if source.metadata.get("model_type") not in ("idefics", "mllama"):
        return source
    *_, front = wrappers(source, WRAPPERS)
    tensors = {name.removeprefix(front): tensor for name, tensor in source.tensors.items()}
    return source._replace(tensors=tensors)


def wrappers(source: Source, fronts: Sequence[str]) -> Iterator[str]:
    """What stands before all names and is made of `fronts`, from nothing to the longest."""
    found: str | None = ""
    while found is not None:
        yield found
        longer = [found + one for one in fronts]
        found = next(
            (
                one
                for one in longer
                if source.tensors and all(name.startswith(one) for name in source.tensors)
            ),
            None,
        )


def read_directory(folder: Path) -> Source:
    """A Hugging Face directory: config.json, and one file of weights or shards with an index;
    safetensors before PyTorch's own format.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: an adapter; an export in a bucket that is not finished; a tensor of the index is
        not in its shard.
    """
    check(folder)
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file():
        about = read_json(adapter)
        kind, base = (
            about.get("peft_type", "PEFT"),
            about.get("base_model_name_or_path", "its base model"),
        )
        raise ValueError(
            f"{folder} holds an adapter ({kind} of {base}): merge it (merge_and_unload) and save"
            " the whole model, or import its base and put it beside that with `evlm convert adapt`"
        )
    metadata = read_json(config) if config.is_file() else {}
    for name, read in (
        (NAME, read_safetensors),
        ("pytorch_model.bin", lambda path: read_torch(here(path)).tensors),
    ):
        if (tensors := read_folder(folder, name, read)) is not None:
            return Source(folder, metadata, tensors)
    raise FileNotFoundError(
        f"{folder}: no {NAME}, pytorch_model.bin or index of shards; export the model with"
        " save_pretrained"
    )


def read_torch(path: Path) -> Source:
    """Reads PyTorch's own format: a state dict, or one under a key of HOLDERS. The place of each
    tensor in the file is torch's.

    Raises:
      ImportError: torch is not installed.
      ValueError: no state dict; damaged, or a pickle with more than tensors, which could run code
        and is not loaded; or of before PyTorch 1.6; another kind of file, which is named.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ImportError(
            f"{path}: PyTorch's format needs torch: pip install torch, or give the same weights as"
            " safetensors"
        ) from error
    with open(path, "rb") as file:
        begin = file.read(32)
    if not begin.startswith((b"PK", b"\x80")) and (what := content(begin)):
        raise ValueError(f"{path} is {what}")
    try:
        with FakeTensorMode():  # no tensor is read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions come to
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: damaged, or holds more than tensors; copy it again, or ask for safetensors"
            f" ({why})"
        ) from error
    state = _weights_of(path, state)
    if not isinstance(state, dict):
        kind = "tensor" if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(f"{path} holds a {kind}, no state dict: save model.state_dict()")
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors, but {', '.join(map(str, list(state)[:5])) or 'nothing'}:"
            " save model.state_dict()"
        )
    return Source(
        path, {}, {str(name): _promise(path, str(name), tensor) for name, tensor in tensors.items()}
    )


def _weights_of(path: Path, state: object) -> object:
    """What lies under keys of HOLDERS, one in the other.

    Raises ValueError for two of them side by side: which one is the model?
    """
    for _ in HOLDERS:
        known = state if isinstance(state, dict) else {}
        held = [key for key in HOLDERS if isinstance(known.get(key), dict)]
        if len(held) > 1:
            raise ValueError(f"{path} holds {' and '.join(held)}: save one of them alone")
        state = state[held[0]] if held else state
    return state


def _promise(path: Path, name: str, tensor) -> Tensor:
    """A tensor of a PyTorch file that is read later.

    Raises ValueError for a layout or a dtype that weights do not have.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout.__repr__() != "torch.strided" or kind.startswith(("q", "bits", "complex")):
        raise ValueError(
            f"{path}: {name} is {tensor.layout} {tensor.dtype}: save plain tensors of float32,"
            " bfloat16 or float16"
        )
    dtype, strides = np.dtype(getattr(ml_dtypes, kind, kind)), tensor.stride()
    if (start := getattr(tensor.untyped_storage(), "_checkpoint_offset", None)) is None:
        raise ValueError(
            f"{path}: {name} is in the format of before PyTorch 1.6: load and save the file with a"
            " newer torch"
        )

    def read() -> np.ndarray:
        count = (
            1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides))
            if tensor.numel()
            else 0
        )
        flat = np.fromfile(
            path, dtype, count, offset=start + tensor.storage_offset() * dtype.itemsize
        )
        if flat.size != count:
            raise ValueError(f"{path}: {name} reaches beyond the end of the file; copy it again")
        return np.lib.stride_tricks.as_strided(
            flat, tuple(tensor.shape), [stride * dtype.itemsize for stride in strides]
        )

    return Tensor(tuple(tensor.shape), dtype, read)


FILES = {  # how a file is read, by its suffix
    ".gguf": read_gguf,
    ".onnx": read_onnx,
    ".safetensors": lambda path: Source(path, {}, read_safetensors(path)),
    ".pt": read_torch,
    ".pth": read_torch,
    ".bin": read_torch,
}
