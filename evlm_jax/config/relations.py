"""Relations between fields of the configuration, each with the mend where it does not hold."""

from typing import TYPE_CHECKING

from evlm_jax.config.model import LLMConfig

if TYPE_CHECKING:
    from evlm_jax.config import EVLMConfig

Relation = tuple[bool, str, str]  # whether it holds, the field, the mend


def vision(cfg: "EVLMConfig") -> list[Relation]:
    """Relations within the vision tower, and of what pictures it sees."""
    vit = cfg.vit
    return [
        (
            all(side % vit.patch == 0 for side in vit.size),
            "vit.image_size",
            f"must be a multiple of vit.patch = {vit.patch}",
        ),
        (
            vit.pretrained_size % vit.patch == 0,
            "vit.pretrained_size",
            f"must be a multiple of vit.patch = {vit.patch}",
        ),
        (vit.width % vit.heads == 0, "vit.heads", f"must divide vit.width = {vit.width}"),
        (
            not vit.rotary or vit.width // vit.heads % 4 == 0,
            "vit.rotary",
            f"needs heads of a multiple of 4, vit.width / vit.heads is {vit.width // vit.heads}",
        ),
        (len(vit.taps) > 0, "vit.taps", "needs at least one block number"),
        (list(vit.taps) == sorted(set(vit.taps)), "vit.taps", "must ascend without repeats"),
        (
            all(t <= vit.depth for t in vit.taps),
            "vit.taps",
            f"must lie in 1..vit.depth = {vit.depth} (1-based)",
        ),
        (
            all(t <= vit.depth for t in vit.cuts),
            "vit.cuts",
            f"must lie in 1..vit.depth = {vit.depth}",
        ),
        (
            not cfg.data.tiles or not (vit.tiles or cfg.media.around),
            "data.tiles",
            "must be 0 where vit.tiles or media.around is set",
        ),
        *tiles(cfg),
    ]


def tiles(cfg: "EVLMConfig") -> list[Relation]:
    """Relations of a tower whose pictures are cut into tiles."""
    vit, side = cfg.vit, cfg.vit.pretrained_size
    return [
        (
            not vit.tiles
            or vit.laid in vit.grids
            and all(pixels % side == 0 for pixels in vit.size),
            "vit.image_size",
            f"must be 1 to vit.tiles = {vit.tiles} squares of vit.pretrained_size = {side}",
        ),
        (
            not vit.grid_by_picture or vit.size == (vit.tiles * side, side),
            "vit.image_size",
            f"must be {vit.tiles * side},{side} where vit.grid_by_picture is set",
        ),
        (
            not vit.grid_by_picture or 0 < len(vit.grids) < 256,
            "vit.grid_by_picture",
            f"needs vit.tiles, and at most 255 grids of them, not {len(vit.grids)}",
        ),
        (
            not vit.grid_by_picture or cfg.bridge.kind in ("routed", "joined"),
            "bridge.kind",
            "must be routed or joined where vit.grid_by_picture is set",
        ),
        (
            not vit.tiles or not vit.rotary,
            "vit.rotary",
            "must be 0 where vit.tiles is set: tiles have tables of positions",
        ),
        (
            (vit.tiles > 0) == (vit.global_blocks > 0) and vit.global_blocks < vit.depth,
            "vit.global_blocks",
            f"must lie in 1..{vit.depth - 1}, below vit.depth, where vit.tiles is set, else be 0",
        ),
        (
            not vit.tiles or vit.taps[-1:] == (vit.depth,),
            "vit.taps",
            f"must end with vit.depth = {vit.depth} where vit.tiles is set",
        ),
        (
            not vit.tiles or cfg.bridge.kind not in ("flamingo", "llava"),
            "bridge.kind",
            "must be routed, fused or joined where vit.tiles is set",
        ),
    ]


