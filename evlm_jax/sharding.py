"""The device mesh. The only file that knows its axes: models are written for one device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"


def make_mesh(devices: list | None = None) -> Mesh:
    """All devices along one data axis."""
    devices = devices or jax.devices()
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: parameters, scalars."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a Batch over the data axis."""
    return NamedSharding(mesh, P(DATA))


def check_rows(mesh: Mesh, rows: int, field: str) -> None:
    """Raises ValueError if `rows` cannot be split over the mesh."""
    if rows % mesh.shape[DATA]:
        raise ValueError(f"{field} = {rows} rows cannot be split over {mesh.shape[DATA]} devices: use a multiple")
