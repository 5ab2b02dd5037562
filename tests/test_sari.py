"""metrics/sari.py against the paper read with plain dictionaries, and against published values."""

import random

import pytest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from metrics.sari import VARIANTS, corpus_sari, corpus_sari_parts, sari, sari_counts, sari_of_counts, sari_parts
from metrics.text import tokenize_13a

SOURCE = "About 95 species are currently accepted ."
REFERENCES = ["About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."]
OUTPUTS = ["About 95 you now get in .", "About 95 species are now agreed .", "About 95 species are currently agreed ."]


def counts_of(text: str, n: int) -> dict[str, int]:
    words, found = text.split(), {}
    for start in range(len(words) - n + 1):
        gram = " ".join(words[start : start + n])
        found[gram] = found.get(gram, 0) + 1
    return found


def by_the_paper(source: str, output: str, references: list[str]) -> tuple[float, float, float]:
    """Equations 4 to 8 of Xu et al. 2016, one n-gram after the other."""
    rates: dict[str, list[float]] = {name: [] for name in ("p_add", "r_add", "p_keep", "r_keep", "p_del")}
    for n in (1, 2, 3, 4):
        in_source, in_output = counts_of(source, n), counts_of(output, n)
        each = [counts_of(text, n) for text in references]
        sums = dict.fromkeys(("add", "O-I", "R-I", "keep", "I&O", "I&R", "del", "I-O"), 0.0)
        for g in {*in_source, *in_output, *(g for one in each for g in one)}:
            of_i, of_o, of_r = in_source.get(g, 0), in_output.get(g, 0), sum(one.get(g, 0) for one in each) / len(each)
            new, wanted = int(of_o > 0 and of_i == 0), int(of_r > 0 and of_i == 0)  # the indicator of a set
            sums["O-I"] += new
            sums["R-I"] += wanted
            sums["add"] += min(new, int(of_r > 0))
            kept, to_keep = min(of_i, of_o), min(of_i, of_r)
            sums["I&O"] += kept
            sums["I&R"] += to_keep
            sums["keep"] += min(kept, to_keep)
            deleted, to_delete = max(of_i - of_o, 0), max(of_i - of_r, 0)
            sums["I-O"] += deleted
            sums["del"] += min(deleted, to_delete)
        for rate, part, whole in (("p_add", "add", "O-I"), ("r_add", "add", "R-I"), ("p_keep", "keep", "I&O"), ("r_keep", "keep", "I&R"),
                                  ("p_del", "del", "I-O")):  # fmt: skip
            rates[rate].append(sums[part] / sums[whole] if sums[whole] else 0.0)
    mean = {name: sum(values) / 4 for name, values in rates.items()}

    def f(p: float, r: float) -> float:
        return 2 * p * r / (p + r) if p + r else 0.0

    return f(mean["p_keep"], mean["r_keep"]), f(mean["p_add"], mean["r_add"]), mean["p_del"]


def drawn(draw: random.Random) -> tuple[str, str, list[str]]:
    def sentence(least: int = 1) -> str:
        return " ".join(draw.choice("abcdeF") for _ in range(draw.randint(least, 9)))

    source, references = sentence(), [sentence() for _ in range(draw.randint(1, 4))]
    output = draw.choice([sentence(0), sentence(0), sentence(0), source, references[0], source.rpartition(" ")[0]])
    return source, output, references


def test_random_strings_score_as_the_paper_reads():
    draw = random.Random(0)
    for _ in range(2000):
        source, output, references = drawn(draw)  # an empty output is one word that stands nowhere else
        keep, add, delete = by_the_paper(source.lower(), output.lower() or "∅", [text.lower() for text in references])
        found = sari_parts(source, output, references)
        assert (found.keep, found.add, found.delete) == pytest.approx((keep, add, delete), abs=1e-12), (source, output, references)
        assert sari(source, output, references) == pytest.approx((keep + add + delete) / 3, abs=1e-12)


def test_published_sentences():
    xu = [sari(SOURCE, output, REFERENCES, "xu") for output in OUTPUTS]  # SARI.py's own examples
    assert xu == pytest.approx([0.2682782411698074, 0.5889995423074248, 0.5071608864657479], abs=1e-12)
    assert sari(SOURCE, OUTPUTS[0], REFERENCES, "evaluate") == pytest.approx(0.26953601953601954, abs=1e-12)  # its metric's docstring
    assert [sari(SOURCE.upper(), output.lower(), REFERENCES, "xu") for output in OUTPUTS] == xu


