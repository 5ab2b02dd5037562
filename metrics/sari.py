"""SARI, the score of a simplification: which n-grams of the original an output keeps, adds and deletes, against references.

Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification" (TACL 4). With I the original, O the output,
R the references together and R' their counts divided by how many they are, for n-grams g of each order n = 1 to 4:

    add     p = sum min(O - I, R) / sum O - I        r = sum min(O - I, R) / sum R - I        of sets
    keep    p = sum min(I & O, I & R') / sum I & O   r = sum min(I & O, I & R') / sum I & R'  & is the smaller count
    delete  p = sum min(I - O, I - R') / sum I - O                                            - not below 0

    SARI = (F_add + F_keep + P_delete) / 3,   F = 2pr / (p + r)

Four readings of it are in use, and their values differ by points; a value without the name of its reading says little.

    paper      per sentence; the formulas above as they stand, p and r averaged over the orders before F, 0/0 = 0.
    evaluate   per sentence; what Hugging Face's `evaluate` gives (mean over sentences), and so seed 002. F of each order, then their mean.
               Of keep and delete, p is the mean of the fractions of single n-grams, and a deletion counts as good only by what
               (I - O) - R leaves. Where nothing is to be divided, 0/0 = 1.
    xu         per sentence; the authors' SARI.py. As evaluate, but r of keep is a mean of fractions too, over the n-grams that
               were to be kept, and 0/0 = 0.
    paper      per sentence; the formulas above as they stand, p and r averaged over the orders before F, 0/0 = 0.
    easse      per corpus; what papers on ASSET and TurkCorpus report since 2019 (arXiv 1908.04567): the sums run over all sentences,
               F of each order, then their mean, 0/0 = 0; of delete F too, unless told otherwise.
    (tensor2tensor's has sums as in the paper, F of each order, sets of n-grams, 0/0 = 1; on word pieces. It is not here.)

All values lie in [0, 1]; published ones are times 100. Texts are put in lower case and split by the rules of 13a, as `evaluate` and
EASSE do; SARI.py takes its text as already split, which is the same for such text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metrics.text import tokenize_13a

ORDERS = 4
VARIANTS = ("paper", "evaluate", "xu")
SIGNATURE = "case:lc|tok:13a|orders:1-4|variant:"  # and the reading


@dataclass(frozen=True)
class Sari:
    """keep, add, delete in [0, 1]; value: their mean, SARI."""

    keep: float
    add: float
    delete: float

    @property
    def value(self) -> float:
        return (self.keep + self.add + self.delete) / 3


class _Order(NamedTuple):
    """The n-grams of one order. Counts are times the number of references, so that they stay whole."""

    added: set
    to_add: set
    kept: Counter
    to_keep: Counter
    deleted: Counter
    to_delete: Counter
    references: Counter


def sari(original: str, output: str, references: Sequence[str], variant: str = "paper") -> float:
    """SARI of one sentence in [0, 1]; variant: paper, evaluate or xu. Raises ValueError without a reference."""
    return sari_parts(original, output, references, variant).value


def sari_parts(original: str, output: str, references: Sequence[str], variant: str = "paper") -> Sari:
    """As sari, its three parts."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of SARI: one of {', '.join(VARIANTS)}")
    orders = _orders(original, output, references)
    if variant == "paper":
        return _of_averages([_sums(one) for one in orders])
    empty = 1.0 if variant == "evaluate" else 0.0
    keep = add = delete = 0.0
    for one in orders:
        if variant == "evaluate":
            recall = _ratio((one.kept & one.to_keep).total(), one.to_keep.total(), empty)
        else:
            recall = _mean_share(one.kept & one.to_keep, one.to_keep, empty)
        keep += _f1(_mean_share(one.kept & one.references, one.kept, empty), recall)
        delete += _mean_share(one.deleted - one.references, one.deleted, empty)
        good = len(one.added & one.to_add)
        add += _f1(_ratio(good, len(one.added), empty), _ratio(good, len(one.to_add), empty))
    return Sari(keep / ORDERS, add / ORDERS, delete / ORDERS)


def corpus_sari(items: Iterable[dict], delete: str = "f1") -> float:
    """SARI of a corpus as EASSE has it, in [0, 1]. items: {original, output, references}, or {…, reference} where there is one.

    delete: "f1", EASSE's default, or "precision", as the paper has it.
    """
    return corpus_sari_parts(items, delete).value


