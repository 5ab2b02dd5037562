"""data/selection.py, data/vectors.py and model/pooling.py: against brute force, scikit-learn by hand, and sums in float64."""

import copy
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from data import selection, vectors
from data.records import Record, Report, as_row, load_records
from data.selection import Selection, equal_shares, labels_of, prompt_key, quotas, read_rows, select
from data.vectors import inputs_of, likeness, load_vectors, pooled_states
from model import pooling
from model.pooling import mean_states
from model.subject import Subject, load_subject
from study.errors import LetheError


def records_of(texts: list[str], answers: list[str] | None = None) -> list[Record]:
    return [Record((("user", text),), answer) for text, answer in zip(texts, answers or ["yes"] * len(texts), strict=True)]


def numbered(count: int) -> list[Record]:
    return records_of([f"item {i}" for i in range(count)])


def units(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(1, keepdims=True))


# ----------------------------------------------------------------------------------------------------------------------
# Budgets


def test_quotas_of_the_golden_vector():
    assert quotas([5, 5, 5], 4) == [2, 1, 1] and quotas([10, 10], 5) == [3, 2]  # rounding gives 3 of 4, and 4 of 5
    assert quotas([7, 0, 1], 8) == [7, 0, 1] and quotas([3, 4], 0) == [0, 0] and quotas([], 0) == []
    for sizes, budget in (([5, 5], 11), ([5], -1), ([], 1)):
        with pytest.raises(ValueError, match="a budget of"):
            quotas(sizes, budget)


def splits(sizes: list[int], budget: int) -> list[tuple[int, ...]]:
    """Every way to take `budget` in all."""
    return [split for split in itertools.product(*(range(size + 1) for size in sizes)) if sum(split) == budget]


@pytest.mark.parametrize("seed", range(30))
def test_budgets_equal_a_search(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 7, rng.integers(1, 5)).tolist()
    for budget in range(sum(sizes) + 1):
        every, found = splits(sizes, budget), quotas(sizes, budget)
        share = [budget * size / sum(sizes) if sum(sizes) else 0 for size in sizes]
        apart = lambda split: sum((a - b) ** 2 for a, b in zip(split, share, strict=True))  # noqa: E731, B023
        assert tuple(found) in every and apart(found) == pytest.approx(min(map(apart, every)))
        # As equal as can be: the least of the shares is as large as any split allows, then the next, and so on.
        equal = equal_shares(sizes, budget)
        assert tuple(equal) in every and sorted(equal) == max(map(sorted, every))


def test_equal_shares():
    assert equal_shares([9, 9, 9], 4) == [2, 1, 1] and equal_shares([100, 3, 100], 21) == [9, 3, 9] and equal_shares([1, 5], 6) == [1, 5]
    with pytest.raises(ValueError, match="a budget of 7 out of 6"):
        equal_shares([1, 5], 7)


# ----------------------------------------------------------------------------------------------------------------------
# Random


def test_random_draws_without_replacement_and_is_seeded():
    records = numbered(50)
    chosen = select(records, 20, "random", seed=3)
    assert chosen == sorted(set(chosen)) and len(chosen) == 20 and max(chosen) < 50
    assert chosen == select(records, 20, "random", seed=3) != select(records, 20, "random", seed=4)
    assert set(chosen) < set(select(records, 35, "random", seed=3))  # a larger rehearsal holds the smaller one
    assert select(records, 50, "random") == list(range(50))
    # Every record has the same chance: 20 of 50, over 2000 seeds, within 5 standard deviations of 800.
    counts = np.bincount(np.concatenate([select(records, 20, "random", seed=seed) for seed in range(2000)]), minlength=50)
    assert abs(counts - 800).max() < 5 * np.sqrt(2000 * 0.4 * 0.6)


