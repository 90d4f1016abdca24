"""All attention by kernels under shard_map, on the meshes of docs/pods.md, compiled for their
slices."""

import re

import jax
import jax.numpy as jnp
import pytest

from evlm_jax.models.evlm import IMAGE_KEYS, cross_attention_op
from evlm_jax.models.text_attention import TEXT, TEXT_KEYS, text_attention_op
from evlm_jax.models.vit import image_attention_op
from evlm_jax.ops.grouped_attention import AttentionPlan
from evlm_jax.parallel.compiler import uncached
from evlm_jax.parallel.mesh import make_layout
from evlm_jax.planning import chips
from tests.helpers.attention import needs_compiler
from tests.helpers.tiny import tiny_config

TOKENS, IMAGES, KEYS, HEADS, PAIRS, BLOCK = 256, 8, 257, 8, 12, 32


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v5p:2x2x1", {"fsdp": 4}),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2, "images": "rows"}),
        ("v5p:2x2x4", {"expert": 16}),
        ("v6e:2x4", {"expert": 4, "tensor": 2}),
        ("v6e:16x16", {"fsdp": 32, "tensor": 8}),
        ("v5e:4x4", {"expert": 4, "tensor": 4}),
    ],
)
def test_compiles_on_meshes(topology, mesh):
    """Three kernels of each kind on a device's own part: no array changes devices."""
    devices, _ = chips.devices(topology)
    rows = mesh.get("fsdp", 1) * mesh.get("expert", 1)
    cfg = tiny_config(
        llm={"heads": HEADS, "kv_heads": HEADS, "window": (0, 64)},
        xattn={"heads": HEADS, "kv_heads": HEADS},
        data={"images": IMAGES, "slots": IMAGES},
        train={"batch": rows, "attention": "pallas"},
        mesh={"data": 1} | mesh,
    )
    layout = make_layout(cfg, devices)

    def spec(axes, *shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes))

    text = [spec(axes, rows, TOKENS, HEADS, 128) for axes in (TEXT, TEXT_KEYS, TEXT_KEYS)]
    shared = [spec(IMAGE_KEYS, rows, IMAGES, KEYS, HEADS, 128)] * 2
    pictures = [spec(("pictures", None, "vision_heads"), rows * IMAGES, KEYS, HEADS, 112)] * 3
    numbers = [
        spec(("rows",), rows, *shape, dtype="int32")
        for shape in ((TOKENS,), (TOKENS,), (PAIRS, BLOCK), (TOKENS,), (PAIRS,), (PAIRS,))
    ]

    def total(arrays, until, place, *plan):
        text, shared, pictures = arrays
        out = (
            text_attention_op(cfg, until, place)(1, *text),
            cross_attention_op(cfg)(text[0], *shared, AttentionPlan(*plan)),
            image_attention_op("pallas", None, None)(*pictures),
        )
        return sum(x.astype(jnp.float32).sum() for x in out)

    with layout.active(), uncached(devices[0]):
        program = jax.jit(jax.grad(total)).lower((text, shared, pictures), *numbers).compile()
    text = program.as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 9
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)
