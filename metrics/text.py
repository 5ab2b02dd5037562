"""Comparing texts: normal form of a short answer, ROUGE, the words that BLEU and SARI count."""

import functools
import re
import unicodedata
from collections import Counter

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DECIMAL_POINT = re.compile(r"(?<=[0-9])\.(?=[0-9])")
_ASCII_SYMBOLS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _is_punctuation(char: str) -> bool:
    return char in _ASCII_SYMBOLS or unicodedata.category(char).startswith("P")


def collapse(text: str) -> str:
    """The text without outer white space, every inner run of it one space."""
    return " ".join(text.split())


def normalise(text: str) -> str:
    """Normal form of a short answer: lower case, no articles, no punctuation, single spaces.

    As the SQuAD evaluation does (arXiv 1606.05250), with three repairs: Unicode punctuation goes too, a decimal point
    stays (3.5 is not 35), and a text made of articles alone ("The The") keeps them. NFKC first, so that full-width
    and composed forms compare equal.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _DECIMAL_POINT.sub("\0", text)  # NUL stands in for the point while punctuation goes
    text = "".join(char for char in text if not _is_punctuation(char)).replace("\0", ".")
    return collapse(_ARTICLES.sub(" ", text)) or collapse(text)


@functools.lru_cache(maxsize=2)
def _tokenizer(stem: bool):
    from rouge_score import tokenizers  # late: it pulls in nltk, about a second

    return tokenizers.DefaultTokenizer(stem)


def rouge_l(prediction: str, reference: str, stem: bool = False) -> float:
    """ROUGE-L F-measure in [0, 1] as the rouge-score package has it (Lin 2004); 0 if either has no token.

    Its tokens are runs of a-z and 0-9, so text in other scripts scores 0. The tokens are the package's own; its table for the
    longest common subsequence took longer than a GPU needs to write the answer, so that is done on bits here.
    """
    found, wanted = (_tokenizer(stem).tokenize(text) for text in (prediction, reference))
    common = _longest_common_subsequence(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: F-measures in [0, 1] as the rouge-score package has them, without stemming (Lin 2004)."""
    found, wanted = (_tokenizer(False).tokenize(text) for text in (prediction, reference))
    scores = {}
    for name, n in (("rouge1", 1), ("rouge2", 2)):
        ours, theirs = (Counter(zip(*(tokens[k:] for k in range(n)), strict=False)) for tokens in (found, wanted))
        common = (ours & theirs).total()
        scores[name] = 2 * common / (ours.total() + theirs.total()) if common else 0.0
    common = _longest_common_subsequence(found, wanted)
    return {**scores, "rougeL": 2 * common / (len(found) + len(wanted)) if common else 0.0}


def rouge_l_jieba(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1] over jieba's tokens, as Self-Synthesized Rehearsal (arXiv 2403.01244) takes it by rouge-chinese.

    Punctuation and capitals count here and letters outside a-z too, so it is not comparable with rouge_l. Needs jieba; raises
    ImportError with the pip command without it. 0 if either text has no token.
    """
    try:
        import jieba  # its dictionary takes about a second to read
    except ImportError:
        raise ImportError("ROUGE-L over jieba's tokens needs jieba: pip install jieba") from None
    jieba.setLogLevel("WARNING")
    found, wanted = (" ".join(jieba.cut(text)).split() for text in (prediction, reference))
    common = _longest_common_subsequence(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


# The rules of NIST's mteval-v13a for languages in Latin letters: symbols stand alone; points and commas unless digits are around them;
# a dash after a digit.
_RULES_13A = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


@functools.lru_cache(maxsize=2**16)  # references are the same after every stage
def tokenize_13a(text: str) -> str:
    """The words of a text with a space between, as sacrebleu's tokenizer 13a has them; "" of none."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in _ENTITIES.items():
        text = text.replace(entity, char)
    text = f" {text} "
    for pattern, spaced in _RULES_13A:
        text = pattern.sub(spaced, text)
    return collapse(text)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, a row of the table as the bits of one integer (Crochemore et al. 2001)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & every
    return len(a) - row.bit_count()
