"""Pictures people look at: attention over an image, gates by layer, loads of experts, loss
curves.

Charts are SVG text whose colours are CSS variables (`--ink`, `--series-0`...), so a page can show
them light or dark; pictures are PNG or JPEG bytes.
"""

import base64
import io
import re
from collections.abc import Sequence
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "evlm",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SENTINELS = {"#010203": "var(--ink)", "#010204": "var(--line)"} | {
    f"#0102{i + 16:02x}": f"var(--series-{i})" for i in range(8)
}
INK, LINE, *SERIES = SENTINELS


def overlay(
    image: Image.Image, grid: np.ndarray, size: int = 320, strength: float = 0.85
) -> Image.Image:
    """The image under a warm glow where `grid` [g, g] is large and dimmed where it is small; both
    are stretched to size x size.
    """
    base = (
        np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float64)
        / 255
    )
    low, high = np.percentile(grid, (20, 99.5))
    level = np.clip((grid - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    level = np.asarray(Image.fromarray(level).resize((size, size), Image.Resampling.BICUBIC)).clip(
        0, 1
    )[..., None]
    grey = base.mean(-1, keepdims=True)
    dim = 0.35 * (0.6 * grey + 0.4 * base) + np.array([0.02, 0.03, 0.08])
    glow = matplotlib.colormaps["inferno"](0.25 + 0.75 * level[..., 0])[..., :3]
    lit = 0.55 * base + 0.45 * glow
    mix = level * strength + (1 - strength) * level**2
    return Image.fromarray((255 * (dim * (1 - mix) + lit * mix)).clip(0, 255).astype(np.uint8))


def data_uri(image: Image.Image, size: int | None = None, kind: str = "PNG") -> str:
    """The image as a `data:` address, at most `size` pixels a side; kind "PNG" or "JPEG"."""
    image = image.convert("RGBA" if kind == "PNG" and image.mode in ("RGBA", "P", "LA") else "RGB")
    if size:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def from_data_uri(uri: str) -> Image.Image:
    """Inverse of `data_uri`."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def loss_curves(losses: dict[str, dict[str, Sequence[float]]]) -> str:
    """SVG of {source: {"step": [...], "loss": [...]}}: every value faint, a running mean on top."""
    figure, axes = _figure(5.2, 3.4)
    for (source, curve), colour in zip(losses.items(), cycle(SERIES)):
        step, loss = np.asarray(curve["step"]), np.asarray(curve["loss"], np.float64)
        window = max(1, len(loss) // 25)
        smooth = np.convolve(
            np.pad(loss, (window - 1, 0), "edge"), np.ones(window) / window, "valid"
        )
        axes.plot(step, loss, color=colour, alpha=0.25, linewidth=1)
        axes.plot(step, smooth, color=colour, linewidth=2, label=source)
    axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    _legend(figure)
    return _svg(figure)


def score_curves(curves: dict[str, dict[str, Sequence[float]]]) -> str:
    """SVG of {name: {"step": [...], "score": [...]}}."""
    figure, axes = _figure(5.2, 3.4)
    for i, (name, curve) in enumerate(curves.items()):
        dash = "-" if i < len(SERIES) else "--"  # more than there are colours
        axes.plot(
            curve["step"],
            curve["score"],
            dash,
            color=SERIES[i % len(SERIES)],
            linewidth=2,
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set(xlabel="step", ylabel="score")
    _legend(figure)
    return _svg(figure)


def gate_bars(layers: Sequence[int], attn: Sequence[float], ffn: Sequence[float] = ()) -> str:
    """SVG of how far the gates of the cross-attention and of its FFN, if any, are open, by LLM
    layer.
    """
    figure, axes = _figure(5.2, 3.0)
    x, width = np.arange(len(layers)), 0.4
    axes.bar(x - width / 2 * bool(ffn), attn, width, color=SERIES[0], label="attention gate")
    if ffn:
        axes.bar(x + width / 2, ffn, width, color=SERIES[1], label="FFN gate")
    axes.axhline(0, color=LINE, linewidth=1)
    axes.set_xticks(
        x[:: max(1, len(layers) // 15)],
        [str(layer) for layer in layers][:: max(1, len(layers) // 15)],
    )
    axes.set(xlabel="language model layer", ylabel="how far it is open")
    _legend(figure)
    return _svg(figure)


def load_maps(layers: Sequence[int], load: dict[str, Sequence[Sequence[float]]]) -> str:
    """SVG of {kind of token: shares [X, E]}: a map of LLM layers by experts each; all maps have one
    scale, from 0 to the largest share.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((8, 0.9 + 0.13 * len(layers)), layout="constrained")
        panels = figure.subplots(1, len(load), sharey=True, squeeze=False)[0]
    top = max(np.max(shares) for shares in load.values())
    for axes, (kind, shares) in zip(panels, load.items(), strict=True):
        shares = np.asarray(shares, np.float64)
        axes.pcolormesh(
            shares, cmap=matplotlib.colors.ListedColormap([SERIES[0]]), alpha=shares / top
        )
        axes.set_yticks(np.arange(0, len(layers), 5) + 0.5, [str(layer) for layer in layers[::5]])
        axes.set_xticks(
            np.arange(0, shares.shape[1], 4) + 0.5,
            [str(expert) for expert in range(0, shares.shape[1], 4)],
        )
        axes.set_title(kind, color=INK, fontsize=11)
        axes.set_xlabel("expert")
        _theme(axes)
    panels[0].set_ylabel("language model layer")
    panels[0].invert_yaxis()  # of all panels: they share it
    return _svg(figure)


def intervals(
    rows: dict[str, dict[str, tuple[float, float, float, Sequence[float]]]], label: str
) -> str:
    """SVG of {name: {series: (mean, low, high, values)}}: from the top, a line a name and series,
    with its values as points; 0 is marked.

    Narrow, so that it is legible on a phone and fits beside others.
    """
    series = dict(zip(dict.fromkeys(kind for row in rows.values() for kind in row), cycle(SERIES)))
    figure, axes = _figure(4.2, 1.3 + 0.34 * len(rows), grid="x")
    for y, row in enumerate(rows.values()):
        for (kind, colour), offset in zip(series.items(), np.linspace(-0.18, 0.18, len(series))):
            if kind in row:
                (mean, low, high, values), at = row[kind], y + offset
                axes.plot([low, high], [at, at], color=colour, linewidth=2)
                axes.plot(
                    values,
                    [at] * len(values),
                    "o",
                    color=colour,
                    alpha=0.5,
                    markersize=4,
                    markeredgewidth=0,
                )
                axes.plot([mean], [at], "D", color=colour, markersize=6, markeredgewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=label)
    marks = [
        matplotlib.lines.Line2D([], [], color=colour, marker="D", label=kind)
        for kind, colour in series.items()
    ]
    _legend(figure, marks)
    return _svg(figure)


def named_points(points: dict[str, tuple[float, float]], x: str, y: str) -> str:
    """SVG of {name: (x, y)}, each with its name beside it; overlapping names are placed one above
    the other, a thin line leads to each.
    """
    figure, axes = _figure(5.2, 3.8)
    axes.plot(*zip(*points.values()), "o", color=SERIES[0], markersize=6, markeredgewidth=0)
    axes.set(xlabel=x, ylabel=y)
    figure.draw_without_rendering()  # places in the picture are known from here on
    taken = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        right, up = own = axes.transData.transform(point) * 72 / figure.dpi
        up = max([up] + [top + 10 for left, top in taken if abs(left - right) < 50])
        taken.append((right, up))
        line = {
            "arrowstyle": "-",
            "color": INK,
            "linewidth": 0.5,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            name,
            point,
            (16, up - own[1] - 3),
            textcoords="offset points",
            color=INK,
            fontsize=9,
            arrowprops=line,
        )
    return _svg(figure)


def _figure(width: float, height: float, grid: str = "y"):
    """A figure and its axes in the theme's colours."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    _theme(axes)
    return figure, axes


def _legend(figure: Figure, handles: Sequence = ()) -> None:
    """Above the axes, where it covers nothing, in as many columns as have room; of a name that is
    too long its end.
    """
    handles = handles or figure.axes[0].get_legend_handles_labels()[0]
    names = [
        name if len(name) <= 50 else "\u2026" + name[-49:]
        for name in (handle.get_label() for handle in handles)
    ]
    columns = int(72 * figure.get_figwidth() / (46 + 5.4 * max(map(len, names), default=0)))
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=max(1, columns),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def _theme(axes) -> None:
    """Ticks, labels and frame in the theme's colours."""
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _svg(figure: Figure) -> str:
    """Inline SVG with theme variables for colours, text as text, and no date or size of its own."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    return re.sub("|".join(SENTINELS), lambda m: SENTINELS[m[0]], text)
