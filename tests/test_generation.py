"""metrics/generation.py and the rows and tables of generated text: against rouge-score and sacrebleu."""

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

import metrics.summary
from data.folder import Task
from data.records import Record
from eval import score_task
from metrics.answers import score_answer
from metrics.generation import bert_score, bleu_of_counts, corpus_bleu, score_text
from metrics.sari import corpus_sari, sari
from metrics.statistics import resampled_sums
from metrics.summary import summarise
from metrics.text import rouge
from model.subject import load_subject
from study.results import summary_table
from study.text_scores import signature_lines, text_cells, text_table

WORDS = "the cat sat on a mat, 17 dogs ran. It rained!".split()


def sentence(draw: random.Random, least: int = 0, most: int = 12) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def corpus(draw: random.Random, items: int, most: int = 12) -> tuple[list[str], list[list[str]]]:
    outputs = [sentence(draw, 0, most) for _ in range(items)]
    return outputs, [[sentence(draw, 1, most) for _ in range(draw.randint(1, 3))] for _ in range(items)]


def test_rouge_equals_the_package():
    names, draw = ["rouge1", "rouge2", "rougeL"], random.Random(0)
    theirs = RougeScorer(names)
    for _ in range(300):
        output, references = sentence(draw), [sentence(draw) for _ in range(draw.randint(1, 4))]
        one = theirs.score(references[0], output)
        assert rouge(output, references[0]) == pytest.approx({name: one[name].fmeasure for name in names}, abs=1e-12)
        best = theirs.score_multi(references, output)
        assert score_text(output, references[0], references) == pytest.approx({name: best[name].fmeasure for name in names}, abs=1e-12)


def test_text_is_right_where_it_equals_any_reference():
    row = score_answer("text", "b  c", "a", ("a", "b c"), original="b c d")
    assert row["exact_match"] and row["flexible_match"] and row["string_match"] and row["gold"] == "a"
    assert row["rouge1"] == row["rouge2"] == row["rougeL"] == 1.0 and row["sari"] == sari("b c d", "b  c", ["a", "b c"])
    row = score_answer("text", "b c", "a")
    assert not row["exact_match"] and not row["flexible_match"] and "sari" not in row and row["rouge1"] == 0.0
    assert score_answer("number", "#### 4", "#### 3", ("#### 3", "#### 4"))["exact_match"]
    assert "rouge1" not in score_answer("number", "#### 4", "#### 4")
    assert not score_answer("text", " ", "a", ("a", " "))["exact_match"]  # nothing is no answer


def test_bleu_is_that_of_sacrebleu():
    draw = random.Random(1)
    for most in (3, 12):  # short ones: orders without a match, or without an n-gram
        outputs, references = corpus(draw, 60, most)
        found, metric = corpus_bleu(outputs, references), BLEU()
        streams = [[own[k] if k < len(own) else None for own in references] for k in range(3)]
        assert found.value == metric.corpus_score(outputs, streams).score / 100
        assert found.signature == str(metric.get_signature())
        assert found.signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
        assert found.counts.shape == (60, 10) and float(bleu_of_counts(found.counts.sum(0))) == pytest.approx(found.value, abs=1e-12)
        for size in (1, 2, 5, 30):  # any part of the corpus by its counts, as sacrebleu has it
            picks = [draw.randrange(60) for _ in range(size)]
            theirs = BLEU().corpus_score([outputs[i] for i in picks], [[stream[i] for i in picks] for stream in streams])
            assert float(bleu_of_counts(found.counts[picks].sum(0))) == pytest.approx(theirs.score / 100, abs=1e-12)
    same = corpus_bleu(["the cat sat on the mat"] * 3, [["the cat sat on the mat"]] * 3)
    assert same.value == pytest.approx(1.0) and same.interval() == pytest.approx((1.0, 1.0)) and "nrefs:1|" in same.signature
    assert corpus_bleu([""], [["a"]]).value == 0.0
    for outputs, references in (([], []), (["a"], []), (["a"], [[]]), (["a"], ["a"])):
        with pytest.raises(ValueError, match="BLEU needs"):
            corpus_bleu(outputs, references)