def test_copies_and_excluded_prompts_are_left_out():
    records = records_of(["What is x + 1?", "what is  x + 1?", "What is x - 1?", "A demonstration", " a DEMONSTRATION\n", "last"])
    report = Selection()
    exclude = {prompt_key(records[3])}
    assert select(records, 3, "random", exclude=exclude, report=report) == [0, 2, 5]
    assert (report.records, report.excluded, report.copies, report.chosen) == (6, 2, 1, 3)
    assert str(report) == "3 of 6 records; left out: excluded 2, copies 1"
    with pytest.raises(LetheError, match=r"--count 4: of 6 records 3 are left \(2 are excluded, 1 copies of another, 0 without a label\)"):
        select(records, 4, "random", exclude=exclude)
    turns = Record((("system", "be brief"), ("user", "last")), "yes")
    assert select([*records, turns], 5, "random") == [0, 2, 3, 5, 6]
    assert prompt_key(turns) == "be brief last" != prompt_key(records[5])


# ----------------------------------------------------------------------------------------------------------------------
# K-means


def blobs(sizes: list[int], seed: int = 0, spread: float = 0.35) -> np.ndarray:
    """(N, 12): directions about one axis for each size, in mixed order; cosines within a blob stay below 0.95."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([np.eye(12)[axis] + rng.normal(0, spread, (size, 12)) * (np.arange(12) > 5) for axis, size in enumerate(sizes)])
    return x[rng.permutation(len(x))] * rng.uniform(0.5, 3, (len(x), 1))  # lengths say nothing


def test_kmeans_takes_the_nearest_to_each_centroid():
    x = blobs([24, 12, 6])
    report = Selection()
    chosen = select(numbered(42), 14, "kmeans", vectors=x, clusters=3, near=1, report=report)
    # By hand: the axis that dominates is the cluster, its mean the centroid, a third of each the quota.
    u, mine = units(x), x[:, :3].argmax(1)
    expected = []
    for axis, quota in ((0, 8), (1, 4), (2, 2)):
        rows = np.flatnonzero(mine == axis)
        expected += rows[np.argsort(((u[rows] - u[rows].mean(0)) ** 2).sum(1))[:quota]].tolist()
    assert chosen == sorted(expected) and sorted(report.clusters) == [(6, 2), (12, 4), (24, 8)]
    assert "clusters (size:chosen)" in str(report) and "24:8" in str(report)


@pytest.mark.parametrize("seed", [0, 1])
def test_kmeans_equals_scikit_learn_by_hand(seed):
    x = np.random.default_rng(seed).normal(size=(120, 6))
    u = units(x)
    fitted = KMeans(20, n_init="auto", random_state=seed).fit(u)
    chosen = select(numbered(120), 33, "kmeans", vectors=x, near=1, seed=seed)
    sizes = np.bincount(fitted.labels_).tolist()
    distance = fitted.transform(u)[np.arange(120), fitted.labels_]
    expected = []
    for cluster, quota in enumerate(quotas(sizes, 33)):
        rows = np.flatnonzero(fitted.labels_ == cluster)
        expected += rows[np.argsort(distance[rows], kind="stable")][:quota].tolist()
    assert chosen == sorted(expected) and len(chosen) == 33
    assert chosen == select(numbered(120), 33, "kmeans", vectors=x * 7, near=1, seed=seed)
    assert chosen != select(numbered(120), 33, "random", seed=seed)


@pytest.mark.parametrize("seed", range(25))
def test_the_budget_is_exact(seed):
    """Whatever sizes, clusters, near copies and labels: as many as were asked for, each of them distinct and allowed."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    texts = [f"item {rng.integers(0, n)}" for _ in range(n)]
    x = rng.normal(size=(n, 3))  # in three dimensions many are near copies
    labels = [["yes", "no", "maybe", ""][rng.integers(0, 4)] for _ in range(n)] if seed % 2 else None
    exclude = {"item 0", "item 1"}
    left = {text for text in texts if text not in exclude}
    if labels is not None:
        first = {text: labels[i] for i, text in reversed(list(enumerate(texts)))}
        left = {text for text in left if first[text]}
    for count in {min(1, len(left)), len(left) // 2, len(left)} - {0}:
        for method in ("random", "kmeans"):
            chosen = select(
                records_of(texts), count, method, seed=seed, vectors=x, clusters=int(rng.integers(1, 25)), labels=labels, exclude=exclude
            )
            assert len(chosen) == count == len({texts[i] for i in chosen}) and {texts[i] for i in chosen} <= left
            if labels is not None:
                have = [sum(first[text] == name for text in left) for name in sorted({first[text] for text in left})]
                got = [sum(labels[i] == name for i in chosen) for name in sorted({first[text] for text in left})]
                assert got == equal_shares(have, count)
    with pytest.raises(LetheError, match="are left"):
        select(records_of(texts), len(left) + 1, "kmeans", vectors=x, labels=labels, exclude=exclude)


def test_near_copies_are_taken_last():
    x = np.array([[1, 0, 0], [0, 1, 0], [1, 0.1, 0], [0, 0, 1], [1, 0.3, 0], [0, 1, 0.05]])
    like = likeness(x, 0.95)
    assert like.tolist() == pytest.approx([-1, 0, 0.99504, 0, 0.95783, 0.99875], abs=1e-4)
    records, report = numbered(6), Selection()
    assert select(records, 3, "kmeans", vectors=x, report=report) == [0, 1, 3]
    assert (report.near, report.used_near) == (3, 0)
    report = Selection()
    assert select(records, 5, "kmeans", vectors=x, report=report) == [0, 1, 2, 3, 4]  # the least alike first: 4, then 2, then 5
    assert report.used_near == 2 and "2 of the near copies are among them" in str(report)
    assert select(records, 4, "kmeans", vectors=x) == [0, 1, 3, 4]


def test_likeness_equals_a_loop(monkeypatch):
    x = np.random.default_rng(0).normal(size=(90, 3))
    u, stay, expected = units(x), [], []
    for row in u:
        expected.append(max([float(row @ u[k]) for k in stay], default=-1.0))
        if expected[-1] <= 0.95:
            stay.append(len(expected) - 1)
    assert 10 < len(stay) < 80
    for block in (1, 7, 512):
        monkeypatch.setattr(vectors, "_BLOCK", block)
        assert likeness(x, 0.95) == pytest.approx(expected, abs=1e-6)


def test_equal_vectors_and_none():
    """Texts without a token all lie in the middle: fewer places than clusters."""
    x = np.zeros((6, 4))
    x[4:] = np.eye(4)[:2]
    assert len(select(numbered(6), 3, "kmeans", vectors=x, near=1)) == 3
    assert select(numbered(1), 1, "kmeans", vectors=np.ones((1, 2))) == [0]


def test_labels_get_equal_shares():
    answers = ["positive"] * 30 + ["Negative."] * 8 + ["the positive"] * 4 + [""] * 2
    records, report = records_of([f"item {i}" for i in range(44)], answers), Selection()
    labels = labels_of(records, "short")
    assert set(labels) == {"positive", "negative", ""}
    chosen = select(records, 15, "random", labels=labels, report=report)
    assert report.labels == {"negative": (8, 8), "positive": (34, 7)} and report.unlabelled == 2 and not report.short
    assert [labels[i] for i in chosen].count("negative") == 8
    report = Selection()
    assert len(select(records, 21, "kmeans", vectors=np.random.default_rng(0).normal(size=(44, 9)), labels=labels, report=report)) == 21
    assert report.labels == {"negative": (8, 8), "positive": (34, 13)} and report.short == ["negative"]
    assert "label negative: 8 of 8 (all there are)" in str(report) and len(report.clusters) == 10  # of the positive; 8 of 8 need none
    assert labels_of(records_of(["a", "b"], ["The answer is B", "no idea"]), "letter") == ["B", ""]


@pytest.mark.parametrize(("change", "told"), [
    ({"method": "kmean"}, "--method 'kmean' is unknown; known: random, kmeans"),
    ({"count": 0}, "--count must be 1 or more"),
    ({"clusters": 0}, "--clusters must be 1 or more"),
    ({"labels": ["a"]}, "1 labels for 4 records"),
    ({"vectors": None}, "kmeans needs vectors: give --model or --vectors"),
    ({"vectors": np.ones((3, 2))}, r"vectors of shape \(3, 2\) do not fit 4 records"),
    ({"vectors": np.ones(4)}, r"shape \(4,\)"),
    ({"vectors": np.array([[1.0], [2.0], [np.nan], [1.0]])}, "row 2 holds NaN"),
])  # fmt: skip
def test_what_cannot_be(change, told):
    settings = {"count": 2, "method": "kmeans", "vectors": np.eye(4), **change}
    with pytest.raises(LetheError, match=told):
        select(numbered(4), **settings)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert len(select(numbered(4), 2, "random")) == 2
    with pytest.raises(LetheError, match="pip install scikit-learn"):
        select(numbered(4), 2, "kmeans", vectors=np.eye(4))


# ----------------------------------------------------------------------------------------------------------------------
# Vectors


@pytest.fixture(scope="module")
def subject(tiny) -> Subject:
    return load_subject(tiny, "cpu")


WORDS = "the river runs past old houses , and nobody counts how many birds sit there on cold mornings".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


@torch.no_grad()
def test_states_are_means_in_float64(subject):
    texts, model = [*sentences(12), "", "  birds\n"], copy.deepcopy(subject.model).double()
    expected = []
    for text in texts:
        ids = subject.tokenizer.encode(text.strip())
        states = model.hidden(torch.tensor([[subject.tokenizer.bos, *ids]]))[0, 1:].numpy()
        expected.append(states.mean(0) if ids else np.full(32, np.nan))
    expected = np.array(expected)
    for room in (1, 40, None):
        assert mean_states(subject.model, subject.tokenizer, texts, room) == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    there = np.isfinite(expected).all(1)
    pooled = pooled_states(subject, texts)
    middle, spread = expected[there].mean(0), expected[there].std(0)
    assert pooled[there] == pytest.approx((expected[there] - middle) / spread, rel=1e-2, abs=1e-3)
    assert there.tolist() == [True] * 12 + [False, True] and not pooled[12].any()
    assert mean_states(subject.model, subject.tokenizer, []).shape == (0, 32) and pooled_states(subject, [" "]).tolist() == [[0.0] * 32]


def test_a_long_text_loses_its_middle(subject, monkeypatch):
    monkeypatch.setattr(pooling, "LONGEST", 9)
    text = "houses " * 40
    begin, (ids,) = pooling.encode_texts(subject.model, subject.tokenizer, [text], 10)
    whole = subject.tokenizer.encode(text.strip())
    assert begin == [subject.tokenizer.bos] and ids == whole[:4] + whole[-5:]


def test_what_all_prompts_begin_with_is_cut():
    texts = ["Tell the river.\nThe old\nhouse", "Tell the river.\nThe old\nbirds", "Tell the river.\nThe cold\nbirds"]
    assert inputs_of(records_of(texts)) == ["The old\nhouse", "The old\nbirds", "The cold\nbirds"]
    assert inputs_of(records_of(["one", "only"])) == ["one", "only"] and inputs_of([]) == []
    turns = Record((("system", "Tell."), ("user", "birds")), "x")
    assert inputs_of([turns, Record((("system", "Tell."), ("user", "houses")), "x")]) == ["birds", "houses"]


def test_vector_files(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(load_vectors(tmp_path / "x.npy"), x)
    save_file({"names": torch.zeros(5), "x": torch.tensor(x).bfloat16()}, tmp_path / "x.safetensors")
    assert np.array_equal(load_vectors(tmp_path / "x.safetensors"), torch.tensor(x).bfloat16().double().numpy())
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:40])
    for name, told in (
        ("none.npy", "no such file"), ("x.csv", ".npy or .safetensors"), ("pickled.npy", "cut or no .npy"), ("cut.npy", "cut or no .npy"),
        ("cut.safetensors", "cut or no .safetensors"), ("two.safetensors", "2 matrices"),
    ):  # fmt: skip
        with pytest.raises(LetheError, match=told) as caught:
            load_vectors(tmp_path / name)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_stay_as_they_are(tmp_path):
    rows = [
        {"prompt": [["system", "Be brief."], ["user", "birds?"]], "answer": "yes", "index": 7, "seed": [1, 2]},
        {"instruction": "count", "input": "birds", "output": "two", "id": "x"},
        {"context_text": "old", "qa_pairs": [{"question": "a", "output": "b"}, {"question": "c", "output": "d"}]},
        {"prompt": [["nobody", "birds?"]], "answer": "no"},
        {"prompt": [["user", "birds?", "more"]], "answer": "no"},
    ]
    report = Report()
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), report)
    assert [row for row, _ in found[:2]] == rows[:2] and found[0][1].prompt == (("system", "Be brief."), ("user", "birds?"))
    assert [row for row, _ in found[2:]] == [as_row(record) for _, record in found[2:]]
    assert found[3][0] == {"prompt": [["user", "old\n\nc"]], "answer": "d"}
    assert report.dropped_count == 2 and "unknown role 'nobody'" in str(report) and "rows.jsonl:5" in str(report)


