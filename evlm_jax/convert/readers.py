"""Foreign checkpoint files as named tensors that are read one at a time.

Every reader returns a `Source`: the file's own metadata, and a `Tensor` by name. Opening a source reads headers only (except ONNX,
which is one protobuf message).
"""

import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np

from evlm_jax.gguf_file import read_gguf
from evlm_jax.tensors import NAME, Source, Tensor, read_folder, read_safetensors


def open_source(path: Path) -> Source:
    """By what the path is: a Hugging Face directory, or a .safetensors, .gguf, .onnx or PyTorch file. Raises ValueError otherwise."""
    readers = {".gguf": read_gguf, ".onnx": read_onnx, ".safetensors": lambda path: Source(path, {}, read_safetensors(path))}
    readers |= dict.fromkeys((".pt", ".pth", ".bin"), read_torch)
    if path.is_dir():
        return read_directory(path)
    if path.suffix not in readers:
        raise ValueError(f"{path}: cannot read {path.suffix or 'this'} files; give a Hugging Face directory or one of {', '.join(readers)}")
    return readers[path.suffix](path)


def read_directory(folder: Path) -> Source:
    """A Hugging Face directory: config.json, and one file of weights or shards with an index; safetensors before PyTorch's own format.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a tensor of the index is not in its shard.
    """
    config = folder / "config.json"
    metadata = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    for name, read in ((NAME, read_safetensors), ("pytorch_model.bin", lambda path: read_torch(path).tensors)):
        if (tensors := read_folder(folder, name, read)) is not None:
            return Source(folder, metadata, tensors)
    raise FileNotFoundError(f"{folder}: no {NAME}, pytorch_model.bin or index of shards; export the model with save_pretrained")


def read_torch(path: Path) -> Source:
    """PyTorch's own format; a state dict, or one under "state_dict", "model" or "module". torch tells where each tensor lies in the file.

    Raises:
      ImportError: torch is not installed.
      ValueError: damaged, or a pickle that holds more than tensors: it could run code, and is not read; or of before PyTorch 1.6.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ImportError(f"{path}: PyTorch's format needs torch: pip install torch, or give the same weights as safetensors") from error
    try:
        with FakeTensorMode():  # no tensor is read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or holds more than tensors; copy it again, or ask for safetensors ({error})") from error
    for key in ("state_dict", "model", "module"):
        state = state[key] if isinstance(state.get(key), dict) else state

    def promise(name: str, tensor) -> Tensor:
        kind = str(tensor.dtype).removeprefix("torch.")
        dtype, strides = np.dtype(getattr(ml_dtypes, kind, kind)), tensor.stride()
        if (start := getattr(tensor.untyped_storage(), "_checkpoint_offset", None)) is None:
            raise ValueError(f"{path}: {name} is in the format of before PyTorch 1.6: load and save the file with a newer torch")

        def read() -> np.ndarray:
            count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides)) if tensor.numel() else 0
            flat = np.fromfile(path, dtype, count, offset=start + tensor.storage_offset() * dtype.itemsize)
            return np.lib.stride_tricks.as_strided(flat, tuple(tensor.shape), [stride * dtype.itemsize for stride in strides])

        return Tensor(tuple(tensor.shape), dtype, read)

    return Source(path, {}, {name: promise(name, tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)})


def read_onnx(path: Path) -> Source:
    """The weights of a PyTorch export, by their module names.

    The exporter keeps the names of biases and norms, hides linear weights (transposed) in MatMul nodes that are named after
    the module, and folds DINOv2's position table into two unnamed constants: class row and patch rows.
    """
    import onnx

    graph = onnx.load(path).graph
    array, dtype = onnx.numpy_helper.to_array, lambda t: onnx.helper.tensor_dtype_to_np_dtype(t.data_type)
    constants = {t.name: t for t in graph.initializer}
    tensors = {
        name: Tensor(tuple(t.dims), dtype(t), lambda t=t: array(t)) for name, t in constants.items() if not name.startswith("onnx::")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and (t := constants.pop(node.input[1], None)) is not None:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            tensors[name] = Tensor(tuple(t.dims)[::-1], dtype(t), lambda t=t: array(t).T)
    folded = [t for name, t in constants.items() if name.startswith("onnx::") and len(t.dims) == 3]
    if len(folded) == 2:
        shape = (1, sum(t.dims[1] for t in folded), folded[0].dims[2])
        positions = Tensor(shape, dtype(folded[0]), lambda: np.concatenate([array(t) for t in folded], 1))
        tensors["backbone.embeddings.position_embeddings"] = positions
    return Source(path, {}, tensors)
