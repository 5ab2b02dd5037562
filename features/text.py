"""Features of a sample's text alone: lengths, vocabulary, repetition, near duplicates. They need a tokenizer and no model.

The input is what is asked: all turns before the answer, joined by line ends; the output is the answer. A word is a run of letters,
marks and digits (don't is one), compared in lower case and NFC; there is no stemming and no list of stop words, which would be
right for one language. A Chinese character or Japanese kana is a word by itself, since these scripts have no spaces; a run of
another script without spaces (Thai, Khmer) counts as one word.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from statistics import fmean, pstdev

from features.dataset import Sample
from model.tokenizer import Tokenizer

TEXT_COLUMNS = (
    "avg_input_length", "avg_output_length", "input_length_std", "output_length_std", "io_length_ratio",
    "input_mattr", "output_mattr", "output_ngram_repetition", "near_duplicate_ratio",
    "vocab_complexity", "symbol_ratio", "digit_ratio", "answer_groundedness",
    "static_valid_count", "static_skipped_count", "static_coverage",
)  # fmt: skip

WINDOW = 50  # words of a moving window
SHINGLE = 5  # words
LONG = 8  # characters: a word of more is a long one

_CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


def text_features(sample: Sample, tokenizer: Tokenizer) -> dict[str, float | None]:
    """The features of TEXT_COLUMNS; None where one cannot be computed.

    Lengths are in tokens of the bare text, without template or closing token:
    avg_input_length, avg_output_length: mean. input_length_std, output_length_std: population standard deviation, None of one item.
    io_length_ratio: mean output length / mean input length.
    input_mattr, output_mattr: see mattr, of the sample's words in file order.
    output_ngram_repetition, vocab_complexity, answer_groundedness: see the functions; mean over the items that have it.
    near_duplicate_ratio: see near_duplicate_ratio, of input and output together.
    symbol_ratio, digit_ratio: see character_shares, mean over items.
    static_valid_count: items that these features are computed on; static_skipped_count: the file's bad rows; static_coverage:
    records / (records + bad rows) of the whole file.
    """
    inputs = ["\n".join(text for _, text in record.prompt) for record in sample.records]
    outputs = [record.answer for record in sample.records]
    both = [f"{asked}\n{answer}" for asked, answer in zip(inputs, outputs, strict=True)]
    asked_lengths, answer_lengths = ([len(tokenizer.encode(text)) for text in texts] for texts in (inputs, outputs))
    asked_words, answer_words = [words(text) for text in inputs], [words(text) for text in outputs]
    both_words = [asked + answer for asked, answer in zip(asked_words, answer_words, strict=True)]
    shares = [character_shares(text) for text in both]
    contexts = sample.contexts or [""] * len(outputs)
    grounded = (answer_groundedness(words(context), answer) for context, answer in zip(contexts, answer_words, strict=True))
    return {
        "avg_input_length": _mean(asked_lengths),
        "avg_output_length": _mean(answer_lengths),
        "input_length_std": _std(asked_lengths),
        "output_length_std": _std(answer_lengths),
        "io_length_ratio": fmean(answer_lengths) / fmean(asked_lengths) if any(asked_lengths) else None,
        "input_mattr": mattr([word for item in asked_words for word in item]),
        "output_mattr": mattr([word for item in answer_words for word in item]),
        "output_ngram_repetition": _mean(map(ngram_repetition, answer_words)),
        "near_duplicate_ratio": near_duplicate_ratio([item or text.split() for item, text in zip(both_words, both, strict=True)]),
        "vocab_complexity": _mean(map(vocab_complexity, both_words)),
        "symbol_ratio": _mean(symbols for symbols, _ in shares),
        "digit_ratio": _mean(digits for _, digits in shares),
        "answer_groundedness": _mean(grounded),
        "static_valid_count": len(sample.records),
        "static_skipped_count": sample.skipped,
        "static_coverage": sample.items / (sample.items + sample.skipped) if sample.items else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _std(values: list[int]) -> float | None:
    return pstdev(values) if len(values) > 1 else None


@functools.cache
def _word() -> re.Pattern:
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
    run = rf"[^\W_{_CJK}](?:[^\W_{_CJK}]|[{marks}])*"  # \w leaves out marks, such as the vowel signs of Hindi
    return re.compile(rf"(?=\w)[{_CJK}]|{run}(?:['\u2019]{run})*")


def words(text: str) -> list[str]:
    """The words of a text in lower case; see the head of this file."""
    return _word().findall(unicodedata.normalize("NFC", text).lower())


def mattr(stream: list[str], window: int = WINDOW) -> float | None:
    """Moving-average type/token ratio: different words among `window` consecutive ones, / window, mean over all windows.

    Covington & McFall 2010, doi:10.1080/09296171003643098. The plain ratio falls with a text's length, so that it compares
    lengths; this one does not. None with fewer words than a window.
    """
    if len(stream) < window:
        return None
    counts = Counter(stream[:window])
    total = types = len(counts)
    for old, new in zip(stream, stream[window:], strict=False):
        counts[old] -= 1
        types -= not counts[old]
        types += not counts[new]
        counts[new] += 1
        total += types
    return total / (window * (len(stream) - window + 1))


def ngram_repetition(answer: list[str], n: int = 3) -> float | None:
    """Share of an answer's different trigrams of words that occur more than once; None with fewer than three words."""
    counts = Counter(zip(*(answer[k:] for k in range(n)), strict=False))
    return sum(count > 1 for count in counts.values()) / len(counts) if counts else None


