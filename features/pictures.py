"""Pictures of what features tell of outcomes: a feature against the outcome, all rank correlations, a predictor's errors and reasons."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from features.outcomes import Joined, family
from features.ranks import Relation
from study.plots import COLOURS, MARKS, _caption, _clean

GREY, SHOWN = "#888888", 20  # features in the importance picture


def axis_word(joined: Joined) -> str:
    return joined.target + (f" ({joined.unit})" if joined.unit else "")


def relation_figure(one: Relation, joined: Joined) -> Figure:
    """x: the feature, y: the outcome with its own 95 % interval; colour and mark: the family, where there are few."""
    x, y = joined.table.numbers[one.feature], joined.truth * joined.scale
    low, high = joined.low * joined.scale, joined.high * joined.scale
    figure = Figure(figsize=(7.2, 4.8))
    axes = figure.add_subplot()
    kept = ~np.isnan(x)
    families = [family(name) for name in joined.names]
    named = sorted({name for name, k in zip(families, kept, strict=True) if k})
    few = 1 < len(named) <= 12 and len(named) < kept.sum()
    for k, name in enumerate(named if few else [""]):
        mine = kept & np.array([not few or name == other for other in families])
        colour, sure = COLOURS[k % len(COLOURS)], mine & np.isfinite(low) & np.isfinite(high)
        around = np.maximum(0, [y[sure] - low[sure], high[sure] - y[sure]])
        axes.errorbar(x[sure], y[sure], yerr=around, fmt="none", color=colour, elinewidth=1, capsize=2, alpha=0.6, zorder=2)
        axes.plot(x[mine], y[mine], MARKS[k % len(MARKS)], color=colour, markersize=7, markeredgecolor="white", zorder=3, label=name)
    if x[kept].min() > 0 and x[kept].max() > 50 * x[kept].min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if y.min() < 0:
        axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    axes.set_xlabel(one.feature)
    axes.set_ylabel(axis_word(joined))
    interval = f"95 % {one.low:+.2f} to {one.high:+.2f}"
    title = f"{one.feature} against {joined.target}, n = {one.n}\nSpearman's rho {one.rho:+.2f} ({interval}), p = {one.p:.2g}"
    axes.set_title(title, fontsize=12, loc="left", pad=10)
    if few:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0), title="family", alignment="left")
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    bars = "Bars: the outcome's own 95 % interval. " * bool(np.isfinite(low).any())
    left = f" {one.empty} data sets have no {one.feature}." if one.empty else ""
    _caption(axes, f"{bars}A point is a data set; rho's interval: bootstrap over them.{left}")
    return figure


def relations_figure(found: list[Relation], joined: Joined) -> Figure:
    """rho and its interval for every feature, the strongest on top; full dots have Holm's p below 0.05."""
    figure = Figure(figsize=(7.6, 1.6 + 0.26 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for k, one in enumerate(found):
        sure = one.holm < 0.05
        axes.plot([one.low, one.high], [k, k], color=COLOURS[0], linewidth=1.6, alpha=0.6, zorder=1)
        axes.plot(one.rho, k, "o", color=COLOURS[0], markersize=7, markerfacecolor=COLOURS[0] if sure else "white", zorder=2)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    axes.set_yticks(range(len(found)), [one.feature for one in found], fontsize=9)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel(f"Spearman's rho with {joined.target}, 95 % interval over data sets")
    n = sorted({one.n for one in found})
    count = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    axes.set_title(f"{len(found)} features against {joined.target}, {count}", fontsize=12, loc="left", pad=26)
    dot = {"marker": "o", "linestyle": "", "color": COLOURS[0], "markersize": 7}
    handles = [Line2D([], [], label="Holm's p below 0.05", **dot), Line2D([], [], markerfacecolor="white", label="not", **dot)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9, handletextpad=0.2)
    _clean(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    return figure


def predicted_figure(joined: Joined, truth: np.ndarray, predicted: np.ndarray, half: np.ndarray, coverage: float, score: dict) -> Figure:
    """x: predicted, y: true, of the test rows; grey: the interval about the prediction; red crosses: truths outside it."""
    truth, predicted, half = truth * joined.scale, predicted * joined.scale, half * joined.scale
    figure = Figure(figsize=(5.8, 5.4))
    axes = figure.add_subplot()
    inside, finite = np.abs(truth - predicted) <= half, np.isfinite(half)
    around = np.where(finite, half, 0)
    axes.vlines(predicted, predicted - around, predicted + around, color="#c8cdd3", linewidth=1.2, zorder=1)
    axes.plot(predicted[inside], truth[inside], "o", color=COLOURS[0], markersize=5.5, markeredgecolor="white", zorder=3, label="inside")
    axes.plot(predicted[~inside], truth[~inside], "X", color=COLOURS[1], markersize=6.5, markeredgecolor="white", zorder=4, label="outside")
    axes.axline((truth.mean(), truth.mean()), slope=1, color=GREY, linewidth=1, zorder=2)
    axes.set_xlabel(f"predicted {axis_word(joined)}")
    axes.set_ylabel(f"true {axis_word(joined)}")
    unit = joined.unit and f" {joined.unit}"
    words = f"RMSE {score['rmse'][0] * joined.scale:.2f}{unit}, R² {score['r2'][0]:.2f}, n = {len(truth)} test rows"
    axes.set_title(f"{joined.target} of data sets not learned from\n{words}", fontsize=12, loc="left", pad=10)
    axes.legend(frameon=False, fontsize=9, loc="best", handletextpad=0.2)
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    bars = f"Grey: the {100 * coverage:g} % interval; it held {inside.sum()} of {len(truth)}." if finite.all() else "No finite interval."
    _caption(axes, f"{bars} Line: perfect.")
    return figure


def importance_figure(features: list[str], gain: np.ndarray, shuffled: np.ndarray, joined: Joined) -> Figure:
    """Left: share of the trees' gain (features,); right: growth of the test RMSE when shuffled (folds, features), a dot a fold."""
    share = gain / gain.sum() if gain.sum() > 0 else gain
    shown = np.argsort(-share, kind="stable")[:SHOWN]
    figure = Figure(figsize=(9.2, 1.9 + 0.27 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(shown))
    left.barh(rows, 100 * share[shown], color=COLOURS[0], height=0.7)
    left.set_xlabel("share of the trees' gain (%)")
    mean = shuffled.mean(axis=0)[shown]
    right.barh(rows, mean, color=COLOURS[2], height=0.7)
    if len(shuffled) > 1:
        for fold in shuffled:
            right.plot(fold[shown], rows, "o", color="#333333", markersize=3, zorder=3)
    right.axvline(0, color=GREY, linewidth=1)
    right.set_xlabel("growth of the test RMSE when shuffled" + (f" ({joined.unit})" if joined.unit else ""))
    left.set_yticks(rows, [features[k] for k in shown], fontsize=9)
    left.set_ylim(len(shown) - 0.4, -0.6)
    for axes in (left, right):
        _clean(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    more = f", the first {SHOWN} of {len(features)}" if len(features) > SHOWN else ""
    left.set_title(f"What the predictor of {joined.target} looks at{more}", fontsize=12, loc="left", pad=10)
    return figure
