"""What tests of scenes share."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from evlm_jax import assets
from evlm_jax.data.sources import open_source

needs_scenes = pytest.mark.skipif(
    not all(map(assets.available, assets.members("scenes"))),
    reason="this machine has not all assets of `evlm fetch scenes`",
)


def digest(name: str, numbers: range) -> str:
    """Of the pixels of scenes."""
    source, found = open_source(name), hashlib.sha256()
    for number in numbers:
        found.update(np.asarray(Image.open(io.BytesIO(source.picture(number)))).tobytes())
    return found.hexdigest()
