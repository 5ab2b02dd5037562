"""Samples of data sets, and each text feature against a value worked out by hand or by brute force."""

import hashlib
import itertools
import json
import random
import tracemalloc
from collections import Counter
from math import sqrt
from pathlib import Path

import pytest

from data.records import Record, load_records
from features import text
from features.dataset import Sample, dataset_files, load_sample
from features.text import TEXT_COLUMNS, mattr, near_duplicate_ratio, text_features, words
from model.tokenizer import load_tokenizer
from study.errors import LetheError


class Spaced:
    """Stands in for a tokenizer: a token for each word between spaces."""

    def encode(self, text):
        return text.split()


def sample(*pairs, contexts=(), items=None, skipped=0):
    records = [Record((("user", asked),), answer) for asked, answer in pairs]
    return Sample("s", Path("s.json"), records, items or len(pairs), 0, skipped, "", contexts)


def features(*pairs, **more):
    return text_features(sample(*pairs, **more), Spaced())


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count, start=0):
    return [{"input": f"question {i}", "output": f"answer {i}"} for i in range(start, start + count)]


# ----------------------------------------------------------------------------------------------------------------------
# Features


def test_lengths():
    found = features(("a b c", "d"), ("e", "f g h i"), ("j k", "l"))  # inputs of 3, 1, 2 tokens; outputs of 1, 4, 1
    assert (found["avg_input_length"], found["avg_output_length"]) == (2.0, 2.0)
    assert found["input_length_std"] == pytest.approx(sqrt(2 / 3), abs=1e-15)
    assert found["output_length_std"] == pytest.approx(sqrt(2), abs=1e-15)
    assert found["io_length_ratio"] == 1.0
    assert features(("a b c d", "e"), ("a b", "f g"))["io_length_ratio"] == 0.5  # 1.5 / 3, not the mean of 1/4 and 1


def test_lengths_are_the_tokenizers_of_all_turns_and_no_template():
    tokenizer = load_tokenizer("nano")
    record = Record((("system", "Be brief."), ("user", "What is 3 + 4?")), "It is 7.")
    one = Sample("s", Path("s"), [record], 1, 0, 0, "")
    found = text_features(one, tokenizer)
    assert found["avg_input_length"] == len(tokenizer.encode("Be brief.\nWhat is 3 + 4?"))
    assert found["avg_output_length"] == len(tokenizer.encode("It is 7."))
    assert tuple(found) == TEXT_COLUMNS


def test_what_cannot_be_computed_is_none_and_never_zero():
    found = features(("?!", "1"))
    none = {"input_length_std", "output_length_std", "input_mattr", "output_mattr", "output_ngram_repetition", "near_duplicate_ratio",
            "answer_groundedness"}  # fmt: skip
    assert {name for name, value in found.items() if value is None} == none
    assert features(("中文", "字"))["vocab_complexity"] is None
    assert text_features(sample(("", "a")), Spaced())["io_length_ratio"] is None


def test_words():
    assert words("Don't STOP, don\u2019t: foo_bar 3.5 (x-y)") == ["don't", "stop", "don\u2019t", "foo", "bar", "3", "5", "x", "y"]
    assert words("e\u0301te\u0301") == words("\u00e9t\u00e9") == ["\u00e9t\u00e9"], "composed or not"
    assert words("हिन्दी में") == ["हिन्दी", "में"], "vowel signs are part of a word"
    assert words("中文ABC字、カタ 한국어") == ["中", "文", "abc", "字", "カ", "タ", "한국어"]
    assert words("…!? 🙂") == []


def test_mattr_by_hand():
    assert mattr(["a", "b", "a", "c"], window=3) == (2 + 3) / (3 * 2)  # a b a: 2 types, b a c: 3
    assert mattr(["a"] * 50) == 1 / 50 and mattr(["a"] * 49) is None
    assert features(("a " * 60, "b c " * 25))["input_mattr"] == 1 / 50
    assert features(("a " * 60, "b c " * 25))["output_mattr"] == 2 / 50
    long = [str(i) for i in range(70)]
    assert mattr(long) == mattr(long * 2) == 1.0, "no repetition within a window, and no fall with the length"


def test_mattr_against_every_window():
    rng = random.Random(0)
    stream = [rng.choice("abcdefghijklmnop") for _ in range(200)]
    windows = [stream[i : i + 50] for i in range(151)]
    assert mattr(stream) == pytest.approx(sum(len(set(w)) / 50 for w in windows) / 151, abs=1e-12)


