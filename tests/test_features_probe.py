"""features/probe.py: every feature against the same probe written out in float64, on dense weights; and what it leaves behind."""

import copy
import math
import random
import re
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_features_model import bits, sample_of, toy_records

from data.batching import Examples, step_indices
from data.builtin import builtin_task
from data.builtin_corpus import documents
from data.records import Record, Report, to_records
from features import probe
from features.likelihood import encode, mean_nll
from features.probe import PROBE_COLUMNS, general_records, load_retain, near_zero_share, probe_features, sharpness
from lora.drift import drift
from lora.layers import add_lora, lora_layers, lora_parameters, merge_adapter
from model.subject import Subject, load_subject
from study.errors import LetheError

RATE = 1e-2


@pytest.fixture(scope="module")
def subject(tiny) -> Subject:
    return load_subject(tiny, "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(probe, "DOCUMENTS", 5)
    monkeypatch.setattr(probe, "DRAWS", 2)


def run(subject: Subject, count: int = 14, **changes) -> dict:
    settings = {"steps": 4, "batch_size": 3, "seed": 5, "retain": load_retain(None, subject), "learning_rate": RATE, **changes}
    return probe_features(subject, sample_of(toy_records(count)), **settings)


def losses(model, pairs: list) -> list[torch.Tensor]:
    """Of each pair's answer tokens, on whole logits of one example."""
    found = []
    for prompt, answer in pairs:
        log_p = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(-log_p[range(len(answer)), answer])
    return found


@torch.no_grad()
def held_loss(model, pairs: list) -> float:
    return float(torch.cat(losses(model, pairs)).mean())


def kl(model, base, pairs: list) -> float:
    found = []
    with torch.no_grad():
        for prompt, answer in pairs:
            ids = torch.tensor([[*prompt, *answer]])
            log_p, log_p0 = (m(ids)[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, base))
            found.append(float((log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()))
    return float(np.mean(found))


def probe_in_float64(subject: Subject, retain: list, steps: int, seed: int) -> dict:
    """The probe by whole logits, plain autograd, AdamW written out, and changes of dense weights."""
    base = copy.deepcopy(subject.model).double()
    model = copy.deepcopy(subject.model)
    add_lora(model, 8, 16.0, 0.0, "all", generator=torch.Generator().manual_seed(seed))
    model.double()
    pairs = encode(subject.tokenizer, toy_records(14), 512)
    order = np.random.default_rng(seed).permutation(14)
    held, rest = [pairs[i] for i in order[:3]], [pairs[i] for i in order[3:]]
    parameters = lora_parameters(model)
    start = [p.detach().clone() for p in parameters]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    taken, norms, flat, shares = [], [], [], []
    for step in range(steps):
        loss = torch.cat(losses(model, [rest[i] for i in step_indices(11, 8, seed, step)])).mean()
        gradients = torch.autograd.grad(loss, parameters)
        taken.append(float(loss.detach()))
        flat.append(torch.cat([g.flatten() for g in gradients]))
        norms.append(float(flat[-1].norm()))
        matrices = [matrix for g in gradients for matrix in g if matrix.any()]
        near = [(matrix.abs() < 0.1 * matrix.square().mean().sqrt()).flatten() for matrix in matrices]
        shares.append(float(torch.cat(near).double().mean()))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(1.0, 1.0 / norms[-1])
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p.sub_(RATE * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    before, after = held_loss(base, held), held_loss(model, held)
    change = math.sqrt(sum(float((p.detach() - s).square().sum()) for p, s in zip(parameters, start, strict=True)))
    layers = lora_layers(model)
    dense = {name: layer.scale * layer.lora_B.detach() @ layer.lora_A.detach() for name, layer in layers.items()}
    weights = {name: layer.linear.weight.detach() for name, layer in layers.items()}
    size = math.sqrt(sum(float(w.square().sum()) for w in dense.values()) / sum(float(w.square().sum()) for w in weights.values()))
    generator, rises = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        moved = {}
        for name, layer in layers.items():
            noise = torch.randn(layer.lora_B.shape, generator=generator).double() @ layer.lora_A.detach()
            moved[name] = noise * 0.1 * weights[name].norm() / noise.norm()
        for sign in (1, -1):
            other = copy.deepcopy(base)
            for name, weight in moved.items():
                other.get_submodule(name).weight.data = weights[name] + dense[name] + sign * weight
            rises.append(held_loss(other, held) - after)
    return {
        "initial_loss": before, "final_loss": after, "loss_decay_rate": (before - after) / before,
        "loss_stability": 1 / (1 + np.std(taken)), "avg_grad_norm": np.mean(norms),
        "gradient_cosine": np.mean([float(a @ b / a.norm() / b.norm()) for a, b in zip(flat, flat[1:], strict=False)]),
        "grad_near_zero_share": np.mean(shares), "avg_param_change": change, "relative_weight_change": size,
        "landscape_sharpness": np.mean(rises), "forgetting": held_loss(model, retain) - held_loss(base, retain),
        "retain_kl": kl(model, base, retain), "probe_kl": kl(model, base, held),
    }  # fmt: skip


def test_every_feature_equals_the_probe_in_float64(subject):
    retain = encode(subject.tokenizer, general_records(subject.tokenizer), 512)
    expected = probe_in_float64(subject, retain, steps=4, seed=5)
    found = run(subject)
    assert tuple(found) == PROBE_COLUMNS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    assert expected["avg_grad_norm"] > 1  # so that it was read before clipping
    assert min(abs(expected[name]) for name in ("loss_decay_rate", "forgetting", "retain_kl", "landscape_sharpness")) > 1e-3


def test_the_model_is_the_same_to_the_bit(subject):
    before, model = bits(subject), subject.model
    for was_training in (True, False):
        model.train(was_training)
        state, random_state = torch.get_rng_state(), random.getstate()
        first = run(subject)
        assert bits(subject) == before and model.adapter is None and model.training == was_training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state) and random.getstate() == random_state
    assert run(subject) == first  # and so is the next probe
    assert run(subject, seed=6)["final_loss"] != first["final_loss"]


def test_batch_size_changes_rounding_alone(subject):
    """Steps stay of 8 examples, however few go through the model at a time."""
    first = run(subject, batch_size=1)
    for batch_size in (4, 100):
        assert run(subject, batch_size=batch_size) == pytest.approx(first, rel=2e-3, abs=2e-5)


def test_a_probe_that_diverges_has_a_reason_and_no_zeros(subject):
    before = bits(subject)
    found = run(subject, learning_rate=1e30)
    assert found.pop("initial_loss") == pytest.approx(run(subject)["initial_loss"])
    assert re.search(r"is (nan|inf) at step \d.*lower --learning_rate", found["reason"])
    assert found["reason"].endswith("no " + ", ".join(PROBE_COLUMNS[1:])) and all(found[name] is None for name in PROBE_COLUMNS[1:])
    assert bits(subject) == before and subject.model.adapter is None


def test_what_cannot_be_had_is_none(subject):
    found = run(subject, count=7)
    assert found.pop("reason") == "probe: 7 examples are too few, it needs 8" and found == dict.fromkeys(PROBE_COLUMNS)
    assert "reason" not in run(subject, count=8)
    found = run(subject, steps=1)  # one loss has no spread, one gradient no successor
    assert [name for name in PROBE_COLUMNS if found[name] is None] == ["loss_stability", "gradient_cosine"]
    assert found["reason"] == "probe: no loss_stability, gradient_cosine"
    other = load_subject("nano", "cpu")
    add_lora(other.model, 2)
    with pytest.raises(ValueError, match="merge"):
        run(other)


def test_near_zero_share_by_hand():
    # Root mean square 2: below 0.2 are three of four. A matrix of zeros (LoRA's A at the first step) does not count.
    one, zeros = torch.tensor([[0.1, -0.1], [0.0, 4.0]]), torch.zeros(30, 2)
    assert near_zero_share([one, zeros]) == 0.75
    assert near_zero_share([one, torch.ones(2, 6)]) == 3 / 16
    assert math.isnan(near_zero_share([zeros]))
    normal = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    assert near_zero_share([normal]) == pytest.approx(0.0797, abs=2e-3)


def test_sharpness_moves_every_matrix_by_a_tenth_of_its_norm(subject, monkeypatch):
    model, seen = copy.deepcopy(subject.model), []
    add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(0))

    def record(*_):
        seen.append((drift(model)["relative_frobenius"], [layer.lora_B.clone() for layer in lora_layers(model).values()]))
        return float(len(seen))

    monkeypatch.setattr(probe, "mean_nll", record)
    examples = Examples.from_pairs(encode(subject.tokenizer, toy_records(3), 512))
    assert sharpness(model, examples, 2, 0) == 2.5  # the mean of 1, 2, 3, 4: two draws of two signs
    assert [size for size, _ in seen] == pytest.approx([0.1] * 4, rel=1e-4)
    for a, b, c in zip(*(factors for _, factors in seen[:3]), strict=True):
        assert torch.equal(a, -b) and not torch.allclose(a, c)


def test_merging_the_probe_would_forget_as_much(subject):
    """The features speak of the model that training would leave: its losses are those of the merged weights."""
    retain = load_retain(None, subject)
    found, model = run(subject, retain=retain), copy.deepcopy(subject.model)
    general = mean_nll(model, retain, 2)
    add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(5))
    pairs = encode(subject.tokenizer, toy_records(14), 512)
    order = np.random.default_rng(5).permutation(14)
    probe.learn(model, Examples.from_pairs([pairs[i] for i in order[3:]]), 4, 3, 5, RATE)
    merge_adapter(model)
    assert mean_nll(model, retain, 2) - general == pytest.approx(found["forgetting"], rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The retain set


def test_the_retain_set(subject, tmp_path):
    own = general_records(subject.tokenizer)
    assert [record.answer for record in own] == list(islice(documents(probe.DOCUMENT_SEED), 5))
    assert not {record.answer for record in own} & set(islice(documents(0), 3000))  # what the built-in model was trained on
    retain = load_retain(None, subject)
    assert len(retain) == 5 and all(retain.ids(i)[0] == subject.tokenizer.bos for i in range(5)) and (retain.starts == 1).all()
    others = general_records(SimpleNamespace(fingerprint="of another tokenizer", template="plain"))
    questions = {record.prompt[-1][1] for record in others}
    assert len(questions) == len(others) > 50 and all(len(record.prompt) == 1 for record in others)
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "birds?", "answer": "old houses"}\n' * 300)
    mine = load_retain(file, subject)
    assert len(mine) == 256 and list(mine.completion(0)) == subject.tokenizer.render_answer("old houses")
    assert load_retain(None, subject).key == retain.key != mine.key
    file.write_text('{"prompt": "birds?", "answer": "' + "old houses " * 2000 + '"}\n')
    with pytest.raises(LetheError, match="no answer of the retain set fits into 512 tokens"):
        load_retain(file, subject)


