"""The device mesh, and where every array lies on it: the only file that knows mesh axes. Models
name the axes (sharding.py).

    slices    copies of everything, joined by the data-centre network; a config counts them within
              `data`
    data      copies of everything; each takes its own rows of a batch
    fsdp      rows, and pieces of what is stored
    expert    rows and pieces likewise, and the experts of a mixture
    tensor    heads, hidden layers of FFNs, the vocabulary; and images, in the ViT and up to the
              keys of the cross-attention

RULES says, for every logical axis, over which mesh axes a dimension is split where it is used, and
over which others as well where it waits. Vectors and scalars lie as they are used.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from evlm_jax.batch import Batch
from evlm_jax.config import EVLMConfig, MeshConfig
from evlm_jax.ops.platform import compile_for

AXES = ("slices", "data", "fsdp", "expert", "tensor")
ROWS = ("slices", "data", "fsdp", "expert")
PIECES = ("fsdp", "expert")


class Rule(NamedTuple):
    """Mesh axes of a logical axis."""

    used: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()  # in addition


# Axes of parameters first, then of activations. "vision*" and the last two are others where
# mesh.images is "rows".
RULES = {
    "whole": Rule(),
    "norm": Rule(),
    "embed": Rule(stored=PIECES),
    "heads": Rule(("tensor",)),
    "kv_heads": Rule(("tensor",)),
    "mlp": Rule(("tensor",)),
    "vocab": Rule(("tensor",)),
    "expert": Rule(("expert",)),
    "rank": Rule(stored=PIECES),  # of an adapter: its other dimension need not wait in pieces
    "vision": Rule(stored=(*PIECES, "tensor")),
    "vision_heads": Rule(),
    "vision_mlp": Rule(stored=(*PIECES, "tensor")),
    "image_heads": Rule(stored=(*PIECES, "tensor")),
    "rows": Rule(ROWS),
    "copies": Rule(("slices", "data")),  # rows, where another dimension is in pieces
    "pieces": Rule(PIECES),
    "images": Rule(("tensor",)),  # of an image group
    "pictures": Rule((*ROWS, "tensor")),  # images of all image groups
}
BY_ROWS = {
    "vision": Rule(stored=PIECES),
    "vision_heads": Rule(("tensor",)),
    "vision_mlp": Rule(("tensor",), PIECES),
    "image_heads": Rule(("tensor",), PIECES),
    "images": Rule(),
    "pictures": Rule(ROWS),
}

_active: ContextVar["Layout | None"] = ContextVar("layout", default=None)


def active_layout() -> "Layout | None":
    """Layout of the program that is being traced; None on one device."""
    return _active.get()


@dataclass(frozen=True)
class Layout:
    """A mesh and the policies of config.mesh. The functions of sharding.py use the layout that is
    active during tracing.
    """

    mesh: Mesh
    cfg: MeshConfig
    within: bool = False  # a slice: what is traced has the rows of one, and is mapped over all

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context for tracing and compiling what runs on this mesh."""
        token = _active.set(self)
        try:
            with compile_for(self.mesh.devices.flat[0].platform):
                yield
        finally:
            _active.reset(token)

    def spec(self, axes: tuple[str | None, ...], stored: bool = False) -> P:
        """PartitionSpec of an array with these logical axes; a mesh axis splits the first dimension
        whose rule names it.
        """
        taken, out = set(), []
        for rule in map(self.rule, axes):
            names = [
                name
                for name in self.split((*rule.used, *(rule.stored if stored else ())))
                if name not in taken
            ]
            taken |= set(names)
            out.append(tuple(names) or None)
        return P(*out)

    def split(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these mesh axes that have more than one device."""
        hidden = ("slices",) if self.within else ()
        return tuple(n for n in names if self.mesh.shape[n] > 1 and n not in hidden)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of devices of each axis, as config.mesh counts them."""
        slices, data, *others = (self.mesh.shape[axis] for axis in AXES)
        return dict(zip(AXES[1:], (slices * data, *others)))

    def rule(self, axis: str | None) -> Rule:
        """Rule of a logical axis; None is never split. Raises KeyError where there is no rule."""
        if axis is None:
            return Rule()
        return (RULES | (BY_ROWS if self.cfg.images == "rows" else {}))[axis]

    def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """Sharding of an activation with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def place(self, param: nnx.Variable, stored: bool) -> NamedSharding:
        """Sharding of a parameter, or of a stack of them, whose leading layer axis is never split.

        Vectors are stored as they are used. What waits in pieces along a dimension that has no
        equal ones does so along another. Where `uneven` is in its metadata, a dimension lies whole
        that has no equal pieces.
        """
        metadata, shape = param.get_metadata(), jax.tree.leaves(param)[0].shape
        axes, layers = metadata["axes"], len(shape) - len(metadata["axes"])
        spec = [*self.spec(axes, stored and len(axes) > 1)]
        spec = [None] * layers + self._moved(shape[layers:], axes, spec)
        if metadata.get("uneven"):
            spec = [None if n % self._pieces(names) else names for n, names in zip(shape, spec)]
        return NamedSharding(self.mesh, P(*spec))

    def _moved(self, shape: tuple[int, ...], axes: tuple[str, ...], spec: list) -> list:
        """`spec`, where pieces of a dimension that are not equal, and only wait, are along the
        largest of the others that has them: the 4304 of SigLIP so400m's MLP over 64 devices.
        """
        spec = [(names,) if isinstance(names, str) else names for names in spec]  # as P has one
        for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            names = spec[i] or ()
            waits = tuple(name for name in names if name not in self.rule(axis).used)
            if waits and size % self._pieces(names):
                other = [
                    j for j, n in enumerate(shape) if not spec[j] and n % self._pieces(waits) == 0
                ]
                if other:
                    spec[i] = tuple(name for name in names if name not in waits) or None
                    spec[max(other, key=shape.__getitem__)] = waits
        return spec

    def _pieces(self, names: str | tuple[str, ...] | None) -> int:
        """Number of pieces of a dimension with this entry of a PartitionSpec."""
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(self.mesh.shape[name] for name in names)

    def parts(self, axis: str) -> int:
        """Number of pieces of a dimension with this logical axis where it is used."""
        return math.prod(self.mesh.shape[name] for name in self.rule(axis).used)

    @property
    def rows_are_shared(self) -> bool:
        """Whether several processes have the same rows of a batch."""
        grid = self.mesh.devices.reshape(-1, self.mesh.shape["tensor"])
        return any(len({device.process_index for device in devices}) > 1 for devices in grid)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding with a copy on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def rows(self) -> NamedSharding:
        """Sharding of arrays whose first axis is rows of a batch."""
        return self.sharding(("rows",))

    def batch(self, batch: Batch) -> Batch:
        """Shardings of a Batch, or of its shapes: rows and groups over their axes, pictures of a
        group over those of images.
        """
        pictures = self.sharding(("rows", "images"))
        return Batch(
            **{
                k: v if v is None else pictures if k in ("pixels", "taps") else self.rows
                for k, v in batch._asdict().items()
            }
        )

    def trained(self, tree: Any) -> Any:
        """Shardings of a tree with trainable parameters, their gradients or moments, as Variables;
        other leaves are replicated.
        """
        return self._tree(tree, stored=True)

    def frozen(self, tree: Any) -> Any:
        """Shardings of frozen parameters."""
        return self._tree(tree, stored=self.cfg.frozen == "sharded")

    def _tree(self, tree: Any, stored: bool) -> Any:
        def place(node):
            return node.replace(self.place(node, stored)) if is_param(node) else self.replicated

        return jax.tree.map(place, tree, is_leaf=is_param)

    def own_groups(self, count: int) -> list[int]:
        """Numbers, ascending, of the image groups that are on devices of this process, of a batch
        of `count`.
        """
        held = self.rows.addressable_devices_indices_map((count,)).values()
        return sorted({group for (groups,) in held for group in range(*groups.indices(count))})

    def put_groups(self, batch: Batch, own: list[int], count: int) -> Batch:
        """Copies the image groups `own` of a batch of `count`, NumPy arrays on this process, to
        arrays on all devices.
        """
        place = {group: i for i, group in enumerate(own)}

        def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
            size = len(x) // len(own)  # of an image group

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                first, stop, _ = index[0].indices(count * size)
                begin = place[first // size] * size
                return x[(slice(begin, begin + stop - first), *index[1:])]

            return jax.make_array_from_callback((count * size, *x.shape[1:]), sharding, piece)

        return jax.tree.map(put, batch, self.batch(batch))

    def jit(self, f: Callable, **options) -> Callable:
        """jax.jit of `f` on this mesh."""

        @functools.wraps(f)
        def traced(*args, **named):
            with self.active():
                return f(*args, **named)

        return jax.jit(traced, **options)


def jit(layout: Layout | None, f: Callable, **options) -> Callable:
    """jax.jit of `f` on the mesh of `layout`, or on one device without one."""
    return jax.jit(f, **options) if layout is None else layout.jit(f, **options)


def make_layout(cfg: EVLMConfig, devices: list | None = None) -> Layout:
    """The mesh of `cfg` on all devices, or on those given (also of a topology that is only compiled
    for).

    Raises:
      ValueError: the axes do not make the devices, or do not divide rows, images, heads or experts;
        names the field and the mend.
    """
    devices = list(devices or jax.devices())
    sizes = check_mesh(cfg, len(devices))
    shape = mesh_shape(cfg.mesh, sizes)
    if cfg.mesh.slices > 1 and hasattr(devices[0], "slice_index"):
        inner, outer = (1, *shape[1:]), (shape[0], 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), cfg.mesh)


def check_mesh(cfg: EVLMConfig, devices: int) -> dict[str, int]:
    """Number of devices of each axis, where there are so many. Raises ValueError as
    `make_layout`.
    """
    sizes = mesh_sizes(cfg.mesh, devices)
    _check(cfg, sizes)
    return sizes


def mesh_shape(mesh: MeshConfig, sizes: dict[str, int]) -> tuple[int, ...]:
    """Number of devices along each of AXES."""
    data, *others = (sizes[axis] for axis in AXES[1:])
    return mesh.slices, data // mesh.slices, *others


def mesh_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """Number of devices of each axis. Raises ValueError where their product is another number."""
    sizes = dict(zip(AXES[1:], (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor)))
    free = [axis for axis in ("data", "fsdp") if sizes[axis] == -1]
    if len(free) > 1 or min(size for axis, size in sizes.items() if axis not in free) < 1:
        raise ValueError(f"config: mesh {sizes}: axes are positive; one of data and fsdp may be -1")
    rest = math.prod(size for axis, size in sizes.items() if axis not in free)
    if devices % rest or (not free and rest != devices):
        mend = f"{rest} must divide that" if free else "their product must be that"
        raise ValueError(f"config: mesh {sizes} is {rest} devices, there are {devices}: {mend}")
    return sizes | dict.fromkeys(free, devices // rest)


def _check(cfg: EVLMConfig, sizes: dict[str, int]) -> None:
    rows, tensor, images = (
        math.prod(sizes[axis] for axis in ROWS[1:]),
        sizes["tensor"],
        cfg.mesh.images == "all",
    )
    micro, slices = cfg.train.batch // cfg.train.accumulate, cfg.mesh.slices
    rules = [
        (
            slices >= 1 and sizes["data"] % slices == 0,
            f"mesh.slices = {slices} must divide mesh.data = {sizes['data']}",
        ),
        (
            micro % rows == 0,
            f"train.batch / train.accumulate = {micro} rows cannot be split over {rows} devices "
            "(mesh.data * fsdp * expert): use a multiple, or give devices to mesh.tensor",
        ),
        (
            micro % (rows * cfg.data.image_group) == 0,
            f"{micro // rows} rows of a device and micro-batch (train.batch / train.accumulate "
            f"over mesh.data * fsdp * expert = {rows}) are no whole image groups of "
            f"data.image_group = {cfg.data.image_group}: use a multiple, or data.image_group = 1 "
            "with "
            "data.slots = data.images",
        ),
        (
            cfg.moe.experts % sizes["expert"] == 0,
            f"{cfg.moe.experts} experts cannot be split over mesh.expert = {sizes['expert']}",
        ),
    ]
    split = {"llm.heads": cfg.llm.heads, "llm.kv_heads": cfg.llm.kv_heads}
    split |= (
        {"xattn.heads": cfg.xattn.heads, "xattn.kv_heads": cfg.xattn.kv_heads}
        if cfg.cross_layers
        else {}
    )
    split |= (
        {"data.slots": cfg.data.slots} if images else {"vit.heads": cfg.vit.heads}
    )  # mesh.images says which of them
    split |= (
        {"bridge.heads": cfg.bridge.heads} if not images and cfg.bridge.kind == "flamingo" else {}
    )
    rules += [
        (n % tensor == 0, f"{name} = {n} must be a multiple of mesh.tensor = {tensor}")
        for name, n in split.items()
    ]
    for ok, message in rules:
        if not ok:
            raise ValueError(f"config: {message}")


def check_parameters(layout: Layout, params: nnx.State, name: Callable[[tuple], str]) -> None:
    """Checks that every parameter has a sharding.

    Raises ValueError listing those without axes or rule, and those that are indivisible.
    """
    problems = []
    for path, param in nnx.to_flat_state(params):
        axes, shape = param.get_metadata().get("axes"), jax.tree.leaves(param)[0].shape
        if axes is None or not set(axes) <= RULES.keys():
            problems.append(
                f"{name(path)} has axes {axes}: name every dimension by one of {', '.join(RULES)}"
            )
            continue
        for size, split in zip(shape, layout.place(param, stored=True).spec):
            split = (split,) if isinstance(split, str) else split or ()
            parts = math.prod(layout.mesh.shape[axis] for axis in split)
            if size % parts:
                problems.append(
                    f"{name(path)} {shape}: {size} cannot be split over {parts} devices"
                    f" (mesh.{' * '.join(split)})"
                )
    if problems:
        raise ValueError("mesh: parameters do not fit:\n  " + "\n  ".join(problems))


def is_param(node: Any) -> bool:
    """Whether a node of a tree is a parameter with its axes."""
    return isinstance(node, nnx.Variable)
