"""Shows what a mask keeps and drops: in the terminal in colour, as Markdown for TensorBoard, and as an HTML page.

Each token carries its perplexity under the reference model. On the page perplexity is a heat behind the token, and dropped
tokens are struck through.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import numpy as np

from data.batching import Examples
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class MaskedToken:
    text: str
    perplexity: float  # NaN where nothing was scored
    weight: float  # 0 is dropped


def masked_example(
    examples: Examples, index: int, nll: np.ndarray | None, weights: np.ndarray, tokenizer: Tokenizer
) -> tuple[str, list[MaskedToken]]:
    """(prompt text, completion tokens) of one example. nll and weights are flat over all completions."""
    start, stop = examples.completion_offsets[index : index + 2]
    prompt = tokenizer.decode(examples.ids(index)[: examples.starts[index]].tolist(), skip_special=False)
    losses = np.full(stop - start, np.nan) if nll is None else nll[start:stop]
    tokens = [
        MaskedToken(tokenizer.token_text(int(token)), math.exp(min(loss, 700.0)), float(weight))
        for token, loss, weight in zip(examples.completion(index), losses, weights[start:stop], strict=True)
    ]
    return prompt, tokens


def dropped_line(tokens: list[MaskedToken]) -> str:
    dropped = sum(token.weight == 0 for token in tokens)
    return f"{dropped} of {len(tokens)} answer tokens dropped ({dropped / len(tokens):.0%})"


def in_terminal(prompt: str, tokens: list[MaskedToken], colour: bool) -> str:
    """The example as text: dropped tokens red and struck (in brackets without colour), kept ones green, then the perplexities."""

    def show(token: MaskedToken) -> str:
        text = token.text.replace("\n", "⏎\n") or "·"
        if not colour:
            return f"[-{text}-]" if token.weight == 0 else text
        return f"\033[9;31m{text}\033[0m" if token.weight == 0 else f"\033[32m{text}\033[0m"

    table = "  ".join(f"{token.text!r}{'✗' if token.weight == 0 else ''} {token.perplexity:.4g}" for token in tokens)
    return f"{prompt}{''.join(map(show, tokens))}\n{dropped_line(tokens)}\nperplexity: {table}"


def masked_markdown(prompt: str, tokens: list[MaskedToken]) -> str:
    """For TensorBoard, which shows no struck-through text: a block of plain text, dropped tokens in [- -]."""
    return "```\n" + in_terminal(prompt, tokens, colour=False).replace("```", "` ` `") + "\n```"


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.7 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
h1 {{ font-size: 1.3em }} h2 {{ font-size: 1em; margin: 2em 0 .3em }} .prompt {{ color: #666; white-space: pre-wrap }}
.answer {{ white-space: pre-wrap; font-family: ui-monospace, monospace }} .answer span {{ border-radius: 3px; padding: 1px 0 }}
.dropped {{ text-decoration: line-through 2px #b00020; outline: 1px solid #b00020 }}
.legend span {{ padding: 1px 8px; margin-right: 4px; border-radius: 3px }} small {{ color: #666 }}
</style>
<h1>{title}</h1>
<p>{subtitle}</p>
<p class="legend">perplexity: {legend} <span class="dropped">dropped</span> <small>hover over a token for its value</small></p>
"""


def heat(perplexity: float) -> str:
    """A background colour: white at perplexity 1 to deep orange at 1000 and above, on a log scale; grey where unknown."""
    if math.isnan(perplexity):
        return "#eee"
    share = min(1.0, max(0.0, math.log10(max(perplexity, 1.0)) / 3))
    red, green, blue = (round(a + (b - a) * share) for a, b in ((255, 240), (255, 110), (255, 20)))
    return f"#{red:02x}{green:02x}{blue:02x}"


def as_page(title: str, subtitle: str, shown: list[tuple[str, list[MaskedToken]]]) -> str:
    """A self-contained HTML page of examples."""
    legend = " ".join(f'<span style="background:{heat(p)}">{p:g}</span>' for p in (1, 3, 10, 30, 100, 1000))
    parts = [PAGE.format(title=html.escape(title), subtitle=html.escape(subtitle), legend=legend)]
    for number, (prompt, tokens) in enumerate(shown, 1):
        spans = "".join(
            f'<span{" class=dropped" if t.weight == 0 else ""} style="background:{heat(t.perplexity)}" '
            f'title="perplexity {t.perplexity:.4g}, weight {t.weight:.3g}">{html.escape(t.text).replace(chr(10), "⏎" + chr(10))}</span>'
            for t in tokens
        )
        parts.append(
            f"<h2>Example {number} <small>{dropped_line(tokens)}</small></h2>\n"
            f'<div class="prompt">{html.escape(prompt)}</div>\n<div class="answer">{spans}</div>\n'
        )
    return "".join(parts)