def language(cfg: "EVLMConfig") -> list[Relation]:
    """Relations of the language model, and of what connects it to the ViT."""
    llm, xattn, moe = cfg.llm, cfg.xattn, cfg.moe
    patches, kind = cfg.vit.patches, cfg.bridge.kind
    return [
        (llm.heads % llm.kv_heads == 0, "llm.kv_heads", f"must divide llm.heads = {llm.heads}"),
        (llm.head_dim % 2 == 0, "llm.head_dim", "must be even: rotary positions turn pairs"),
        *layers(llm),
        (
            xattn.heads % xattn.kv_heads == 0,
            "xattn.kv_heads",
            f"must divide xattn.heads = {xattn.heads}",
        ),
        (
            llm.logn != 1,
            "llm.logn",
            "must be the trained context in tokens, at least 2, or 0 for never",
        ),
        (
            xattn.every <= llm.layers,
            "xattn.every",
            f"must lie in 1..llm.layers = {llm.layers}, or be 0 for no cross-attention",
        ),
        (
            xattn.first < max(min(xattn.every, llm.layers), 1),
            "xattn.first",
            f"must be below xattn.every = {xattn.every}, or 0",
        ),
        (
            xattn.every == 0 or kind != "llava",
            "xattn.every",
            "must be 0 where bridge.kind is llava, whose images stand in the text",
        ),
        (
            xattn.every > 0 or kind in ("routed", "llava"),
            "xattn.every",
            f"must be positive: bridge.kind {kind} feeds cross-attention",
        ),
        (
            xattn.every > 0 or not moe.copies,
            "moe.copies",
            "must be 0 where xattn.every is 0: experts stand in cross-attention",
        ),
        (
            not moe.copies or not xattn.gated,
            "xattn.gated",
            "must be False where moe.copies is positive: experts are not gated",
        ),
        (xattn.ffn % moe.slices == 0, "moe.slices", f"must divide xattn.ffn = {xattn.ffn}"),
        (
            not moe.copies or 1 <= moe.top_k <= moe.experts,
            "moe.top_k",
            f"must lie in 1..moe.copies * moe.slices = {moe.experts}",
        ),
        (
            kind != "llava" or cfg.media.tokens == patches,
            "media.tokens",
            f"must be {patches}, one a patch, where bridge.kind is llava",
        ),
    ]


def layers(llm: LLMConfig) -> list[Relation]:
    """Relations of what may differ from layer to layer, of rotary positions and of words."""
    scaling, most = llm.rope_scaling, f"llm.layers = {llm.layers}"
    plainly = scaling is None or (scaling.kind == "linear" and not scaling.query)
    turned = plainly or scaling.original > 0
    plain = not llm.rope and scaling is None and llm.rotary_share == 1
    return [
        (1 <= len(llm.window) <= llm.layers, "llm.window", f"needs 1 to {most} values"),
        (len(llm.rope) <= llm.layers, "llm.rope", f"has at most {most} values"),
        (
            llm.rotary_width > 0 and llm.rotary_width % 2 == 0,
            "llm.rotary_share",
            f"must leave an even part of llm.head_dim = {llm.head_dim}",
        ),
        (
            scaling is None or scaling.kind != "dynamic" or llm.rotary_width > 2,
            "llm.rope_scaling.kind",
            "can be dynamic where more than two dimensions of a head turn",
        ),
        (turned, "llm.rope_scaling.original", "must be positive: the tokens of the first training"),
        (
            scaling is None or scaling.slow < scaling.fast,
            "llm.rope_scaling.slow",
            "must be below llm.rope_scaling.fast",
        ),
        (
            plain or not llm.dynamic_ntk,
            "llm.dynamic_ntk",
            "must be 0 where llm.rope, llm.rope_scaling or llm.rotary_share is set",
        ),
        (
            not (llm.more_words and llm.tied),
            "llm.more_words",
            "must be 0 where llm.tied is set: the head has as many words as the embedding",
        ),
    ]


def training(cfg: "EVLMConfig") -> list[Relation]:
    """Relations of rows, batches and phases of training, and of what is held quantised."""
    data, train = cfg.data, cfg.train
    packed = data.pack_length + data.images * max(0, cfg.media.tokens - data.pack_media)
    return [
        (
            not data.pack_length or data.length >= packed,
            "data.length",
            f"must be at least {packed}: data.pack_length, and for each of data.images what"
            " media.tokens is more than data.pack_media",
        ),
        (
            train.batch % train.accumulate == 0,
            "train.accumulate",
            f"must divide train.batch = {train.batch}",
        ),
        (
            train.batch % (train.accumulate * data.image_group) == 0,
            "data.image_group",
            "must divide the rows of train.batch / train.accumulate",
        ),
        (cfg.quant.tile % 2 == 0, "quant.tile", "must be even: in 4 bits a byte is two values"),
        (
            train.keep_every % train.save_every == 0,
            "train.keep_every",
            f"must be a multiple of train.save_every = {train.save_every}, or 0",
        ),
        (
            train.attention != "pallas" or not cfg.vit.grid_by_picture,
            "train.attention",
            "cannot be pallas where vit.grid_by_picture is set: kernels see all keys of an image",
        ),
        (
            train.attention != "cudnn" or not cfg.llm.scales.score_cap,
            "train.attention",
            "cannot be cudnn where llm.scales.score_cap is set, which it does not know",
        ),
        (
            not cfg.init.centre_norms or cfg.xattn.norm_kind == "layer",
            "init.centre_norms",
            "must be False where xattn.norm_kind is rms, which has no centre",
        ),
        (
            not train.monitors or train.monitor_every >= 1,
            "train.monitor_every",
            "must be positive where train.monitors has tasks",
        ),
        (
            all(phase.step is None or phase.start == 0 for phase in cfg.optim.phases),
            "optim.phases",
            "have a start or a step, not both",
        ),
        (
            cfg.optim.phases and not (cfg.optim.phases[0].start or cfg.optim.phases[0].step),
            "optim.phases",
            "the first must start at 0",
        ),
    ]
