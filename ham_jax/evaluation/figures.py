"""The report's figures as SVG for an HTML page. The only room that knows matplotlib.

A figure names its colours as the page's style sheet does, so that it changes with light and dark,
and its letters are the page's. Equal numbers give equal text to the last byte.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from sklearn import metrics as sklearn_metrics

from ham_jax.classes import MAX_CLASSES, Classes
from ham_jax.evaluation.predictions import Predictions

MAX_LEGEND = 12
"""A curve of more classes has no legend: it would hide the lines."""

# Of the first classes, on a light and on a dark page; those of further classes are computed.
_CLASS_COLORS = (
    *(("#c2500a", "#ff9c5b"), ("#9a7500", "#e5c04a"), ("#00795a", "#4fd0a5")),
    *(("#7447a6", "#c3a0ee"), ("#c01862", "#ff7db0"), ("#1769b5", "#74b5f7")),
    ("#7a5a46", "#cfae9a"),
)
# Hues of further classes, degrees: multiples of the golden angle keep apart from each other, and
# the first is far from the hues above.
_FIRST_HUE, _GOLDEN_ANGLE = 90, 137.5

# Colours that matplotlib draws with, each of which becomes one of the page's.
_PAGE_COLORS = {"currentColor": "#010101"} | {
    f"var(--{name})": f"#0202{number:02x}"
    for number, name in enumerate(
        ("muted", "line", "accent", "warn", *(f"dx{k}" for k in range(MAX_CLASSES)))
    )
}
_INK, _MUTED, _LINE, _ACCENT, _WARN, *_OF_CLASS = _PAGE_COLORS.values()
_SIZE = (4.6, 4.2)  # inches; small enough that letters stay legible on a phone
_WIDE = (4.6, 3.3)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters, not outlines
    "font.size": 10.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.title_fontsize": 9.5,
    "lines.linewidth": 1.7,
    "xtick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.color": _LINE,
    "ytick.labelcolor": _INK,
}


def class_colors(num_classes: int) -> list[dict[str, str]]:
    """Returns of each class its colour: the `name` in the style sheet, `light` and `dark`."""
    further = [
        (f"hsl({hue:.0f} 62% 34%)", f"hsl({hue:.0f} 75% 74%)")
        for hue in (
            (_FIRST_HUE + _GOLDEN_ANGLE * k) % 360 for k in range(num_classes - len(_CLASS_COLORS))
        )
    ]
    return [
        {"name": f"dx{k}", "light": light, "dark": dark}
        for k, (light, dark) in enumerate([*_CLASS_COLORS, *further][:num_classes])
    ]


def roc(predictions: Predictions, per_class: Mapping[str, Any]) -> str:
    """Draws sensitivity against specificity, a line a class that some images are and some not.

    Args:
      predictions: n images.
      per_class: of `metrics.compute`.
    """
    classes = predictions.classes

    def draw(axes: Axes) -> None:
        _diagonal(axes)
        for k, dx in enumerate(classes):
            auc = per_class[dx]["auc"]
            if auc is not None:
                x, y, _ = sklearn_metrics.roc_curve(
                    predictions.labels == k, predictions.probabilities[:, k]
                )
                axes.plot(x, y, label=f"{dx}  {auc:.3f}", **_line_of(classes, k))
        _unit_square(axes, "1 - specificity", "sensitivity")
        if len(classes) <= MAX_LEGEND:
            axes.legend(title="AUC", loc="lower right")

    return _svg("roc", "ROC curve of each diagnosis against the rest", _SIZE, draw)


def precision_recall(predictions: Predictions, per_class: Mapping[str, Any]) -> str:
    """Draws precision against sensitivity, a line a class that has images; see `roc`."""
    classes = predictions.classes

    def draw(axes: Axes) -> None:
        for k, dx in enumerate(classes):
            truth = predictions.labels == k
            if truth.any():
                y, x, _ = sklearn_metrics.precision_recall_curve(
                    truth, predictions.probabilities[:, k]
                )
                area = per_class[dx]["average_precision"]
                label = f"{dx}  {area:.3f}"
                axes.step(x, y, where="post", label=label, **_line_of(classes, k))
        _unit_square(axes, "sensitivity (recall)", "precision")
        if len(classes) <= MAX_LEGEND:
            axes.legend(title="average precision", loc="lower left")

    return _svg("pr", "Precision against recall of each diagnosis", _SIZE, draw)


def reliability(tables: Mapping[str, Mapping[str, list]], method: str) -> str:
    """Draws accuracy against confidence, before and after.

    Args:
      tables: {'none', method: of `calibration.reliability`}.
      method: the one in use.
    """

    def draw(axes: Axes) -> None:
        _diagonal(axes)
        for name in dict.fromkeys(("none", method)):
            in_use = name == method
            color = _ACCENT if in_use else _MUTED
            counts = np.array(tables[name]["num_images"])
            filled = counts > 0
            confidence, accuracy = (
                np.array(tables[name][key], float)[filled] for key in ("confidence", "accuracy")
            )
            axes.plot(
                *(confidence, accuracy),
                *("-" if in_use else "--",),
                color=color,
                label="uncalibrated" if name == "none" else f"after {name}",
            )
            axes.scatter(confidence, accuracy, 200 * counts[filled] / counts.sum() + 6, color=color)
        _unit_square(axes, "confidence", "share that is right")
        axes.legend(loc="upper left")

    return _svg("reliability", "Accuracy against confidence; ideal is the diagonal", _SIZE, draw)


def malignancy(curve: Mapping[str, list[float]], flag: Mapping[str, Any]) -> str:
    """Draws the ROC curve of malignant-or-not and where the flag is on it.

    Args:
      curve: of `selective.roc`.
      flag: of `selective.flag`.
    """

    def draw(axes: Axes) -> None:
        _diagonal(axes)
        axes.plot(
            1 - np.array(curve["specificity"]),
            curve["sensitivity"],
            color=_ACCENT,
            label=f"AUC {flag['auc']:.3f}",
        )
        x, y = 1 - flag["specificity"], flag["sensitivity"]
        axes.plot(x, y, "o", color=_WARN, markersize=8, label="the flag", zorder=5)
        low, high = flag["sensitivity_interval"]
        axes.plot([x, x], [low, high], color=_WARN)
        low, high = flag["specificity_interval"]
        axes.plot([1 - high, 1 - low], [y, y], color=_WARN)
        _unit_square(axes, "1 - specificity", "sensitivity")
        axes.legend(loc="lower right")

    return _svg("malignancy", "ROC curve of malignant or not, with the flag", _SIZE, draw)


def risk_coverage(curve: Mapping[str, list[float]]) -> str:
    """Draws the share of wrong answers among those given; of `selective.risk_coverage`."""

    def draw(axes: Axes) -> None:
        coverage = np.array(curve["coverage"])
        shown = coverage >= 0.05  # fewer images are noise
        axes.plot(coverage[shown], np.array(curve["risk"])[shown], color=_ACCENT)
        axes.set(xlim=(0, 1), ylim=(0, None))
        axes.set(xlabel="share of images answered", ylabel="share of answers wrong")
        axes.locator_params(axis="y", nbins=5)

    return _svg("risk", "Wrong answers against the share of images answered", _WIDE, draw)


def ood_scores(scores: np.ndarray) -> str:
    """Draws the histogram of out-of-distribution scores [n]; above 1 an image is marked."""

    def draw(axes: Axes) -> None:
        high = max(1.2, float(np.quantile(scores, 0.999)))
        edges = np.linspace(min(float(scores.min()), 1), high, 41).tolist()
        axes.hist(np.minimum(scores, high), edges, color=_ACCENT, alpha=0.75)
        axes.axvline(1, color=_WARN)
        axes.annotate(
            *("threshold", (1, 1), (4, -2)),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            va="top",
        )
        axes.set(xlabel="score", ylabel="images")

    return _svg("ood", "How unlike training the photographs are", _WIDE, draw)


def _line_of(classes: Classes, k: int) -> dict[str, Any]:
    """Returns a class's line: benign ones are dashed, where some are malignant."""
    solid = not classes.malignant or k in classes.malignant_labels
    return {"color": _OF_CLASS[k], "linestyle": "-" if solid else (0, (4, 1.3))}


def _diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.9, linestyle=":")


def _unit_square(axes: Axes, x: str, y: str) -> None:
    ticks: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y, xticks=ticks, yticks=ticks)


def _svg(name: str, description: str, size: tuple[float, float], draw) -> str:
    """Returns an `<svg>` to be put into a page.

    Args:
      name: of the figure, unlike all others of the page: it is in the ids.
      description: what it shows, for those who cannot see it.
      size: width, height in inches.
      draw: takes the axes.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, dpi=96)
    svg = text.getvalue()
    # Its style element would hold for the whole page.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in each figure, and nothing points there
    label = html.escape(description)
    svg = re.sub(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>',
        lambda tag: f'<svg role="img" aria-label="{label}" {tag[1]}>',
        svg,
        count=1,
    )
    for page, drawn in _PAGE_COLORS.items():
        svg = svg.replace(drawn, page)
    return svg.strip()
