"""PyTorch's own file format, written tensor by tensor: torch lays out an empty file, then each tensor goes to its place."""

from collections.abc import Callable
from pathlib import Path

from evlm_jax.tensors import Tensors, write_tensor


def write_torch(path: Path, tensors: Tensors, written: Callable[[int], None]) -> None:
    """A state dict that torch.load(weights_only=True) reads. Raises ImportError without torch, ValueError as tensors.write_folder."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ImportError(f"{path}: PyTorch's format needs torch: pip install torch, or export with --format hf") from error
    with FakeTensorMode():
        state = {name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name)) for name, tensor in tensors.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    with FakeTensorMode():
        places = {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in torch.load(path).items()}
    with open(path, "r+b") as file:
        for name, tensor in tensors.items():
            file.seek(places[name])
            write_tensor(file, name, tensor, written)