def test_resampling_draws_whole_items():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resampled_sums(values, seed=3, rounds=250)
    assert sums.shape == (250, 2) and (sums[:, 1] == 10 * sums[:, 0]).all() and (sums == resampled_sums(values, seed=3, rounds=250)).all()
    possible = {a + b + c for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert set(sums[:, 0]) == possible
    assert resampled_sums(values, rounds=20_000)[:, 0].mean() == pytest.approx(7.0, abs=0.05)
    with pytest.raises(ValueError):
        resampled_sums(np.zeros((0, 2)))


def test_the_interval_of_bleu_holds_the_value_as_often_as_it_says():
    """95 of 100 intervals of samples hold the score of the population, more or less."""
    draw, generator = random.Random(5), np.random.default_rng(0)
    population, hits = corpus_bleu(*corpus(draw, 4000)), 0
    whole = float(bleu_of_counts(population.counts.sum(0)))
    for seed in range(100):
        part = population.counts[generator.integers(0, 4000, 200)]
        low, high = np.quantile(bleu_of_counts(resampled_sums(part, seed, 300)), (0.025, 0.975))
        hits += low <= whole <= high
    assert 86 <= hits <= 100


def items(draw: random.Random, count: int = 40, **more) -> list[dict]:
    found = []
    for _ in range(count):
        output, references, original = sentence(draw, 1), [sentence(draw, 1), sentence(draw, 1)], sentence(draw, 1)
        scores = score_answer("text", output, references[0], references, original)
        found.append({"output": output, "reference": references[0], "references": references, "original": original, **scores,
                      "answer_nll": 1.0, "group": "", **more})  # fmt: skip
    return found


def test_rows_of_a_cell():
    cell = items(random.Random(2))
    rows = {row["metric"]: row for row in summarise(cell)}
    assert list(rows)[-5:] == ["rouge1", "rouge2", "sari", "sari_easse", "bleu"]
    for metric in ("rouge1", "rouge2", "rougeL", "sari"):
        assert rows[metric]["value"] == pytest.approx(np.mean([item[metric] for item in cell]))
    assert rows["sari_easse"]["value"] == pytest.approx(corpus_sari(cell), abs=1e-12)
    bleu = corpus_bleu([item["output"] for item in cell], [item["references"] for item in cell])
    assert rows["bleu"]["value"] == bleu.value and (rows["bleu"]["low"], rows["bleu"]["high"]) == bleu.interval()
    for row in rows.values():
        assert row["low"] <= row["value"] <= row["high"] and row["n"] == 40 and row["unparsed"] == 0
    assert {metric for metric, row in rows.items() if "signature" in row} == {"sari", "sari_easse", "bleu"}
    lines = signature_lines(rows.values())
    assert lines[0] == "SARI       case:lc|tok:13a|orders:1-4|variant:paper|mean over sentences"
    assert lines[2].startswith("BLEU       nrefs:2|")
    assert [row["metric"] for row in summarise(cell, corpus=False)] == list(rows)[:-2]
    for item in cell:
        del item["sari"], item["original"]
    assert "sari" not in {row["metric"] for row in summarise(cell)} and "bleu" in {row["metric"] for row in summarise(cell)}
    plain = [{name: item[name] for name in item if not name.startswith("rouge") or name == "rougeL"} for item in cell]
    assert not {"rouge1", "bleu"} & {row["metric"] for row in summarise(plain)}  # other kinds have the rows that they had


def test_without_sacrebleu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        corpus_bleu(["a"], [["a"]])
    monkeypatch.undo()
    monkeypatch.setattr(metrics.summary.importlib.util, "find_spec", lambda name: None)
    metrics.summary._has_sacrebleu.cache_clear()
    try:
        cell = items(random.Random(3), 5)
        for _ in range(2):
            assert [row["metric"] for row in summarise(cell)][-2:] == ["sari", "sari_easse"]
        assert capsys.readouterr().err.count("pip install sacrebleu") == 1
    finally:
        metrics.summary._has_sacrebleu.cache_clear()


def test_bert_score_asks_the_package(monkeypatch):
    asked = {}

    def score(outputs, references, **options):
        asked.update(outputs=outputs, references=references, **options)
        return (torch.tensor([0.5, 1.0]), torch.tensor([0.25, 1.0]), torch.tensor([0.375, 1.0])), "some_model_L5"

    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ImportError, match="pip install bert-score"):
        bert_score(["a"], [["a"]])
    fake = ModuleType("bert_score")
    fake.score = score
    monkeypatch.setitem(sys.modules, "bert_score", fake)
    found = bert_score(("a", "b"), [("a", "c"), ["b"]], "folder", layer=5)
    assert found == {"precision": [0.5, 1.0], "recall": [0.25, 1.0], "f1": [0.375, 1.0], "signature": "some_model_L5"}
    assert asked == {"outputs": ["a", "b"], "references": [["a", "c"], ["b"]], "model_type": "folder", "num_layers": 5, "return_hash": True}