def test_ngram_repetition():
    assert text.ngram_repetition("a b c a b c".split()) == 1 / 3  # abc twice, bca, cab
    assert text.ngram_repetition("a b c d".split()) == 0.0 and text.ngram_repetition(["a", "b"]) is None
    found = features(("x", "a b c a b c"), ("x", "a b c d"), ("x", "a b"))
    assert found["output_ngram_repetition"] == (1 / 3 + 0) / 2, "the answer of two words is left out"


def test_vocab_complexity():
    assert text.vocab_complexity(["elephants", "elephant", "a", "b"]) == 1 / 4  # nine letters; eight are not more than eight
    assert text.vocab_complexity(["elephants", "中", "文"]) == 1.0
    assert features(("elephants run", "a b"), ("c", "d"))["vocab_complexity"] == (1 / 4 + 0) / 2


def test_character_shares():
    assert text.character_shares("a1 +-\n") == (2 / 4, 1 / 4)
    assert text.character_shares("हि²中") == (0.0, 0.0), "a mark, a superscript and a letter are no symbols; a superscript is no decimal"
    assert text.character_shares(" \n") == (None, None)
    found = features(("ab", "1+"), ("c", "d"))
    assert (found["symbol_ratio"], found["digit_ratio"]) == (1 / 8, 1 / 8)
    assert 0 <= features(("!!! ### $$$", "111  222"))["symbol_ratio"] <= 1, "a share, which the weighted sum of marks was not"


def test_answer_groundedness():
    context = "the cat sat on the mat".split()
    # of "the cat ran": bigrams the-cat, cat-ran and the trigram: 1 of 3; words: 2 of 3
    assert text.answer_groundedness(context, "the cat ran".split()) == pytest.approx(0.7 / 3 + 0.3 * 2 / 3, abs=1e-15)
    assert text.answer_groundedness(context, "sat on the mat".split()) == pytest.approx(1.0)
    assert text.answer_groundedness(context, ["cat"]) is None and text.answer_groundedness([], ["the", "cat"]) is None
    pairs = ("q", "The cat!"), ("q", "a dog"), ("q", "cat"), ("q", "the cat")
    contexts = ("The cat sat.", "The cat sat.", "The cat sat.", "")
    assert features(*pairs, contexts=contexts)["answer_groundedness"] == pytest.approx((1 + 0) / 2), "of the two that have it"


def test_bookkeeping():
    found = features(("a", "b"), ("c", "d"), items=30, skipped=10)
    assert (found["static_valid_count"], found["static_skipped_count"], found["static_coverage"]) == (2, 10, 0.75)


def test_near_duplicates_by_hand():
    base = [f"w{i}" for i in range(24)]  # 20 shingles
    changed = [*base[:-1], "x"]  # 19 of 21 in common: 0.905
    other = ["y", *base[1:-3], "a", "b", "c"]  # with base: 16 of 24, 0.667
    between = ["y", "z", *base[2:]], [*base[:-2], "y", "z"], base  # the last is near both (18 of 22), which are far apart (16 of 24)
    assert near_duplicate_ratio(list(between)) == 1.0
    far = [f"v{i}" for i in range(24)]
    assert near_duplicate_ratio([base, changed, other, far]) == 2 / 4
    assert near_duplicate_ratio([base, other]) == 0.0
    assert near_duplicate_ratio([["yes"], ["yes"], ["no"]]) == 2 / 3, "short ones only when equal"
    assert near_duplicate_ratio([base]) is None
    assert near_duplicate_ratio([base] * 5) == 1.0
    exactly = [f"w{i}" for i in range(13)]  # 9 shingles; less its first word: 8 of 9
    assert near_duplicate_ratio([exactly, exactly[1:]]) == 1.0
    limit = [f"w{i}" for i in range(9)]  # 5 shingles; less its first word: 4 of 5, which is 0.8
    assert near_duplicate_ratio([limit, limit[1:]]) == 1.0
    assert features(("?", "!"), ("+", "-"))["near_duplicate_ratio"] == 0.0, "texts without a word are still told apart"


