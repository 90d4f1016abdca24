"""The paper's cost of one layer of the language model (arXiv 2407.14177, section 2), and the ratios
that it prints.
"""

PAPER = {"hidden": 5120, "vision": 1792, "cross": 0.2, "ffn": 0.5}  # h, d, r_c, r_f
PUBLISHED = {(256, 64): 0.24, (1024, 64): 0.077}  # {(s_i, s_t): S}


def full_attention(images: int, text: int, hidden: int) -> float:
    """FLOPs where `images` visual tokens are in the text stream: 24 (s_i + s_t) h^2 + 4 (s_i +
    s_t)^2 h.
    """
    tokens = images + text
    return 24 * tokens * hidden**2 + 4 * tokens**2 * hidden


def cross_attention(
    images: int, text: int, hidden: int, vision: int, cross: float, ffn: float, media: int = 16
) -> float:
    """FLOPs where `media` tokens are in the text stream: 4 (6 + r_c + r_f) (m + s_t) h^2 + 4 (m +
    s_t)^2 h + 4 r_c s_i d h + 4 r_c (m + s_t) s_i h.
    """
    tokens = media + text
    stream = 4 * (6 + cross + ffn) * tokens * hidden**2 + 4 * tokens**2 * hidden
    return stream + 4 * cross * images * vision * hidden + 4 * cross * tokens * images * hidden


def ratio(images: int, text: int, media: int = 16) -> float:
    """The paper's S at the paper's widths: cross-attention by full attention."""
    cross = cross_attention(
        images, text, PAPER["hidden"], PAPER["vision"], PAPER["cross"], PAPER["ffn"], media
    )
    return cross / full_attention(images, text, PAPER["hidden"])


def rows() -> list[dict]:
    """The paper's figures beside those of its formula, with and without its 16 media tokens."""
    keys = "images", "text", "published", "formula", "without media tokens"
    return [
        dict(zip(keys, (*sizes, said, ratio(*sizes), ratio(*sizes, media=0))))
        for sizes, said in PUBLISHED.items()
    ]
