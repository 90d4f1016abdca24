"""EVLM on real weights and data that train on two CPU cores: frozen DINOv2 ViT-S/14 and
SmolLM2-135M; questions about scenes of pasted drawings and about shapes, names of emoji, documents
of photographs, and videos, in two languages.

`get_config("fast")` is the short form for CI, `get_config("full")` the long documented one;
`get_config("gemma")` has Gemma 3 270M for its language model, which speaks Chinese
(`evlm fetch gemma`);
`get_config("moe")` is the stage behind any of them, with experts that `evlm upcycle` made of its
FFNs; `get_config("lora")` another, which trains adapters of the language model alone."""

from ml_collections import ConfigDict

from experiments import base


def dinov2_small(image_size: int) -> dict:
    """DINOv2 ViT-S/14. Taps of one early, one middle and one late block; the last block of the
    shipped weights is the weakest.
    """
    return dict(
        depth=12,
        width=384,
        heads=6,
        mlp=1536,
        patch=14,
        image_size=image_size,
        pretrained_size=518,
        norm="pre",
        bias="all",
        activation="gelu",
        layer_scale=True,
        class_token=True,
        registers=0,
        patch_bias=True,
        embed_norm=False,
        eps=1e-6,
        taps=(4, 8, 11),
        cuts=(),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def smollm2_135m() -> dict:
    """SmolLM2-135M-Instruct."""
    return dict(
        vocab=49152,
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        rope_theta=100000.0,
        eps=1e-5,
        qkv_bias=False,
        tied=True,
        dynamic_ntk=0,
        logn=0,
    )


def gemma3_270m() -> dict:
    """Gemma 3 270M, the base model: every sixth layer sees all, the others 512 positions."""
    return dict(
        vocab=262144,
        hidden=640,
        layers=18,
        heads=4,
        kv_heads=1,
        head_dim=256,
        mlp=2048,
        rope_theta=1e6,
        eps=1e-6,
        qkv_bias=False,
        tied=True,
        dynamic_ntk=0,
        logn=0,
        qk_norm="head",
        norms="both+1",
        activation="gelu_tanh",
        window=(*[512] * 5, 0),
        rope=(*[1e4] * 5, 1e6),
        scales=dict(embedding=640**0.5, query=256**-0.5),
    )


# A caption says in ten tokens what four questions ask for, of a picture that is there anyway.
SCENES = "scenes:assets?ask=name,count,colour,text,where,caption"
# and their shares of the documents
SOURCES = {
    SCENES: 0.64,
    "scenes-zh": 0.1,
    "easy-vqa": 0.08,
    "emoji-en": 0.04,
    "emoji-zh": 0.02,
    "emoji-hands-en": 0.08,
    "albums": 0.02,
    "clips": 0.02,
}

RULES = (
    dict(pattern=r"^xattn/.*gate$", lr=15.0),
    dict(pattern=r"^xattn/\d+/o/", lr=3.0),
    dict(pattern=r"^(xattn|media|bridge)/", lr=1.0),
    dict(pattern=r"^(vit|llm)/", lr=None),
)


def get_config(form: str = "") -> ConfigDict:
    """The demo. `form`: "" (half an hour on 2 cores with AVX2), "fast" (a few minutes), "full"
    (4.5 times as many steps), "gemma", "moe", "lora".
    """
    steps = {"": 200, "gemma": 200, "fast": 6, "full": 900, "moe": 40, "lora": 40}[form]
    config = base.get_config()
    config.name = "demo"
    config.vit = dinov2_small(image_size=112)
    config.vit.taps = (2, 8, 11)  # letters and places stand in the first, names in the last
    config.llm = smollm2_135m()
    config.xattn.update(heads=3, kv_heads=3, head_dim=64, ffn=288)
    config.media.update(tokens=4, placeholder="<repo_name>")
    config.data.update(
        sources=tuple(SOURCES),
        weights=tuple(SOURCES.values()),
        template="plain",  # a third fewer tokens than a chat template
        length=256,
        images=6,
        targets=112,
        image_group=1,
        slots=6,
        block_pairs=14,
        window=64,
        cache_features=True,
    )
    config.clean.update(similarity=0.0, web_similarity=0.0)  # there is no scorer
    config.optim.update(
        lr=1.5e-3,
        min_lr=1e-4,
        warmup=10,
        b2=0.95,  # a short run: the second moment must follow
        clip=1.0,
        phases=(dict(start=0.0, warmup=0, rules=RULES),),
    )
    config.train.update(
        steps=steps,
        batch=4,
        dtype="float32",
        frozen_dtype="float32",
        matmul_precision="bfloat16",  # `evlm demo` takes what this CPU is fast at
        remat="dots",
        loss_chunk=0,
        save_every=100,
        keep=2,
        log_every=5,
        peak_flops=195e9,
    )
    config.mesh.update(data=-1, fsdp=1, frozen="replicated")
    config.init.update(vision="dinov2-small", llm="smollm2-135m-instruct", centre_norms=True)
    if form == "gemma":
        _with_gemma(config)
    if form in ("moe", "lora"):
        _behind(config, form)
    return config


def _with_gemma(config: ConfigDict) -> None:
    """Changes the language model, and what has its sizes or its words."""
    config.name = "demo_gemma"
    config.llm = gemma3_270m()
    config.xattn.update(heads=4, kv_heads=4, ffn=320)
    config.media.placeholder = "<unused0>"
    config.train.loss_chunk = 28  # of the logits of four rows: 117 MB, and not 470
    config.init.llm = "gemma3-270m"


def _behind(config: ConfigDict, form: str) -> None:
    """Turns the demo into a stage behind it."""
    config.name = f"demo_{form}"
    config.data.seed = 1  # other batches than the stage before
    if form == "moe":
        config.moe.copies = 4
        config.optim.update(lr=3e-4, min_lr=1e-4)
        return
    config.lora = dict(patterns=(r"^llm/layers/\d+/(attn|mlp)/",), rank=16, alpha=32.0)
    rules = dict(pattern="/lora_", lr=1.0), dict(pattern="", lr=None)
    config.optim.phases = (dict(start=0.0, warmup=0, rules=rules),)
