"""The paper's stage-1 settings (arXiv 2407.14177, tables 1 and 6): what every other experiment
changes a few fields of.
"""

from ml_collections import ConfigDict

from evlm_jax.config.compat import link_former_names

NO_DECAY = (r"gate$", r"norm", r"bias$", r"^media/", r"/ln\d/", r"/scale\d?$")


def eva02_clip_e_plus() -> dict:
    """EVA02-CLIP-E-14+ vision tower, 64 blocks of width 1792, without its last norm and head."""
    return dict(
        depth=64,
        width=1792,
        heads=16,
        mlp=15360,
        patch=14,
        image_size=224,
        pretrained_size=224,
        norm="res_post",
        bias="qv",
        activation="gelu",
        layer_scale=False,
        class_token=True,
        registers=0,
        patch_bias=True,
        embed_norm=False,
        eps=1e-6,
        taps=(29, 34, 39, 44, 49, 54, 59, 64),
        cuts=(32, 48),
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


def qwen_14b() -> dict:
    """Qwen-14B-Chat 1.0."""
    return dict(
        vocab=152064,
        hidden=5120,
        layers=40,
        heads=40,
        kv_heads=40,
        head_dim=128,
        mlp=13696,
        rope_theta=10000.0,
        eps=1e-6,
        qkv_bias=True,
        tied=False,
        dynamic_ntk=2048,
        logn=2048,
    )


def clean() -> dict:
    """Thresholds of data/clean.py: the paper gives none but the 2048 characters."""
    month = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
    return dict(
        letters=0.2,
        digits=7,
        duplicates=0.5,
        links=(
            r"https?:",
            r"www\.",
            r"\.(com|net|org|cn|html?)\b",
            r"\.(png|jpe?g|gif|webp|bmp|svg|pdf|mp4)\b",
        ),
        words=3,
        dates=(
            r"\b\d{4}[-/.]\d{1,2}[-/.]\d{1,2}\b",
            r"\b\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})\b",
            rf"\b{month}\.? \d{{1,2}}(st|nd|rd|th)?,? \d{{4}}\b",
            rf"\b\d{{1,2}}(st|nd|rd|th)? {month},? \d{{4}}\b",
            r"\d{4} ?年|\d{1,2} ?月 ?\d{1,2} ?[日号]",
        ),
        simplify=True,
        similarity=0.28,  # LAION's, on CLIP ViT-B/32
        deviation=2.0,
        aspect=3.0,
        side=64,
        web_images=30,
        web_characters=2048,
        web_similarity=0.24,  # MMC4's, on CLIP ViT-L/14
        page_confidence=0.8,
        page_characters=20,
        page_similarity=0.8,
    )


def rules(vit_depth: int, vit_from: int | None = None) -> tuple[dict, ...]:
    """Trains cross-attention, media embeddings, a baseline's bridge, and the ViT's blocks from the
    0-based number `vit_from` on.
    """
    trained = [r"^(xattn|media|bridge)/"]
    if vit_from is not None:
        trained.append(rf"^vit/blocks/({'|'.join(map(str, range(vit_from, vit_depth)))})/")
    return tuple(dict(pattern=p, lr=1.0) for p in trained) + tuple(
        dict(pattern=p, lr=None) for p in (r"^vit/", r"^llm/")
    )


def set_stage(config: ConfigDict, stage: str) -> ConfigDict:
    """Turns a config of stage 1 ("pretrain") into that of "continual" or "sft"; start those with
    `--init` of the stage before.
    """
    depth = config.vit.depth
    half, quarter = depth // 2, depth // 4
    # lr, min_lr, steps, warm-up, batch, first block of the ViT that is trained
    later = {
        "continual": (1e-4, 5e-5, 50_000, 2000, 160, half),
        "sft": (5e-5, 1e-6, 12_000, 500, 16, depth - quarter),
    }
    # The paper's steps and samples make about 12 samples a row; block pairs: T / query_block of
    # each row, and the slots.
    budgets = {
        "continual": dict(images=48, image_group=5, slots=52, block_pairs=372),
        "sft": dict(images=13, image_group=1, slots=13, block_pairs=77),
    }
    config.name = f"{config.name}_{stage}"
    if stage != "pretrain":
        if stage not in later:
            raise ValueError(f"no stage {stage!r}; there are pretrain, {', '.join(later)}")
        lr, min_lr, steps, warmup, batch, first = later[stage]
        config.vit.image_size *= 2
        config.data.update(budgets[stage])
        config.optim.update(
            lr=lr,
            min_lr=min_lr,
            warmup=warmup,
            phases=(dict(start=0.0, warmup=0, rules=rules(depth, first)),),
        )
        config.train.update(steps=steps, batch=batch)
    return config


def cross_attention() -> dict:
    """Blocks before every layer."""
    return dict(
        heads=8,
        kv_heads=8,
        head_dim=128,
        ffn=2560,
        every=1,
        schedule="blocked",
        sinks=1,
        query_block=32,
        eps=1e-5,
    )


def experts() -> dict:
    """None; what they would be."""
    return dict(
        copies=0,
        slices=4,
        top_k=4,
        gates="renormalise",
        capacity=0.0,
        balance=0.01,
        z=0.001,
        expert_block=64,
        upcycle="preserve",
    )


def data() -> dict:
    """Rows of 2,048 tokens; five of them share 208 images."""
    return dict(
        sources=(),
        weights=(),
        tasks=(),
        ends="repeat",
        template="chatml",
        length=2048,
        images=64,
        targets=2048,
        image_group=5,
        slots=208,
        block_pairs=528,
        dialogs=0,
        isolate=True,
        window=256,
        resize="squash",
        scaled_decoding=True,
        most_drops=0.1,
        cache_features=False,
        seed=0,
    )


def optim() -> dict:
    """AdamW; the upper half of the ViT is trained from a quarter of the steps on."""
    return dict(
        lr=6e-4,
        min_lr=3e-5,
        warmup=2000,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        mu_dtype="float32",
        weight_decay=0.05,
        no_decay=NO_DECAY,
        clip=10.0,
        phases=(
            dict(start=0.0, warmup=0, rules=rules(64)),
            dict(start=0.25, rules=rules(64, 32)),
        ),
    )


def train() -> dict:
    """Batches of 480 rows."""
    return dict(
        steps=125_000,
        batch=480,
        accumulate=1,
        dtype="bfloat16",
        matmul_precision="bfloat16",
        param_dtype="float32",
        frozen_dtype="bfloat16",
        remat="dots",
        loss_chunk=256,
        save_every=1000,
        keep=3,
        log_every=10,
        monitors=(),
        monitor_every=0,
        monitor_questions=0,
        seed=0,
        peak_flops=0.0,
    )


def get_config() -> ConfigDict:
    """Stage 1, multi-modal pre-training."""
    config = ConfigDict(
        dict(
            name="evlm_14b",
            vit=eva02_clip_e_plus(),
            llm=qwen_14b(),
            xattn=cross_attention(),
            moe=experts(),
            media=dict(tokens=16, placeholder="<|extra_0|>"),
            bridge=dict(kind="routed", latents=64, depth=6, heads=8, head_dim=64, ffn=4),
            data=data(),
            clean=clean(),
            optim=optim(),
            train=train(),
            mesh=dict(
                data=1,
                fsdp=-1,
                expert=1,
                tensor=1,
                slices=1,
                zero=2,
                frozen="sharded",
                images="all",
            ),
            init=dict(vision="", llm="", centre_norms=False),
        )
    )
    return link_former_names(config)