def corpus_sari_parts(items: Iterable[dict], delete: str = "f1") -> Sari:
    """As corpus_sari, its three parts. Raises ValueError for no items, and for one without a reference."""
    counts = sari_counts(items)
    if not len(counts):
        raise ValueError("SARI of a corpus needs at least one item")
    keep, add, removed = sari_of_counts(counts.sum(axis=0), delete)
    return Sari(float(keep), float(add), float(removed))


def sari_counts(items: Iterable[dict]) -> np.ndarray:
    """(items, 36) whole numbers that, summed over items, give the corpus score: orders x (added, kept, deleted) x (good, made, wanted)."""
    found = []
    for item in items:
        orders = _orders(item["original"], item["output"], item.get("references") or (item["reference"],))
        found.append([number for one in orders for number in _sums(one)])
    return np.array(found, dtype=np.float64).reshape(-1, 9 * ORDERS)


def sari_of_counts(sums: np.ndarray, delete: str = "f1") -> np.ndarray:
    """(3, ...): keep, add, delete of sums (..., 36) over items of sari_counts, as EASSE has them."""
    if delete not in ("f1", "precision"):
        raise ValueError(f"delete is f1 or precision, not {delete!r}")
    good, made, wanted = np.moveaxis(np.asarray(sums, dtype=np.float64).reshape(*np.shape(sums)[:-1], ORDERS, 3, 3), -1, 0)
    f1 = (2 * good / np.maximum(made + wanted, 1)).mean(axis=-2)  # 2pr / (p + r) of good / made and good / wanted
    precision = (good / np.maximum(made, 1)).mean(axis=-2)
    return np.stack([f1[..., 1], f1[..., 0], f1[..., 2] if delete == "f1" else precision[..., 2]])


def _orders(original: str, output: str, references: Sequence[str]) -> list[_Order]:
    if not references or isinstance(references, str):
        raise ValueError("SARI needs a list of one reference or more")
    count = len(references)
    source, made = _ngrams(original), _ngrams(output)
    wanted = [Counter() for _ in range(ORDERS)]
    for text in references:
        for together, own in zip(wanted, _ngrams(text), strict=True):
            together.update(own)
    found = []
    for i, o, r in zip(source, made, wanted, strict=True):
        i_times = Counter({g: times * count for g, times in i.items()})
        o_times = Counter({g: times * count for g, times in o.items()})
        found.append(_Order(o.keys() - i.keys(), r.keys() - i.keys(), i_times & o_times, i_times & r, i_times - o_times, i_times - r, r))
    return found


def _ngrams(text: str) -> list[Counter]:
    """Of orders 1 to 4. A text without a word is one empty word, as `evaluate` and SARI.py have it."""
    words = tokenize_13a(text.lower()).split(" ")
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def _sums(one: _Order) -> tuple[int, ...]:
    """Good, of the output, of the references: of what is added, kept, deleted."""
    return (
        len(one.added & one.to_add), len(one.added), len(one.to_add),
        (one.kept & one.to_keep).total(), one.kept.total(), one.to_keep.total(),
        (one.deleted & one.to_delete).total(), one.deleted.total(), one.to_delete.total(),
    )  # fmt: skip


def _rates(sums: Sequence[int]) -> list[tuple[float, float]]:
    """(precision, recall) of what is added, kept, deleted."""
    return [(_ratio(sums[k], sums[k + 1], 0.0), _ratio(sums[k], sums[k + 2], 0.0)) for k in (0, 3, 6)]


def _of_averages(orders: list[tuple[int, ...]]) -> Sari:
    rates = [_rates(sums) for sums in orders]
    (add_p, add_r), (keep_p, keep_r), (delete_p, _) = (
        [sum(rate[k][side] for rate in rates) / ORDERS for side in (0, 1)] for k in (0, 1, 2)
    )
    return Sari(_f1(keep_p, keep_r), _f1(add_p, add_r), delete_p)


def _mean_share(part: Counter, whole: Counter, empty: float) -> float:
    """The mean over the n-grams of whole of part / whole."""
    return sum(part[g] / times for g, times in whole.items()) / len(whole) if whole else empty


def _ratio(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else empty


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
