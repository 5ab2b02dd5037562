"""Which tokens of an answer to train on, and how much: one function a policy.

Every policy looks at the per-token losses of one completion (nll, in nats, under a reference model; the closing end-of-turn
token left out) and returns which tokens to drop (bool), or how much each weighs (float). The caller keeps the end token, or
generation would not stop.

A policy is found by its name, which is also that of its arm: `--mask highest` calls `highest`. A new one is a public function
here whose first parameter is nll; the others are settings of `token_weights`, by name, or count (see there).
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from torch import Tensor


def token_weights(
    nll: Tensor,
    policy: str,
    *,
    threshold: float = 30.0,
    group_size: int = 4,
    overlap_ratio: float = 0.2,
    ratio: float = 0.1,
    direction: str = "low_ppl",
    match: str = "highest",
    tau: float = 0.75,
    adapter_nll: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights (n,) float32 of one example's completion tokens; 0 means dropped. nll (n,) float32, natural logarithm.

    threshold and tau are perplexities. adapter_nll: the same tokens' losses under a model fine-tuned on this task, for dpf
    and stm_dpf. generator: for random. match: the policy whose number of dropped tokens lowest and random take. Raises
    ValueError for an unknown policy or a setting out of range.
    """
    settings = {name: value for name, value in locals().items() if name not in ("nll", "policy")}
    known = policies()
    if policy not in known:
        raise ValueError(f"mask policy {policy!r} is unknown; known: {', '.join(known)}")
    if "adapter_nll" in known[policy] and adapter_nll is None:
        raise ValueError(f"{policy} compares two models: adapter_nll is needed")
    if "count" in known[policy]:
        if "count" in known.get(match, ("count",)):
            raise ValueError(f"match {match!r} is no policy whose count could be matched")
        settings["count"] = int((token_weights(nll, match, **settings) == 0).sum())
    nll = nll.float()
    result = globals()[policy](nll, **{name: settings[name] for name in known[policy]})
    return (~result).float() if result.dtype == torch.bool else result


@functools.cache  # it is asked once per example
def policies() -> dict[str, tuple[str, ...]]:
    """Every policy of this file with the settings that it takes, in the file's order."""
    found = {}
    for name, function in globals().items():
        if inspect.isfunction(function) and function.__module__ == __name__ and name != "token_weights":
            first, *rest = [*inspect.signature(function).parameters, ""]
            if first == "nll" and not name.startswith("_"):
                found[name] = tuple(filter(None, rest))
    return found


def none(nll: Tensor) -> Tensor:
    """Plain fine-tuning: drop nothing."""
    return torch.zeros_like(nll, dtype=torch.bool)


def bottom10(nll: Tensor, group_size: int, overlap_ratio: float, ratio: float, direction: str) -> Tensor:
    """Drop the `ratio` of windows with the lowest mean nll (low_ppl), or the highest (low_confidence, arXiv 2508.15260).

    At least one window goes, ties to the earlier; a completion of one window loses nothing.
    """
    if direction not in ("low_ppl", "low_confidence"):
        raise ValueError(f"direction {direction!r} is unknown; known: low_ppl, low_confidence")
    dropped = torch.zeros_like(nll, dtype=torch.bool)
    starts = windows(len(nll), group_size, overlap_ratio)
    if len(starts) == 1:
        return dropped
    # Means in float64, each window for itself: equal windows tie exactly, wherever they stand.
    means = nll.double().unfold(0, group_size, 1)[torch.tensor(starts, device=nll.device)].mean(-1)
    order = means.argsort(stable=True, descending=direction == "low_confidence")
    for window in order[: max(1, math.floor(ratio * len(starts) + 1e-9))].tolist():
        dropped[starts[window] : starts[window] + group_size] = True
    return dropped


def highest(nll: Tensor, threshold: float) -> Tensor:
    """Selective Token Masking (arXiv 2501.14315): drop perplexity > threshold, strictly. The paper uses 2.5."""
    if threshold <= 0:
        raise ValueError(f"threshold is a perplexity and must be positive, got {threshold}")
    return nll > math.log(threshold)


def lowest(nll: Tensor, count: int) -> Tensor:
    """The count-matched opposite: of lowest perplexity, as many tokens as the policy `match` drops; ties by position."""
    dropped = torch.zeros_like(nll, dtype=torch.bool)
    dropped[nll.argsort(stable=True)[:count]] = True
    return dropped


def random(nll: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The count-matched control: as many tokens as the policy `match` drops, drawn without replacement."""
    dropped = torch.zeros_like(nll, dtype=torch.bool)
    dropped[torch.randperm(len(nll), generator=generator)[:count].to(nll.device)] = True
    return dropped


def dpf(nll: Tensor, adapter_nll: Tensor, threshold: float) -> Tensor:
    """Perplexity-difference filter (code of arXiv 2501.14315): drop where ppl under the adapter - ppl > threshold (0 in the paper)."""
    return adapter_nll.double().exp() - nll.double().exp() > threshold


def stm_dpf(nll: Tensor, adapter_nll: Tensor, threshold: float) -> Tensor:
    """Both: drop where perplexity > threshold, or the adapter finds the token harder than the base does."""
    return highest(nll, threshold) | (adapter_nll > nll)


def soft(nll: Tensor, tau: float) -> Tensor:
    """Weights exp(-((ppl - 1) / tau)^2) (code of arXiv 2501.14315); the loss divides by all completion tokens."""
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return torch.exp(-(((nll.double().exp() - 1) / tau) ** 2)).float()


def windows(n: int, size: int, overlap: float) -> list[int]:
    """Starts of the overlapping windows over n tokens: every max(1, floor(size * (1 - overlap))), the last one ending at n.

    One window [0, n) where n <= size. The epsilon mends 10 * (1 - 0.9) = 0.99999… in binary floating point.
    """
    if size < 1 or not 0 <= overlap < 1:
        raise ValueError(f"group_size must be at least 1 and overlap_ratio in [0, 1), got {size} and {overlap}")
    if n <= size:
        return [0]
    stride = max(1, math.floor(size * (1 - overlap) + 1e-9))
    starts = list(range(0, n - size + 1, stride))
    if starts[-1] + size < n:
        starts.append(n - size)
    return starts