def test_answers_that_contradict_the_model_cost_it_more(monkeypatch):
    """On the built-in model: word problems with their own answers against the same with the words of both shuffled."""
    monkeypatch.setattr(probe, "DOCUMENTS", 16)
    subject, report = load_subject("nano", "cpu"), Report()
    rows = random.Random(0).sample(builtin_task("mini_svamp")["train"], 30)
    records = [record for row in rows for record in to_records(row, "row", report)]
    rng = random.Random(0)

    def mixed(text: str) -> str:
        words = text.split()
        return " ".join(rng.sample(words, len(words)))

    shuffled = [Record(tuple((role, mixed(text)) for role, text in record.prompt), mixed(record.answer)) for record in records]
    retain = load_retain(None, subject)
    settings = {"steps": 12, "batch_size": 8, "seed": 0, "retain": retain, "learning_rate": 3e-3}
    sound, noise = (probe_features(subject, sample_of(part), **settings) for part in (records, shuffled))
    assert noise["initial_loss"] > 3 * sound["initial_loss"] and sound["loss_decay_rate"] > 0.5
    assert 0 < 3 * sound["forgetting"] < noise["forgetting"] and 0 < 3 * sound["retain_kl"] < noise["retain_kl"]
    assert noise["gradient_cosine"] < sound["gradient_cosine"]
