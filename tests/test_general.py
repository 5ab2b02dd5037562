"""General ability: mini_mmlu, how a model is scored on a benchmark, the rows of a scored column, and the states that are compared."""

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tiny import train_some

import eval as evaluation
from data.benchmarks import Benchmark, Item
from data.builtin import task_questions
from data.builtin_corpus import documents
from data.builtin_mmlu import mini_mmlu
from data.builtin_problems import normalise_question
from data.builtin_world import people_facts, science_facts
from eval import score_benchmark
from lora.layers import add_lora, merged, remove_lora
from metrics.statistics import Z, mcnemar
from metrics.summary import summarise_benchmark
from model.subject import load_subject
from study.general import Scored, draw_general, general_table, read_column, result_rows, states_of, told
from study.plan import Run

# ----------------------------------------------------------------------------------------------------------------------
# The rows of a scored column


def item(subject: str, correct, extracted: str | None = "A", **more) -> dict:
    return {"subject": subject, "correct": correct, "gold": "A", "extracted": extracted, **more}


def wilson(hits: float, n: int) -> tuple[float, float]:
    """By its formula (Wilson 1927)."""
    share, z = hits / n, 1.959963984540054
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


ITEMS = [item("law", True, answer_nll=0.5), item("law", False, "B", answer_nll=2.0), item("law", True, answer_nll=0.5),
         item("law", False, None, answer_nll=5.0), item("art", True, answer_nll=1.0), item("art", False, None, answer_nll=3.0)]  # fmt: skip


def rows_of(items: list[dict]) -> dict[str, dict]:
    found = summarise_benchmark(items)
    assert len({row["metric"] for row in found}) == len(found)
    return {row["metric"]: row for row in found}


def test_micro_macro_and_subjects_by_hand():
    rows = rows_of([*ITEMS, *[item("art", True, answer_nll=1.0)] * 2])
    assert list(rows) == ["accuracy", "accuracy_macro", "accuracy/art", "accuracy/law", "answer_nll"]
    micro, macro, art, law, nll = rows.values()
    assert (micro["value"], micro["n"], micro["unparsed"]) == (5 / 8, 8, 2)  # those without an answer are wrong, not left out
    assert (micro["low"], micro["high"]) == pytest.approx(wilson(5, 8))
    assert (art["value"], art["n"], art["unparsed"], law["value"], law["n"], law["unparsed"]) == (3 / 4, 4, 1, 2 / 4, 4, 1)
    assert (law["low"], law["high"]) == pytest.approx(wilson(2, 4))
    # Shares after Agresti and Coull: (3 + 2) / 8 and (2 + 2) / 8; the mean of two means has a quarter of their variances.
    half = Z * math.sqrt((5 / 8 * 3 / 8 / 4 + 4 / 8 * 4 / 8 / 4) / 4)
    assert macro["value"] == (3 / 4 + 2 / 4) / 2 and macro["n"] == 8
    assert (macro["low"], macro["high"]) == pytest.approx((0.625 - half, min(1.0, 0.625 + half)))
    losses = [0.5, 2.0, 0.5, 5.0, 1.0, 3.0, 1.0, 1.0]
    half = Z * np.std(losses, ddof=1) / math.sqrt(8)
    assert (nll["value"], nll["low"], nll["high"]) == pytest.approx((1.75, 1.75 - half, 1.75 + half))


def test_subjects_count_alike_in_the_macro_mean():
    rows = rows_of([*[item("large", True)] * 30, *[item("small", False)] * 2])
    assert rows["accuracy"]["value"] == 30 / 32 and rows["accuracy_macro"]["value"] == 0.5
    assert rows["accuracy_macro"]["low"] < 0.5 < rows["accuracy_macro"]["high"]  # neither subject varies, and the mean is still unsure
    assert rows["accuracy_macro"]["low"] > 0.0


def test_one_subject_has_no_macro_mean_and_no_rows_of_subjects():
    rows = rows_of([item("", True), item("", False)])
    assert list(rows) == ["accuracy"] and rows["accuracy"]["value"] == 0.5