def test_near_duplicates_against_all_pairs():
    rng, found = random.Random(1), []
    for _ in range(60):
        items = []
        for _ in range(12):
            old = list(rng.choice(items)) if items and rng.random() < 0.6 else [rng.choice("abcdefgh") for _ in range(rng.randint(1, 40))]
            for _ in range(rng.choice((0, 0, 1, 2))):
                old[rng.randrange(len(old))] = rng.choice("abcdefghij")
            items.append(old)
        sets = [{tuple(i[k : k + 5]) for k in range(len(i) - 4)} or {tuple(i)} for i in items]
        twins = {
            k for a, b in itertools.combinations(range(12), 2) if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= 0.8 for k in (a, b)
        }
        assert near_duplicate_ratio(items) == len(twins) / 12
        found.append(len(twins))
    assert len(set(found)) > 5


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_sample_is_seeded_in_file_order_and_without_repetition(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(200))
    drawn = load_sample(path, 20, seed=3)
    places = [int(record.answer.split()[1]) for record in drawn.records]
    assert len(places) == 20 and places == sorted(set(places)) and drawn == load_sample(path, 20, seed=3)
    assert places != [int(record.answer.split()[1]) for record in load_sample(path, 20, seed=4).records]
    assert (drawn.name, drawn.items, drawn.skipped, drawn.note) == ("a", 200, 0, "")
    assert drawn.chars == sum(len(f"question {i}") + len(f"answer {i}") for i in range(200))
    assert drawn.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for everything in (load_sample(path, 0), load_sample(path, 200), load_sample(path, 999)):
        assert everything.records == load_records(path)


def test_every_record_is_equally_likely(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(12))
    counts = Counter(record.answer for seed in range(600) for record in load_sample(path, 3, seed).records)
    assert len(counts) == 12 and all(abs(count - 150) < 5 * sqrt(600 * 0.25 * 0.75) for count in counts.values()), counts


def test_memory_holds_the_sample_not_the_file(tmp_path):
    path = tmp_path / "big.jsonl"
    with open(path, "w") as file:
        for i in range(4000):
            file.write(json.dumps({"input": f"{i} " + "x" * 4000, "output": "y"}) + "\n")
    load_sample(path, 1)  # imports and caches
    tracemalloc.start()
    drawn = load_sample(path, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.items == 4000 and path.stat().st_size > 16e6 and peak < 4e6


def test_contexts_and_bad_rows(tmp_path):
    pairs = [{"question": "q1", "output": "a1"}, {"question": "q2", "output": ""}, {"question": "q3", "output": "a3"}]
    path = write(
        tmp_path / "c.json", [{"context_text": " Some facts. ", "qa_pairs": pairs}, {"input": "q4", "output": "a4"}, {"nothing": 1}]
    )
    drawn = load_sample(path, 0)
    assert [record.answer for record in drawn.records] == ["a1", "a3", "a4"]
    assert drawn.contexts == ("Some facts.", "Some facts.", "")
    assert (drawn.items, drawn.skipped) == (3, 2) and drawn.note == "2 of its rows passed over; the first: c.json:1: pair 2: no output"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = write(tmp_path / "d.jsonl", [{"context_text": "not asked about", "messages": turns}])
    assert load_sample(other).contexts == ("",)


def test_what_cannot_be_read_is_one_line(tmp_path):
    array = tmp_path / "cut.json"
    array.write_text(json.dumps(rows(5))[:-40])
    for path, words_ in (
        (tmp_path / "none.jsonl", "none.jsonl: cannot be read (No such file or directory)"),
        (tmp_path, "cannot be read"),
        (write(tmp_path / "odd.jsonl", [{"foo": 1}]), "no record among 1 rows; the first"),
        (array, "at byte"),
    ):
        with pytest.raises(LetheError) as caught:
            load_sample(path)
        assert words_ in str(caught.value) and "\n" not in str(caught.value)
    saved = load_sample(array, salvage=True)
    assert [record.answer for record in saved.records] == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert saved.skipped == 1 and "cut off" in saved.note and str(tmp_path) not in saved.note


def test_files_of_a_folder(tmp_path):
    for name in (
        "b.jsonl", "a.json", "chunk_10/a.json", "chunk_2/a.parquet", "a.jsonl", "x y\n.json", ".cache/a.json", "empty/.b/c.json",
        "notes.txt", "f.csv", "f.csv.times.jsonl", "f.tsv.settings.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = dataset_files(tmp_path)
    assert list(found) == ["a.json", "a.jsonl", "b", "chunk_2/a", "chunk_10/a", "x y"]
    assert found["chunk_10/a"] == tmp_path / "chunk_10/a.json"
    with pytest.raises(LetheError, match="no .json, .jsonl, .parquet file in it"):
        dataset_files(tmp_path / "empty")
    with pytest.raises(LetheError, match="no such folder; for one file there is --single_dataset"):
        dataset_files(tmp_path / "b.jsonl")
