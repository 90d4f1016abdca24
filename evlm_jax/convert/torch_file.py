"""PyTorch's own file format, written tensor by tensor: torch lays out an empty file, then each
tensor goes to its place.
"""

from collections.abc import Callable
from contextlib import closing

from etils import epath

from evlm_jax.checkpoint.lazy_tensors import Tensors
from evlm_jax.checkpoint.safetensors_file import write_tensor
from evlm_jax.paths import Mirror


def write_torch(path: epath.Path, tensors: Tensors, written: Callable[[int], None]) -> None:
    """A state dict that torch.load(weights_only=True) reads.

    Raises ImportError without torch, ValueError as tensors.write_folder.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ImportError(
            f"{path}: PyTorch's format needs torch: pip install torch, or export with --format hf"
        ) from error
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name))
            for name, tensor in tensors.items()
        }
    with closing(
        Mirror(path.parent)
    ) as mirror:  # what is written at many places is copied into a bucket when it is whole
        file = mirror.here / path.name
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, file)
        with FakeTensorMode():
            places = {
                name: tensor.untyped_storage()._checkpoint_offset
                for name, tensor in torch.load(file, weights_only=True).items()
            }
        with open(file, "r+b") as filled:
            for name, tensor in tensors.items():
                filled.seek(places[name])
                write_tensor(filled, name, tensor, written)