def vocab_complexity(item: list[str]) -> float | None:
    """Share of words longer than 8 characters; None where no word is in a script that writes words apart."""
    spaced = [word for word in item if not re.fullmatch(f"[{_CJK}]", word)]
    return sum(len(word) > LONG for word in spaced) / len(spaced) if spaced else None


def character_shares(text: str) -> tuple[float | None, float | None]:
    """(symbols, digits): shares of the characters other than white space. A symbol is no letter, mark or number in Unicode."""
    chars = [char for char in text if not char.isspace()]
    if not chars:
        return None, None
    symbols = sum(not char.isalnum() and not unicodedata.category(char).startswith("M") for char in chars)
    return symbols / len(chars), sum(map(str.isdecimal, chars)) / len(chars)


def answer_groundedness(context: list[str], answer: list[str]) -> float | None:
    """0.7 * share of the answer's bigrams and trigrams that occur in its context + 0.3 * that share of its words.

    None without a context, or with fewer than two words in the answer.
    """
    if not context or len(answer) < 2:
        return None
    known = {gram for n in (1, 2, 3) for gram in _grams(context, n)}
    several = [*_grams(answer, 2), *_grams(answer, 3)]
    return 0.7 * fmean(gram in known for gram in several) + 0.3 * fmean(gram in known for gram in _grams(answer, 1))


def _grams(item: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(item[k:] for k in range(n)), strict=False))


def near_duplicate_ratio(items: list[list[str]]) -> float | None:
    """Share of items that have another one whose set of 5-word shingles is at least 0.8 alike (Jaccard); None of one item.

    The measure of Lee et al., arXiv:2107.06499, exactly, where MinHash estimates it. Two such sets share a shingle
    among the rarest fifth of each (prefix filtering, Bayardo et al. 2007, doi:10.1145/1242572.1242591), so few pairs are
    compared. An item of fewer than 5 words is its own only shingle. It is the share in the sample: of a pair in a large
    file seldom both are drawn, so data sets compare at the same sample size, or whole.
    """
    if len(items) < 2:
        return None
    sets = [set(_grams(item, SHINGLE)) or {tuple(item)} for item in items]
    common = Counter(shingle for found in sets for shingle in found)
    twin = [False] * len(sets)
    holders: dict[tuple, list[int]] = {}
    for i, mine in enumerate(sets):
        rarest = sorted(mine, key=lambda shingle: (common[shingle], shingle))[: len(mine) - -(-4 * len(mine) // 5) + 1]
        for j in sorted({j for shingle in rarest for j in holders.get(shingle, ())}):
            if not (twin[i] and twin[j]) and 5 * len(mine & sets[j]) >= 4 * len(mine | sets[j]):
                twin[i] = twin[j] = True
        for shingle in rarest:
            holders.setdefault(shingle, []).append(i)
    return sum(twin) / len(twin)