def study_rows() -> list[dict]:
    draw, rows = random.Random(4), []
    runs = [("base", "base", 0, None, None), *((f"lora_base/{t}", "none", 1, t, None) for t in "ab"),
            *((f"lora_transfer/{a}_to_{b}", "none", 2, a, b) for a, b in ("ab", "ba"))]  # fmt: skip
    for run, arm, stage, first, second in runs:
        for task in "ab":
            for row in summarise(items(draw, 12)):
                rows.append({"run": run, "arm": arm, "stage": stage, "first": first, "second": second, "task": task, "seed": 1, **row})
    return rows


def test_tables_stay_readable():
    rows = study_rows()
    table = text_table(text_cells(rows)).splitlines()
    assert [line.split()[0] for line in table[3:]] == ["a"] * 4 + ["b"] * 4 and max(map(len, table)) < 140
    states = ["base", "after stage 1", "lora_transfer, first kept", "lora_transfer, second learned"]
    assert [line[6:35].strip() for line in table[3:7]] == states
    value = next(row for row in rows if (row["run"], row["task"], row["metric"]) == ("base", "a", "bleu"))["value"]
    assert f"{100 * value:.1f} ±" in table[3] and table[1].split()[-2:] == ["BLEU", "n"]
    assert "ROUGE" not in summary_table(rows) and text_table(text_cells([row for row in rows if row["metric"] == "exact_match"])) == ""
    once = text_table([("a", "x", summarise(items(random.Random(seed), 12))) for seed in (0, 1)]).splitlines()
    assert len(once) == 4  # two seeds of a state are one row


def test_a_task_with_references_is_scored_by_all_of_them(tiny):
    subject = load_subject(tiny, "cpu", "float32")
    both = ("short", "brief")
    records = [Record((("user", f"Simplify: {text}"),), "short", references=both, original=text) for text in ("a b", "c d")]
    records.append(Record((("user", "Say it."),), "it"))
    task = Task("simple", "text", 6, lambda report=None: iter(()), records, "0" * 64, "simple")
    found = score_task(subject.model, subject.tokenizer, task, quiet=True)
    for item, record in zip(found, records, strict=True):
        expected = score_answer("text", item["output"], record.answer, record.references, record.original)
        assert {name: item[name] for name in expected} == expected
    assert [sorted({"references", "original", "sari"} & set(item)) for item in found] == [["original", "references", "sari"]] * 2 + [[]]
    assert found[0]["references"] == ["short", "brief"] and found[0]["original"] == "a b"
    rows = {row["metric"]: row for row in summarise(found)}
    assert (rows["sari"]["n"], rows["bleu"]["n"]) == (2, 3) and "nrefs:var" in rows["bleu"]["signature"]


def test_asset(real_data):
    """The identity and the first reference on ASSET's test set. BLEU of the identity is 92.81 in published tables."""

    def lines(name: str) -> list[str]:
        return (real_data / "asset" / f"asset.test.{name}").read_text(encoding="utf-8").splitlines()

    originals, references = lines("orig"), [list(own) for own in zip(*(lines(f"simp.{k}") for k in range(10)), strict=True)]
    identity = corpus_bleu(originals, references, lowercase=True)
    assert identity.signature.startswith("nrefs:10|case:lc|eff:no|tok:13a|smooth:exp|version:")
    low, high = identity.interval()
    assert round(100 * identity.value, 2) == 92.81 and low < identity.value < high < low + 0.05
    assert round(100 * corpus_bleu(originals, references).value, 2) == 92.56  # with capitals
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for text, own in list(zip(originals, references, strict=True))[:40]:
        mine, best = score_text(text, own[0], own), theirs.score_multi(own, text)
        assert mine == pytest.approx({name: best[name].fmeasure for name in best}, abs=1e-12)