def test_the_command(tmp_path, tiny, capsys):
    rows = [{"prompt": [["user", f"Say it.\n{text}"]], "answer": "AB"[i % 2], "index": i} for i, text in enumerate(sentences(40))]
    source, out = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "x"}]), tmp_path / "out.jsonl"
    demos = write_rows(tmp_path / "demos.jsonl", rows[:4])
    words = ["--input", source, "--out", str(out), "--count", "11", "--exclude", demos]

    def chosen(*more) -> list[int]:
        assert selection.main([*words, *more]) == 0
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row == rows[row["index"]] for row in found) and len(found) == 11
        return [row["index"] for row in found]

    records = [record for _, record in read_rows(source, Report())]
    by_model = chosen("--method", "kmeans", "--model", tiny, "--balance", "letter")
    told = capsys.readouterr().out
    assert "41 rows, 40 records, 1 dropped" in told and "11 of 40 records; left out: excluded 4" in told and "label A: 6 of 18" in told
    assert [rows[i]["answer"] for i in by_model].count("A") == 6 and min(by_model) > 3
    x = pooled_states(load_subject(tiny, "cpu"), sentences(40))  # "Say it." is of no weight
    np.save(tmp_path / "x.npy", x)
    assert by_model == chosen("--method", "kmeans", "--vectors", str(tmp_path / "x.npy"), "--balance", "letter")
    exclude = {prompt_key(record) for record in records[:4]}
    expected = select(records, 11, "kmeans", vectors=x, exclude=exclude, clusters=3, near=0.5, seed=5)
    settings = ["--clusters", "3", "--near", "0.5", "--seed", "5"]
    assert chosen("--method", "kmeans", "--vectors", str(tmp_path / "x.npy"), *settings) == expected
    assert chosen() == chosen("--method", "random") != chosen("--seed", "1")
    capsys.readouterr()
    for more, wrong in (
        (["--method", "kmeans"], "give --model or --vectors"), (["--method", "kmeans", "--model", tiny, "--vectors", "x"], "not both"),
        (["--count", "37"], "of 40 records 36 are left"), (["--input", str(tmp_path / "none")], "no such file"),
        (["--seed", "-1"], "--seed -1"),
        (["--method", "best"], "invalid choice"), (["--wrong", "1"], "unrecognized arguments: --wrong"), (["--count", "x"], "invalid int"),
    ):  # fmt: skip
        before = out.read_bytes()
        assert selection.main([*words, *more]) == 2 and out.read_bytes() == before
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and wrong in told, told


def test_reviews(real_data):
    """A released task of two labels, selected on toy vectors: halves, no copies, the budget."""
    records = load_records(real_data / "superni" / "sa.train.smp01.json")
    x, report = np.random.default_rng(0).normal(size=(len(records), 24)), Selection()
    labels = labels_of(records, "short")
    chosen = select(records, 51, "kmeans", vectors=x, labels=labels, report=report)
    assert len(chosen) == 51 and report.labels == {"negative": (100, 26), "positive": (100, 25)}
    texts = inputs_of(records)
    assert texts[0] in records[0].prompt[-1][1] and not any("two classes" in text for text in texts)
