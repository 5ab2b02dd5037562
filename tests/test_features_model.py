"""features/likelihood.py and features/embedding.py: against loops over single items in float64, and values worked out by hand."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.records import Record
from features import likelihood, probe
from features.dataset import Sample
from features.embedding import EMBEDDING_COLUMNS, embed, embedding_features, outliers, pair_cosines
from features.likelihood import LIKELIHOOD_COLUMNS, content_of, encode, likelihood_features, token_nll
from model.subject import Subject, load_subject
from model.tokenizer import load_tokenizer

WORDS = "the river runs past old houses , and nobody counts how many birds sit there on cold mornings".split()


def sample_of(records: list[Record]) -> Sample:
    return Sample("toy", Path("toy.jsonl"), records, len(records), 0, 0, "")


def toy_records(count: int = 14, seed: int = 0) -> list[Record]:
    """Ragged questions and answers; one with earlier turns."""
    rng = np.random.default_rng(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    records = [Record((("user", text(25)),), text(12)) for _ in range(count)]
    turns = (("system", text(6)), ("user", text(9)), ("assistant", text(4)), ("user", text(9)))
    return [*records[:-1], Record(turns, text(12))]


@pytest.fixture(scope="module")
def subject(tiny) -> Subject:
    return load_subject(tiny, "cpu")


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr(probe, "DOCUMENTS", 6)


def bits(subject: Subject) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in subject.model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Likelihood


@torch.no_grad()
def losses_in_float64(subject: Subject, prompt: list[int], answer: list[int]) -> np.ndarray:
    """-log p of each answer token, from whole logits of one example."""
    model = copy.deepcopy(subject.model).double()
    log_p = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return np.array([-float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)])


def test_likelihood_equals_a_loop_in_float64(subject):
    records, tokenizer = toy_records(), subject.tokenizer
    given, bare, asked = [], [], []
    for record in records:
        answer, prompt = tokenizer.render_answer(record.answer), tokenizer.render_prompt(record.prompt)
        given.append(losses_in_float64(subject, prompt, answer))
        bare.append(losses_in_float64(subject, [tokenizer.bos, *tokenizer.encode("Input: \nOutput:")], answer))
        # The plain template's own tokens: the begin, "Input" and ":" (not before a system turn), then these three.
        assert [tokenizer.token_text(token) for token in prompt[-3:]] == ["\n", "Output", ":"]
        start = 1 if record.prompt[0][0] == "system" else 3
        asked.append(losses_in_float64(subject, prompt[:1], prompt[1:-3])[start - 1 :])
    items = np.exp([loss.mean() for loss in given])
    ratios = [math.exp(a.mean() - b.mean()) for a, b in zip(given, bare, strict=True)]
    found = likelihood_features(subject, sample_of(records), 4)
    assert tuple(found) == LIKELIHOOD_COLUMNS
    assert found == pytest.approx({
        "answer_perplexity": np.exp(np.concatenate(given).mean()), "base_model_perplexity": items.mean(),
        "base_perplexity_std": items.std(), "unconditional_perplexity": np.exp(np.concatenate(bare).mean()),
        "ifd": np.mean(ratios), "prompt_perplexity": np.exp(np.concatenate(asked).mean()),
    }, rel=2e-4)  # fmt: skip
    assert len({round(value, 3) for value in found.values()}) == len(found)


def test_a_model_that_guesses_has_the_vocabularys_perplexity(tiny):
    """All logits equal: every token is one of 2048, with its question and without."""
    subject = load_subject(tiny, "cpu")
    subject.model.model.embed_tokens.weight.data.zero_()
    found = likelihood_features(subject, sample_of(toy_records(5)), 2)
    expected = dict.fromkeys(LIKELIHOOD_COLUMNS, 2048.0) | {"base_perplexity_std": 0.0, "ifd": 1.0}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-2)


def test_an_answer_that_does_not_fit_is_counted_and_left_out(subject, monkeypatch):
    short, long = toy_records(6), Record((("user", "why"),), "words " * 80)
    expected = likelihood_features(subject, sample_of(short), 3)
    monkeypatch.setattr(likelihood, "LONGEST", 80)
    found = likelihood_features(subject, sample_of([long, *short, long]), 3)
    assert found.pop("reason") == "likelihood: 2 of 8 answers do not fit into 80 tokens"
    assert found == pytest.approx(expected, rel=1e-5)
    found = likelihood_features(subject, sample_of([long]), 3)
    assert found == dict.fromkeys(LIKELIHOOD_COLUMNS) | {"reason": "likelihood: 1 of 1 answers do not fit into 80 tokens"}


def test_losses_that_are_not_finite_are_none(tiny):
    subject = load_subject(tiny, "cpu")
    subject.model.model.norm.weight.data.fill_(math.nan)
    found = likelihood_features(subject, sample_of(toy_records(3)), 2)
    assert all(found[name] is None for name in LIKELIHOOD_COLUMNS) and "no answer_perplexity, base_model_perplexity" in found["reason"]
    found = embedding_features(subject, sample_of(toy_records(12)), 2)
    assert all(found[name] is None for name in EMBEDDING_COLUMNS) and "no io_similarity" in found["reason"]


@pytest.mark.parametrize("template", ["plain", "llama3", "llama3-bare"])
def test_what_a_prompt_says_is_told_from_its_template(tiny, template):
    tokenizer = load_tokenizer(tiny, template)
    frame = tokenizer.render_prompt((("user", ""),))
    prompt = tokenizer.render_prompt((("user", "How many birds sit there?"),))
    part = content_of(prompt, frame)
    assert tokenizer.decode(prompt[1:][part], skip_special=False).strip() == "How many birds sit there?"
    assert content_of(frame, frame) == slice(len(frame) - 1, len(frame) - 1)


def test_what_a_prompt_says_in_the_released_template(real_data):
    tokenizer = load_tokenizer(real_data / "llama-3.2-1b-instruct")
    frame, text = tokenizer.render_prompt((("user", ""),)), "\n\nWhy?  Because…\n"
    prompt = tokenizer.render_prompt((("user", text),))
    assert tokenizer.template == "llama3" and len(frame) > 30
    assert tokenizer.decode(prompt[1:][content_of(prompt, frame)], skip_special=False) == text.strip()


def test_encode(subject):
    tokenizer = subject.tokenizer
    question = Record((("user", "how many birds " * 30),), "many birds")
    (prompt, answer), (begin, text) = encode(tokenizer, [question, Record((), "cold mornings")], 40)
    whole = tokenizer.render_prompt(question.prompt)
    assert answer == tokenizer.render_answer("many birds") and len(prompt) + len(answer) == 40
    assert prompt[:10] == whole[:10] and prompt[-10:] == whole[-10:]  # it has lost its middle
    # A document is continued from the begin token, as in pretraining, and ends.
    assert begin == [tokenizer.bos] and text == [*tokenizer.encode("cold mornings"), tokenizer.end_id]
    assert encode(tokenizer, [Record((), "cold mornings " * 40)], 20)[0][1] == tokenizer.encode("cold mornings " * 40)[:19]


def test_neither_batch_size_nor_a_second_run_changes_the_values_or_the_model(subject):
    before, sample = bits(subject), sample_of(toy_records())
    for features in (likelihood_features, embedding_features):
        for was_training in (True, False):
            subject.model.train(was_training)
            first = features(subject, sample, 1)
            assert subject.model.training == was_training
        assert features(subject, sample, 1) == first
        for batch_size in (3, 64):
            assert features(subject, sample, batch_size) == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert bits(subject) == before and subject.model.adapter is None


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


@torch.no_grad()
def states_in_float64(subject: Subject, text: str) -> np.ndarray:
    """(tokens, H) of one text behind the begin token, which is left out."""
    model, ids = copy.deepcopy(subject.model).double(), subject.tokenizer.encode(text)
    return model.hidden(torch.tensor([[subject.tokenizer.bos, *ids]]))[0, 1:].numpy()


def test_embedding_features_equal_a_loop_in_float64(subject):
    general = np.array([states_in_float64(subject, record.answer).mean(0) for record in probe.general_records(subject.tokenizer)])
    assert len(general) == 6
    records, questions, answers, items = toy_records(), [], [], []
    records[3] = Record((("user", "birds birds birds"),), "birds")  # unlike the others
    for record in records:
        asked = states_in_float64(subject, "\n".join(content for _, content in record.prompt))
        said = states_in_float64(subject, record.answer)
        pooled = [asked.mean(0), said.mean(0), np.concatenate([asked, said]).mean(0)]
        for into, mean in zip((questions, answers, items), pooled, strict=True):
            into.append((mean - general.mean(0)) / general.std(0))
    cosine = lambda a, b: float(a @ b / np.sqrt((a @ a) * (b @ b)))  # noqa: E731
    pairs = [cosine(a, b) for i, a in enumerate(items) for b in items[:i]]
    distances = [math.dist(item, np.mean(items, axis=0)) for item in items]
    limit = np.median(distances) + 3.5 * 1.4826 * np.median([abs(d - np.median(distances)) for d in distances])
    found = embedding_features(subject, sample_of(records), 4)
    assert tuple(found) == EMBEDDING_COLUMNS
    assert found == pytest.approx({
        "io_similarity": np.mean([cosine(a, b) for a, b in zip(questions, answers, strict=True)]), "semantic_diversity": 1 - np.mean(pairs),
        "similarity_std": np.std(pairs), "embedding_outlier_ratio": np.mean([d > limit for d in distances]),
    }, rel=1e-3, abs=1e-5)  # fmt: skip
    assert found["embedding_outlier_ratio"] > 0


def test_an_answer_that_repeats_its_question_is_the_same_text(subject):
    records = [Record((("user", text),), text) for text in ("old houses", "the river runs", "nobody counts birds")]
    assert embedding_features(subject, sample_of(records), 2)["io_similarity"] == pytest.approx(1)


def test_too_few_items(subject):
    records = toy_records(12)
    for count, missing in ((1, EMBEDDING_COLUMNS[1:]), (2, EMBEDDING_COLUMNS[2:]), (9, EMBEDDING_COLUMNS[3:])):
        found = embedding_features(subject, sample_of(records[:count]), 4)
        assert [name for name in EMBEDDING_COLUMNS if found[name] is None] == list(missing)
        assert found["reason"].startswith(f"embedding: {count} items are too few") and found["reason"].endswith(f"no {', '.join(missing)}")
    assert "reason" not in embedding_features(subject, sample_of(records[:10]), 4)


def test_a_text_without_a_token_has_no_embedding(subject):
    records = toy_records(12)
    with_empty = [Record((("user", " "),), "birds"), *records]
    questions, answers, items = embed(subject.model, subject.tokenizer, with_empty, 5)
    assert np.isnan(questions[0]).all() and np.isfinite(questions[1:]).all() and items[0] == pytest.approx(answers[0])
    found, expected = (embedding_features(subject, sample_of(part), 5) for part in (with_empty, records))
    assert found["io_similarity"] == pytest.approx(expected["io_similarity"], rel=1e-5)


def test_pair_cosines_by_hand():
    # Cosines: 0 of the first two, 1/sqrt(2) of either with the third; lengths do not matter.
    mean, deviation = pair_cosines(np.array([[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]]))
    assert mean == pytest.approx(math.sqrt(2) / 3) and deviation == pytest.approx(1 / 3)
    assert pair_cosines(np.array([[1.0, 0.0], [-4.0, 0.0]])) == pytest.approx((-1, 0))
    assert pair_cosines(np.ones((50, 3))) == pytest.approx((1, 0), abs=1e-6)


def test_outliers_by_hand():
    # On a line, symmetric about 0. Distances 0, then 1 to 5 and 13 twice each: median 3, MAD 2, limit 3 + 3.5 * 1.4826 * 2 = 13.38.
    line = np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 13, -13], dtype=np.float64)[:, None]
    assert not outliers(line).any()
    line[-2:] = [[13.5], [-13.5]]
    assert outliers(line).tolist() == [False] * 11 + [True] * 2
    # Copies have a MAD of 0: rounding makes none of them an outlier, another text is one.
    copies = np.ones((20, 4)) + np.random.default_rng(0).normal(0, 1e-7, (20, 4))
    assert not outliers(copies).any()
    copies[7] += 1
    assert outliers(copies).tolist() == [i == 7 for i in range(20)]


def test_losses_lie_where_they_belong(subject):
    """token_nll packs the longest first; each example's losses come back at its place."""
    from data.batching import Examples

    pairs = encode(subject.tokenizer, toy_records(), 512)
    found = token_nll(subject.model, Examples.from_pairs(pairs), 3)
    for nll, (prompt, answer) in zip(found, pairs, strict=True):
        assert nll == pytest.approx(losses_in_float64(subject, prompt, answer), rel=1e-3, abs=1e-4)


def test_the_page_tells_every_column():
    from features.__main__ import COLUMNS
    from features.table import FIRST, LAST

    page = (Path(__file__).parent.parent / "features" / "README.md").read_text(encoding="utf-8")
    table = page.split("## The columns")[1].split("\n**The retain set**")[0]
    named = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert named == {*FIRST, *COLUMNS, *LAST}