def test_items_of_lm_evaluation_harness():
    """Several metrics an item; `correct` may be missing, and may be no share."""
    base = {"subject": "toy", "gold": 1, "extracted": "x"}
    items = [{**base, "correct": 1, "metrics": {"acc": 1, "acc_norm": 0, "f1": 0.25}},
             {**base, "correct": None, "metrics": {"acc": None, "perplexity": [1.5, 2.0]}},
             {**base, "correct": 0, "metrics": {"acc": 0, "acc_norm": True, "f1": 0.75}}]  # fmt: skip
    rows = rows_of(items)
    assert list(rows) == ["accuracy", "acc", "acc_norm", "f1"]
    assert (rows["accuracy"]["value"], rows["accuracy"]["n"]) == (0.5, 2) and rows["acc_norm"]["value"] == 0.5
    assert (rows["acc"]["low"], rows["acc"]["high"]) == pytest.approx(wilson(1, 2))
    half = Z * np.std([0.25, 0.75], ddof=1) / math.sqrt(2)  # no share: mean and standard error
    assert (rows["f1"]["value"], rows["f1"]["low"], rows["f1"]["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    fractions = rows_of([item("", 0.25), item("", 0.75), item("", None)])["accuracy"]
    assert (fractions["value"], fractions["low"], fractions["n"]) == pytest.approx((0.5, 0.5 - half, 2))
    nothing = rows_of([item("", None)])["accuracy"]
    assert math.isnan(nothing["value"]) and (nothing["low"], nothing["high"], nothing["n"]) == (0.0, 1.0, 0)


def test_an_item_that_extracts_nothing_is_not_unparsed():
    """The likeliest of several continuations is no answer that has to be read."""
    chosen = {"subject": "toy", "gold": 1, "output": "b", "correct": 1, "metrics": {"acc": 1}, "loglikelihoods": [-2.0, -1.0]}
    assert rows_of([chosen, chosen])["accuracy"]["unparsed"] == 0
    assert rows_of([chosen, {**chosen, "extracted": None}])["accuracy"]["unparsed"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# mini_mmlu


@pytest.fixture(scope="module")
def nano():
    return load_subject("nano", "cpu", "float32")


def test_mini_mmlu_is_always_the_same():
    whole, some = mini_mmlu(), mini_mmlu(60)
    assert whole.fingerprint == "7a99c8fab248fbaed654ad64efba4baa7334147979fe55e0f4f5008b00d456e0"
    assert some.fingerprint == "9999a7f89a135a86304f17b3bf21a197806f10ec580084557b10461b8fe63c8e"
    assert (whole.name, len(whole.items), len({item.subject for item in whole.items})) == ("mini_mmlu", 684, 15)
    assert whole.spec == {"mmlu": "mini_mmlu", "max_items": None} and some.spec["max_items"] == len(some.items) == 60
    places = [whole.items.index(item) for item in some.items]
    assert places == sorted(places) and mini_mmlu(684).fingerprint == mini_mmlu(10_000).fingerprint == whole.fingerprint


def test_the_options_hold_the_right_answer_once():
    facts = {fact.statement(): fact for fact in (*people_facts(), *science_facts())}
    kinds = {"addition": lambda x, y: x + y, "subtraction": lambda x, y: x - y, "multiplication": lambda x, y: x * y,
             "division": lambda x, y: x / y}  # fmt: skip
    for one in mini_mmlu().items:
        assert 8 <= len(one.options) == len(set(one.options)) <= 16 and all(text.startswith(" ") for text in one.options)
        assert not one.question.endswith(" ") and one.shots == () and one.header == ""
        if one.subject in kinds:
            x, _, y, _ = one.question.split()
            results = [float(text) for text in one.options]
            assert [n for n, value in enumerate(results) if value == kinds[one.subject](int(x), int(y))] == [one.gold]
        else:
            sentences = [next((s for s in facts if s.startswith(one.question + text)), None) for text in one.options]
            assert [n for n, sentence in enumerate(sentences) if sentence] == [one.gold]
            assert set(one.options) <= {f" {value}" for value in facts[sentences[one.gold]].relation.values}
    places = [one.gold / (len(one.options) - 1) for one in mini_mmlu().items]
    assert 0.4 < np.mean(places) < 0.6  # not always in one place


def test_nobody_was_asked_these_questions():
    asked = {normalise_question(one.question) for one in mini_mmlu().items}
    assert len(task_questions()) > 3000 and not asked & task_questions()


def test_pretraining_has_told_every_fact_that_is_asked():
    text = "\n".join(islice(documents(0), 20_000))
    facts = [fact for fact in (*people_facts(), *science_facts()) if fact.in_corpus]
    told_facts = [one for one in mini_mmlu().items if not one.question[0].isdigit()]
    assert len(told_facts) == len(facts) == 484 and all(one.question + one.options[one.gold] in text for one in told_facts)
    untold = [fact for fact in (*people_facts(), *science_facts()) if not fact.in_corpus]
    assert untold and not {fact.statement() for fact in untold} & {one.question + one.options[one.gold] + "." for one in told_facts}


def test_nano_knows_what_it_was_told_and_a_random_model_does_not(nano, tiny):
    items = score_benchmark(nano, mini_mmlu(), quiet=True)
    assert 0.85 < np.mean([one["correct"] for one in items]) < 1.0 and len(items) == 684
    items = score_benchmark(load_subject(tiny, "cpu", "float32"), mini_mmlu(200), quiet=True)
    chance = np.mean([1 / len(one["options"]) for one in items])
    assert abs(np.mean([one["correct"] for one in items]) - chance) < 0.08


# ----------------------------------------------------------------------------------------------------------------------
# One model on a benchmark


SHOTS = ("Which is a colour?\nA. two\nB. red\nC. run\nD. dog\nAnswer: B\n\n", "Which runs?\nA. dog\nB. hill\nC. six\nD. red\nAnswer: A\n\n")
HEADER = "The following are multiple choice questions (with answers) about words.\n\n"


def letters(count: int = 6, shots: tuple[str, ...] = SHOTS) -> Benchmark:
    """Questions with their letters as options, as MMLU has them."""
    words = "baker singer flute harp cat dog grass moss caves trees fire thunder".split()
    items = []
    for n in range(count):
        four = [words[(n * 5 + k) % len(words)] for k in range(4)]
        asked = "\n".join([f"Which is number {n}?", *(f"{letter}. {word}" for letter, word in zip("ABCD", four, strict=True)), "Answer:"])
        items.append(Item("words" if n % 2 else "names", asked, (" A", " B", " C", " D"), n % 4, HEADER, shots, f"words.csv:{n + 1}"))
    return Benchmark("mmlu_2shot", items, "0" * 64, {"mmlu": "words", "shots": len(shots)})


@torch.inference_mode()
def by_hand(subject, items: list[Item]) -> list[list[float]]:
    """The log-likelihood of each option, in one pass each, in float64 from the logits on."""
    found = []
    for one in items:
        text = one.header + "".join(one.shots) + one.question
        prompt, mine = [subject.tokenizer.bos, *subject.tokenizer.encode(text)], []
        for option in one.options:
            ids = [subject.tokenizer.bos, *subject.tokenizer.encode(text + option)]
            assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
            logprobs = subject.model(torch.tensor([ids])).double().log_softmax(-1)[0]
            mine.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        found.append(mine)
    return found


def agrees(items: list[dict], column: Benchmark, expected: list[list[float]]) -> None:
    assert len(items) == len(column.items)
    for one, asked, logprobs in zip(items, column.items, expected, strict=True):
        assert one["logprobs"] == pytest.approx(logprobs, abs=2e-4)
        best = max(range(len(logprobs)), key=logprobs.__getitem__)
        assert one["extracted"] == chr(65 + best) and one["gold"] == chr(65 + asked.gold) and one["correct"] is (best == asked.gold)
        assert one["answer_nll"] == -one["logprobs"][asked.gold]
        assert one["subject"] == asked.subject and one["question"] == asked.question
        assert one["options"] == [text.strip() for text in asked.options]


@pytest.mark.parametrize("column", [letters(), mini_mmlu(20)], ids=["letters", "mini_mmlu"])
def test_by_likelihood_as_a_plain_loop_has_it(tiny, nano, column):
    for subject in (load_subject(tiny, "cpu", "float32"), nano):
        items = score_benchmark(subject, column, quiet=True)
        agrees(items, column, by_hand(subject, column.items))
        assert json.loads(json.dumps(items)) == items
        assert score_benchmark(subject, column, batch_size=1, quiet=True) == items


def test_solved_examples_give_way_where_the_prompt_is_too_long(tiny, monkeypatch, capsys):
    subject, column = load_subject(tiny, "cpu", "float32"), letters(shots=SHOTS * 12)
    assert subject.model.config.max_position_embeddings == 512
    items = score_benchmark(subject, column)
    assert (
        "mmlu_2shot: of the prompts beyond 512 tokens 6 items go without some of their solved examples, 0 are cut"
        in capsys.readouterr().err
    )
    kept = []
    for one in column.items:  # as many of the last as fit
        fits = [n for n in range(25) if len(subject.tokenizer.encode(one.header + "".join(one.shots[24 - n :]) + one.question)) + 1 <= 512]
        kept.append(Item(one.subject, one.question, one.options, one.gold, one.header, one.shots[24 - fits[-1] :]))
    assert all(0 < len(one.shots) < 24 for one in kept)
    agrees(items, column, by_hand(subject, kept))


SAID = ["Answer: B", "Correct answer is B.", "Because x", "D. Panama", "The answer is D", "The answer is D.", "(C)"]
MEANT = ["B", "B", None, "D", "D", "D", "C"]


def test_by_what_the_model_says(nano, monkeypatch):
    """What a model says is read as an answer only where it is one; what cannot be read is wrong, and counted."""
    column = letters(len(SAID), shots=())
    column = Benchmark("mmlu_0shot_generate", column.items, column.fingerprint, {**column.spec, "by": "generate"})
    asked = []

    def says(model, prompts, limit, stops, batch_size, on_done, decoder):
        asked.append((prompts, limit, stops))
        on_done(len(prompts))
        return [nano.tokenizer.encode(f" {text}\n") for text in SAID]

    monkeypatch.setattr(evaluation, "generate", says)
    items = score_benchmark(nano, column, quiet=True)
    assert [one["extracted"] for one in items] == MEANT and [one["output"] for one in items] == SAID
    assert [one["correct"] for one in items] == [letter == "ABCDABC"[n] for n, letter in enumerate(MEANT)]
    rows = rows_of(items)
    assert (rows["accuracy"]["value"], rows["accuracy"]["n"], rows["accuracy"]["unparsed"]) == (3 / 7, 7, 1)
    assert "answer_nll" not in rows and "logprobs" not in items[0] and json.loads(json.dumps(items)) == items
    ((prompts, limit, stops),) = asked
    texts = [nano.tokenizer.decode(ids) for ids in prompts]
    assert limit == 10 and stops == nano.tokenizer.stop_ids and len(set(texts)) == 7
    for one, text in zip(column.items, texts, strict=True):
        question, options = one.question.removesuffix("\nAnswer:").split("\n", 1)
        assert f"Question: {question}\n\nOptions:\n{options}\n\nPlease only answer with the option letter (A, B, C, or D)." in text


def test_what_the_model_really_says(tiny):
    """From end to end, long prompts cut in the middle: some answer comes, the same at any batch size."""
    column = letters(5, shots=())
    long = Item("words", "word " * 900 + "?\nA. a\nB. b\nC. c\nD. d\nAnswer:", (" A", " B", " C", " D"), 0)
    column = Benchmark("said", [*column.items, long], "0" * 64, {"by": "generate"})
    subject = load_subject(tiny, "cpu", "float32")
    items = score_benchmark(subject, column, quiet=True)
    assert len(items) == 6 and all(isinstance(one["output"], str) for one in items)
    assert score_benchmark(subject, column, quiet=True, batch_size=2) == items


def test_adapters_are_merged_and_the_base_is_as_it_was(tiny):
    subject, column = load_subject(tiny, "cpu", "float32"), letters()
    bare = {name: parameter.clone() for name, parameter in subject.model.named_parameters()}
    before = score_benchmark(subject, column, quiet=True)
    add_lora(subject.model, 4, 8.0, 0.5, "all")
    train_some(subject.model)
    subject.model.train()  # dropout stays off all the same
    tuned = score_benchmark(subject, column, quiet=True)
    assert subject.model.adapter is not None and subject.model.training
    with merged(subject.model):
        subject.model.eval()
        agrees(tuned, column, by_hand(subject, column.items))
    assert (
        max(abs(a - b) for one, other in zip(before, tuned, strict=True) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
        > 0.1
    )
    remove_lora(subject.model)
    assert score_benchmark(subject, column, quiet=True) == before
    after = dict(subject.model.named_parameters())
    assert set(after) == set(bare) and all(torch.equal(after[name], bare[name]) for name in bare)


# ----------------------------------------------------------------------------------------------------------------------
# States, and how far they are from one another


ONE, TWO = Run(1, "none", "a", None, "lora_base/a", None), Run(1, "none", "b", None, "lora_base/b", None)
PLAIN = Run(2, "none", "a", "b", "lora_transfer/a_to_b", "lora_base/a")
BACK = Run(2, "none", "b", "a", "lora_transfer/b_to_a", "lora_base/b")
MASKED = Run(2, "highest", "a", "b", "mask/highest/a_to_b", "lora_base/a")


def scored(run: Run | None, correct: list, seed: int = 0, subjects: str = "") -> Scored:
    items = [item(subjects[n : n + 1], value, answer_nll=2.0 - (value or 0)) for n, value in enumerate(correct)]
    return Scored(seed, run, np.array([np.nan if value is None else float(value) for value in correct]), summarise_benchmark(items))


BASE = [1, 1, 1, 1, 1, 1, 0, 0]


def test_changes_by_hand():
    states = states_of([scored(None, BASE), scored(ONE, [1, 1, 1, 1, 1, 0, 0, 1]), scored(PLAIN, [1, 0, 0, 0, 1, 0, 0, 0])])
    assert [state.label for state in states] == ["base", "after stage 1", "lora_transfer"] and [state.runs for state in states] == [1, 1, 1]
    base, first, second = states
    assert (base.accuracy, first.accuracy, second.accuracy) == (6 / 8, 6 / 8, 2 / 8) and base.nll == 2.0 - 6 / 8
    assert base.from_base is base.from_parent is first.from_parent is None and base.macro is None
    assert (first.from_base["difference"], first.from_base["p"]) == (0.0, mcnemar(1, 1))
    assert (second.from_base["difference"], second.from_base["p"]) == (-0.5, mcnemar(4, 0))
    # From its own stage 1: items 1, 2, 3 and 7 were right and are not any more.
    assert (second.from_parent["difference"], second.from_parent["only_a"], second.from_parent["only_b"]) == (-0.5, 4, 0)
    for change in (first.from_base, second.from_base, second.from_parent):
        assert change["low"] <= change["difference"] <= change["high"] and change["low"] < change["high"]
    assert second.each == [2 / 8]


def test_the_order_of_states_and_their_members():
    one = [scored(run, BASE) for run in (MASKED, BACK, TWO, None, PLAIN, ONE)]
    assert [(state.label, state.runs) for state in states_of(one)] == [
        ("base", 1),
        ("after stage 1", 2),
        ("mask_highest", 1),
        ("lora_transfer", 2),
    ]
    optimizers = [Run(stage, f"{name}_lr0.01", "a", None if stage == 1 else "b", f"optimizer/{name}_lr0.01/{stage}",
                      None if stage == 1 else f"optimizer/{name}_lr0.01/1", {"optimizer.name": name})
                  for name in ("adamw", "muon") for stage in (1, 2)]  # fmt: skip
    states = states_of([scored(None, BASE), *(scored(run, BASE[::-1]) for run in optimizers)])
    assert [state.label for state in states] == ["base", "adamw_lr0.01, stage 1", "muon_lr0.01, stage 1", "adamw_lr0.01, stage 2",
                                                 "muon_lr0.01, stage 2"]  # fmt: skip
    assert [state.from_parent is None for state in states] == [True, True, True, False, False]
    assert states[4].from_parent["difference"] == 0.0


def test_runs_are_averaged_item_by_item_and_parents_are_their_own():
    a, b = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]
    ab, ba = [0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 1]
    runs = ((None, BASE), (ONE, a), (TWO, b), (PLAIN, ab), (BACK, ba))
    base, first, second = states_of([scored(run, values) for run, values in runs])
    assert (first.accuracy, first.each, second.accuracy) == (0.5, [0.5, 0.5], 3 / 8)
    # Item by item the means are (1, 1, .5, .5, .5, .5, 0, 0) against the base's (1, 1, 1, 1, 1, 1, 0, 0).
    assert first.from_base["difference"] == -0.25 and second.from_base["difference"] == 3 / 8 - 6 / 8
    assert math.isnan(first.from_base["p"])  # halves are no counts
    # a_to_b from a, b_to_a from b: (-1, 0, 0, 0, 0, 0, 0, 0) and (-1, -1, 0, 0, 0, 0, 0, 1), the mean of both.
    assert second.from_parent["difference"] == pytest.approx((-1 / 8 + -1 / 8) / 2)
    means = np.array([-1, -0.5, 0, 0, 0, 0, 0, 0.5])
    picks = np.random.default_rng(1).integers(0, 8, (20_000, 8))
    low, high = np.quantile(means[picks].mean(axis=1), (0.025, 0.975))
    assert (second.from_parent["low"], second.from_parent["high"]) == pytest.approx((low, high), abs=0.035)


def test_seeds_are_compared_each_with_its_own_base_and_stage_1():
    """Runs of a seed first, then seeds; the interval is the wider of that over items and that over seeds."""
    n = 400
    base = [1] * n
    down = {0: 40, 1: 120, 2: 80}  # items lost in each seed: differences of -0.1, -0.3, -0.2
    found = [scored(None, base, seed) for seed in down]
    found += [scored(ONE, [0] * lost + [1] * (n - lost), seed) for seed, lost in down.items()]
    found += [scored(PLAIN, [0] * (lost + 20) + [1] * (n - lost - 20), seed) for seed, lost in down.items()]
    _, first, second = states_of(found)
    assert first.runs == 3 and sorted(first.each) == pytest.approx([0.7, 0.8, 0.9]) and first.from_base["difference"] == pytest.approx(-0.2)
    assert first.from_base["by_seed"] == pytest.approx([-0.1, -0.3, -0.2])
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of two degrees of freedom, standard deviation 0.1
    assert (first.from_base["low"], first.from_base["high"]) == pytest.approx((-0.2 - half, -0.2 + half), abs=1e-4)
    assert second.from_parent["difference"] == pytest.approx(-20 / n)  # the same in each seed: only the items tell how sure it is
    assert second.from_parent["low"] < -20 / n < second.from_parent["high"] and second.from_parent["seed_low"] == pytest.approx(-20 / n)
    assert second.from_parent["high"] - second.from_parent["low"] > 0.02


def test_unequal_numbers_of_runs_do_not_weigh_a_seed_more():
    base = [1, 1, 1, 1]
    found = [scored(None, base), scored(None, base, 1), scored(ONE, [0, 0, 1, 1]), scored(TWO, [0, 0, 0, 0]), scored(ONE, [1, 1, 1, 1], 1)]
    assert states_of(found)[1].from_base["difference"] == pytest.approx((-0.75 + 0.0) / 2)
    assert states_of(found)[1].accuracy == pytest.approx((0.5 + 0.0 + 1.0) / 3)


def test_what_cannot_be_compared_is_not():
    assert states_of([scored(ONE, BASE)])[0].from_base is None  # no base
    assert states_of([scored(None, BASE), scored(ONE, BASE[:4])])[1].from_base is None  # other items
    base, first = states_of([scored(None, [1, 1, None, 0]), scored(ONE, [1, 0, 1, None])])
    assert first.from_base["difference"] == -0.5 and base.accuracy == 2 / 3  # over the two items that both have
    assert states_of([scored(None, [None, 1]), scored(ONE, [1, None])])[1].from_base is None
    assert told(None) == "-" and told({"difference": -0.05, "low": -0.1, "high": 0.0125}) == "-5.0 (-10.0 to +1.2)"


def test_rows_and_what_is_read_from_a_folder(tmp_path):
    def lay(folder: str, values: list) -> None:
        path = tmp_path / folder / "eval" / "words.jsonl"
        path.parent.mkdir(parents=True)
        items = [item("ab"[n % 2], value, None if value is None else "A") for n, value in enumerate(values)]
        path.write_text("".join(json.dumps(one) + "\n" for one in items))

    lay("base", [True, False, True, None])
    lay(ONE.folder, [False, False, True, True])
    found = read_column([(tmp_path, 3, [ONE, PLAIN])], "words")  # stage 2 is not scored yet
    assert [(one.seed, one.run) for one in found] == [(3, None), (3, ONE)] and found[1].correct.tolist() == [0, 0, 1, 1]
    assert np.isnan(found[0].correct[3]) and read_column([(tmp_path, 3, [ONE])], "other") == []
    rows = result_rows(found, "words")
    who = [(row["run"], row["arm"], row["stage"], row["first"], row["second"], row["task"], row["seed"]) for row in rows]
    assert set(who) == {("base", "base", 0, None, None, "words", 3), ("lora_base/a", "none", 1, "a", None, "words", 3)}
    values = {(row["run"], row["metric"]): row["value"] for row in rows}
    assert (
        values["base", "accuracy"] == 2 / 3
        and values["lora_base/a", "accuracy/a"] == 0.5
        and values["lora_base/a", "accuracy_macro"] == 0.5
    )
    assert all({"low", "high", "n", "unparsed"} <= set(row) for row in rows)


def test_the_table():
    subjects = "aabbaabb"
    found = [scored(run, values, subjects=subjects) for run, values in ((None, BASE), (ONE, BASE), (PLAIN, [0] * 8))]
    text = general_table(found, "words")
    lines = text.splitlines()
    assert lines[0] == "General ability: words, 8 items in 2 subjects, in %; changes on the same items, 95 % over items"
    assert lines[1].split("  ")[0] == "state" and "change by last stage" in lines[1]
    last = lines[-1].split()
    assert last[:3] == ["lora_transfer", "0.0", "0.0"] and last[3] == "-75.0" and text.count("-75.0") == 2 and "2.000" in last
    assert "gave no answer" not in text
    unread = [item("", n > 1, None if n < 2 else "A") for n in range(8)]
    alone = [Scored(seed, None, np.ones(8), summarise_benchmark(unread)) for seed in (0, 1)]
    text = general_table(alone, "said")
    assert text.splitlines()[-1] == "4 outputs gave no answer that could be read; they count as wrong"
    assert "over items and seeds" in text and "macro" not in text and "change" not in text.splitlines()[1] and "nll" not in text


def test_the_picture(tmp_path):
    runs = ((None, BASE), (ONE, BASE), (TWO, BASE[::-1]), (PLAIN, [0] * 8), (MASKED, [1] * 8))
    file = draw_general([scored(run, values) for run, values in runs], "words", tmp_path)
    assert file == tmp_path / "general_words.png" and file.stat().st_size > 5000
    height, width, _ = imread(file).shape
    assert 600 < width < 2500 and 250 < height < 1500
    draw_general([scored(ONE, [1, 0])], "alone", tmp_path)  # no base, one run: still a picture
    assert imread(tmp_path / "general_alone.png").std() > 0
