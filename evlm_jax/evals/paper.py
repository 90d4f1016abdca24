"""The paper's figures, by task and the metric of ours that is nearest; it states no harness.

A row: model -> score.
"""

MODELS = ("EVLM-Base", "EVLM-Chat", "EVLM-MoE")


def _row(*scores: float) -> dict[str, float]:
    return dict(zip(MODELS, scores))


PAPER: dict[str, dict[str, dict[str, float]]] = {
    "vqav2": {"accuracy (official)": _row(82.92, 81.93, 83.76)},
    "gqa": {"accuracy (lmms-eval)": _row(62.19, 64.39, 62.89)},
    "scienceqa-img": {"accuracy (lmms-eval)": _row(85.57, 86.37, 86.81)},
    "vizwiz": {"accuracy (evalai)": _row(49.62, 47.28, 49.19)},
    "textvqa": {"accuracy (evalai)": _row(64.51, 67.52, 68.31)},
    "docvqa": {"anls": _row(53.16, 53.27, 54.44)},
    "chartqa": {"relaxed accuracy (lmms-eval)": _row(59.92, 63.36, 63.12)},
    "ai2d": {"accuracy (lmms-eval)": _row(63.14, 76.0, 75.5)},
    "mme": {"perception": _row(1579, 1593.56, 1607), "cognition": _row(345, 402.5, 351)},
    "mmbench-en": {"circular (lmms-eval)": _row(78.1, 76.89, 78.09)},
    "mmbench-cn": {"circular (lmms-eval)": _row(71.47, 76.89, 76.55)},
    "pope": {"accuracy (llava)": _row(94.56, 89.65, 93.3)},
    "video-captions": {"verbosity": {"EVLM": 5.73}, "accuracy": {"EVLM": 7.22}},
}
