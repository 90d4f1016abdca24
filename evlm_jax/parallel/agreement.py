"""Several processes that read the same rows of a batch go by the same values, or say that they
cannot.

Where mesh.tensor spans processes each of them reads the rows by itself. An image that only one
could read would give each another loss, and their copies of the parameters would drift apart
without a word. So what one of them has left out, all leave out; the rest is compared by sums. Both
happen within the step, and nobody waits for it."""

from functools import partial

import jax
import jax.numpy as jnp

from evlm_jax.batch import Batch
from evlm_jax.parallel.mesh import Layout, active_layout
from evlm_jax.parallel.sharding import shard_map_local

SPREAD = 2654435761  # odd, so that a value and its place both count


def agreed(batch: Batch) -> tuple[Batch, jax.Array | None]:
    """The batch without the targets and pictures that some process could not read, and whether all
    else is the same on all processes; None where no processes share rows.
    """
    layout = active_layout()
    if layout is None or not layout.rows_are_shared:
        return batch, None
    fields = {name: x for name, x in batch._asdict().items() if x is not None}
    axes = {
        name: ("rows", "images") if name in ("pixels", "taps") else ("rows",) for name in fields
    }
    fields, same = shard_map_local(partial(_agreed, layout), (axes,), (axes, ()))(fields)
    return batch._replace(**fields), same


def _agreed(layout: Layout, fields: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """On one device: its rows, and the same rows on the others along "tensor"."""
    targets = jax.lax.pmin(fields["targets"], "tensor")  # -1 where somebody lacks it
    same = jnp.all((fields["targets"] == targets) | (targets < 0))
    fields = fields | {"targets": targets}
    for name in fields.keys() & {"pixels", "taps"}:
        if layout.rule("images").used:  # each picture is on one device alone
            compared = fields.keys() - {name}
        else:
            there = jnp.any(
                fields[name] != 0, axis=tuple(range(2, fields[name].ndim)), keepdims=True
            )
            fields[name] = jnp.where(
                jax.lax.pmin(there.astype(jnp.int32), "tensor") > 0, fields[name], 0
            )
            compared = fields.keys()
    sums = jnp.stack([_sum(fields[name]) for name in sorted(compared)])
    same &= jnp.all(jax.lax.pmin(sums, "tensor") == jax.lax.pmax(sums, "tensor"))
    return fields, jax.lax.pmin(same.astype(jnp.int32), layout.mesh.axis_names) > 0


def _sum(x: jax.Array) -> jax.Array:
    """uint32 []: another one where a value differs or two have changed places."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    bits = bits.astype(jnp.uint32).ravel()
    return (bits * (jnp.arange(len(bits), dtype=jnp.uint32) * jnp.uint32(SPREAD) | 1)).sum()
