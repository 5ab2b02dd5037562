"""Scores of generated text against one reference or several: ROUGE, SARI, BLEU, BERTScore.

score_text gives what one output is worth; BLEU is a score of all outputs together. Values lie in [0, 1], published ones are times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from metrics.sari import sari
from metrics.statistics import resampled_sums
from metrics.text import rouge


def score_text(output: str, reference: str, references: Sequence[str] = (), original: str = "") -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}, and "sari" where there is the original text that the output rewrites, all in [0, 1].

    references: every acceptable answer; without them the reference alone. ROUGE is the best F-measure over them, metric by metric,
    as rouge-score's score_multi has it. sari: of this sentence, by the formulas of the paper (metrics.sari).
    """
    references = tuple(references) or (reference,)
    each = [rouge(output, one) for one in references]
    scores = {name: max(one[name] for one in each) for name in each[0]}
    return {**scores, "sari": sari(original, output, references)} if original else scores


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU. value in [0, 1]; signature: sacrebleu's. counts (items, 10): lengths of output and of the nearest reference,
    then right and all n-grams of orders 1 to 4; their sums give the value."""

    value: float
    signature: str
    counts: np.ndarray = field(repr=False)

    def interval(self, seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
        """95 % by resampling items (Koehn, EMNLP 2004)."""
        low, high = np.quantile(bleu_of_counts(resampled_sums(self.counts, seed, rounds)), (0.025, 0.975))
        return float(low), float(high)


def corpus_bleu(outputs: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> Bleu:
    """BLEU (Papineni et al. 2002) of all outputs by sacrebleu with its defaults: 13a, case kept, exponential smoothing.

    lowercase: case is no difference, as in tables of simplification (signature case:lc).
    references: of each output one or more, of any number. Raises ImportError with the pip command without sacrebleu, ValueError for no
    output, for lists of other lengths, and for an output without a reference.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ImportError("BLEU needs sacrebleu: pip install sacrebleu") from None
    if not outputs or len(outputs) != len(references) or any(isinstance(own, str) or not own for own in references):
        raise ValueError("BLEU needs one output or more, and for each a list of one reference or more")
    single = BLEU(lowercase=lowercase, effective_order=True)  # which does not enter the counts; without it every sentence warns
    counts = []
    for output, own in zip(outputs, references, strict=True):
        one = single.sentence_score(output, list(own))
        counts.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    sums = np.sum(counts, axis=0).tolist()
    whole = BLEU.compute_bleu(sums[2:6], sums[6:10], sums[0], sums[1], smooth_method="exp")
    return Bleu(whole.score / 100, _signature(references, BLEU(lowercase=lowercase)), np.array(counts, dtype=np.float64))


def _signature(references: Sequence[Sequence[str]], metric) -> str:
    """What sacrebleu says of such a corpus. It knows how many references there are once it has seen some: those with fewest and most."""
    few, many = min(references, key=len), max(references, key=len)
    metric.corpus_score(["", ""], [[few[k] if k < len(few) else None, text] for k, text in enumerate(many)])
    return str(metric.get_signature())


def bleu_of_counts(sums: np.ndarray) -> np.ndarray:
    """(...,): BLEU in [0, 1] of sums (..., 10) of Bleu.counts, with sacrebleu's exponential smoothing of orders that have no match."""
    made, wanted, right, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    none = right == 0
    shares = np.where(none, 0.5 ** none.cumsum(axis=-1), right) / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0.0, 1 - wanted / np.maximum(made, 1)))
    empty = none.all(axis=-1) | (total == 0).any(axis=-1)
    return np.where(empty, 0.0, brevity * np.exp(np.log(shares).mean(axis=-1)))


def bert_score(
    outputs: Sequence[str], references: Sequence[Sequence[str]], model: str = "distilbert-base-uncased", layer: int | None = None
) -> dict[str, list[float] | str]:
    """{"precision", "recall", "f1": one number an item, "signature"} of BERTScore (arXiv 1904.09675), best reference by f1.

    model: a name on the hub or a folder; values under other models cannot be compared, and the signature names it. layer: whose
    states are compared; the package knows it for the models on its list, and needs it for a folder. Raises ImportError with the pip
    command without bert-score, OSError where the model cannot be had.
    """
    try:
        from bert_score import score
    except ImportError:
        raise ImportError("BERTScore needs bert-score: pip install bert-score") from None
    found, signature = score(list(outputs), [list(own) for own in references], model_type=model, num_layers=layer, return_hash=True)
    return {**dict(zip(("precision", "recall", "f1"), (part.tolist() for part in found), strict=True)), "signature": signature}