def test_published_corpus():
    """The example of EASSE's README; its tokens are 13a's."""
    references = [["About 95 species are currently known.", "About 95 species are now accepted.", "95 species are now accepted."],
                  ["The cat sat on the mat.", "The cat is on the mat.", "The cat sat."]]  # fmt: skip
    items = [{"original": "About 95 species are currently accepted.", "output": "About 95 you now get in.", "references": references[0]},
             {"original": "The cat perched on the mat.", "output": "Cat on mat.", "references": references[1]}]  # fmt: skip
    assert 100 * corpus_sari(items) == pytest.approx(33.17472563619544, abs=1e-10)
    parts = corpus_sari_parts(items, delete="precision")
    assert parts.value < corpus_sari(items) and (parts.keep, parts.add) == pytest.approx(
        (corpus_sari_parts(items).keep, corpus_sari_parts(items).add)
    )
    counts = sari_counts(items)
    assert counts.shape == (2, 36) and sari_of_counts(counts).shape == (3, 2)


def test_corpus_of_one_has_the_sums_of_the_paper():
    """One sentence: p of delete is the paper's, and F of orders averaged beside F of averages."""
    draw = random.Random(1)
    for _ in range(200):
        source, output, references = drawn(draw)
        item = {"original": source, "output": output, "references": references}
        by_paper, together = sari_parts(source, output, references), corpus_sari_parts([item], "precision")
        assert together.delete == pytest.approx(by_paper.delete, abs=1e-12)
        for mine, theirs in ((together.keep, by_paper.keep), (together.add, by_paper.add)):
            assert mine <= theirs + 1e-12 and (mine > 0) == (theirs > 0)  # F is concave in (p, r)


def test_edges():
    one, two = "the cat sat on the mat", "a cat sat here"
    for variant, copied in (("paper", 1 / 3), ("xu", 1 / 3), ("evaluate", 1.0)):  # source, output and reference are all the same
        assert sari(one, one, [one], variant) == pytest.approx(copied)
    best = sari_parts(one, two, [two])
    assert best.add == best.delete == 1 and best.keep == pytest.approx(0.5)  # of orders 3 and 4 nothing is left to keep: 0/0
    assert sari_parts(one, two, [two], "evaluate").value == pytest.approx(1.0)
    nothing = sari_parts(one, "", [two])
    assert (nothing.keep, nothing.add) == (0, 0) and nothing.delete > 0.8
    assert sari("x", "", [""]) == pytest.approx(by_or_nothing())
    copy = sari_parts(one, one, [two])
    assert copy.add == copy.delete == 0 and copy.keep > 0
    assert sari_parts(one, one, [two], "evaluate").delete == 1  # why a copy does so well there
    assert sari(one, two, [two, two]) == pytest.approx(sari(one, two, [two]))  # a reference twice says nothing new
    for variant in VARIANTS:
        assert 0 <= sari(one, "mat the on", [two, one], variant) <= 1
    with pytest.raises(ValueError, match="variant"):
        sari(one, two, [two], "easse")
    for wrong in ([], two):
        with pytest.raises(ValueError, match="list of one reference"):
            sari(one, two, wrong)
    with pytest.raises(ValueError, match="at least one item"):
        corpus_sari([])
    with pytest.raises(ValueError, match="f1 or precision"):
        corpus_sari([{"original": one, "output": two, "reference": two}], "recall")


def by_or_nothing() -> float:
    """An empty output and an empty reference: one empty word added and wanted, the one word deleted, of four orders the first alone."""
    return (0 + 0.25 + 0.25) / 3


def test_the_tokens_are_those_of_sacrebleu():
    theirs, draw = Tokenizer13a(), random.Random(2)
    alphabet = "ab1 2.,-&;<>/'\"()[]{}~`^_:@!#$%*+=?|\\\n\tüé“。"
    for _ in range(3000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 20)))
        text += draw.choice(["", "", "&quot;", "&amp;lt;", "<skipped>", "-\n"]) + text[:3]
        assert tokenize_13a(text) == theirs(text), text


def test_asset(real_data):
    """The identity on ASSET's test set scores 20.73 in published tables (EASSE, 13a, lower case)."""

    def lines(name: str) -> list[str]:
        return (real_data / "asset" / f"asset.test.{name}").read_text(encoding="utf-8").splitlines()

    originals, references = lines("orig"), list(zip(*(lines(f"simp.{k}") for k in range(10)), strict=True))
    assert len(originals) == len(references) == 359
    items = [{"original": text, "output": text, "references": own} for text, own in zip(originals, references, strict=True)]
    assert round(100 * corpus_sari(items), 2) == 20.73
    first = [{"original": text, "output": own[0], "references": own[1:]} for text, own in zip(originals, references, strict=True)]
    assert round(100 * corpus_sari(first), 2) == 44.59

    def mean(items: list[dict], variant: str) -> float:
        return 100 * sum(sari(item["original"], item["output"], item["references"], variant) for item in items) / len(items)

    assert mean(items, "paper") < 21 < 43 < mean(first, "paper") < 45
    assert mean(items, "evaluate") > 53 > 44 > mean(first, "evaluate")  # there a copy beats a human
