"""The likelihoods of options against whole sequences read one by one, and that no token is computed twice."""

import sys

import pytest
import torch
from tiny import VOCABULARY, raw_config, tiny_model, train_some, write_folder

from kernels import token_stats
from lora import add_lora
from lora.layers import merged
from model import Llama, load_model
from model.choices import Likelihood, Question, predict, score_options
from model.offload import Layout, stream_layers
from model.quantized import base_size

choices = sys.modules["model.choices"]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "factor": 8.0}
SHAPES = {
    "grouped": {},
    "each head its own": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def some_questions() -> list[Question]:
    """Groups that share 40 tokens, 1 and none, and questions alone; options of one token, of many, some the beginning of others."""
    g = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    start, tree = ids(40, 41), [[5, 6, 7], [5, 6], [5, 6, 8, 9], [5], [6, 6, 7]]
    found = [Question(start + ids(1, 12), [*tree, ids(1, 2), ids(4, 5)], "shares") for _ in range(7)]
    found.append(Question(start, [[1], [2]], "shares"))  # all of it is the others' beginning
    found += [Question([3] + ids(2, 9), [[letter] for letter in (10, 11, 12, 13)], "letters") for _ in range(40)]
    found += [Question([k] + ids(2, 9), [ids(1, 5), ids(1, 5)], "nothing shared") for k in (1, 2)]
    found += [Question(ids(12, 13), [ids(3, 4)], "alone"), Question([7], [[1], [2, 3]], "one token")]
    return [found[i] for i in torch.randperm(len(found), generator=g).tolist()]


@torch.no_grad()
def one_by_one(model, question: Question) -> list[tuple[float, bool]]:
    """Whole sequences through the plain model, log_softmax in float64."""
    found = []
    for option in question.options:
        ids = torch.tensor([question.prompt + option]).to(model.device)
        logits = model(ids)
        logits = (logits if isinstance(logits, torch.Tensor) else logits.logits)[0, len(question.prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        found.append((logprobs[range(len(option)), option].sum().item(), logits.argmax(-1).tolist() == option))
    return found


def difference(found: list[list[Likelihood]], expected: list[list[tuple[float, bool]]]) -> float:
    pairs = [(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert [a.greedy for a, _ in pairs] == [b[1] for _, b in pairs]
    return max(abs(a.logprob - b[0]) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_whole_sequences_one_by_one(tmp_path, monkeypatch, shape):
    model, questions = tiny_model(tmp_path, **SHAPES[shape]), some_questions()
    likeliest = [model(torch.tensor([q.prompt]))[0, -1].argmax().item() for q in questions]  # so that some options are greedy
    questions = [Question(q.prompt, [*q.options, [top]], q.group) for q, top in zip(questions, likeliest, strict=True)]
    expected = [one_by_one(model, question) for question in questions]
    assert len({hit for row in expected for _, hit in row}) == 2
    for micro_tokens, worth in ((None, 1), (None, 128), (1, 1), (37, 10**9), (200, 1)):  # how they are cut into passes changes nothing
        monkeypatch.setitem(choices.WORTH, "cpu", worth)
        assert difference(score_options(model, questions, micro_tokens=micro_tokens), expected) < 2e-5


def test_equal_to_transformers(tmp_path):
    from transformers import LlamaForCausalLM

    folder = write_folder(tmp_path, raw_config(rope_scaling=LLAMA3))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = some_questions()
    assert difference(score_options(load_model(folder), questions), [one_by_one(theirs, question) for question in questions]) < 2e-5


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


@pytest.fixture
def passes(monkeypatch):
    """(tokens, states asked for) of each pass through the model."""
    seen, hidden = [], Llama.hidden

    def counted(self, ids, sight=None, rows=None, row_keys=None):
        seen.append((ids.numel(), len(rows)))
        return hidden(self, ids, sight, rows, row_keys)

    monkeypatch.setattr(Llama, "hidden", counted)
    return seen


def test_no_token_is_computed_twice(model, passes):
    start = list(range(40))
    questions = [Question([*start, k, 50], [[60, 61, 62], [60, 61], [60, 61, 63, 64], [70], [71]], "x") for k in range(10)]
    score_options(model, questions)
    # 40 shared; of each question two of the prompt, and 60, 61 and 63, which predict 61, then 62 and 63, then 64.
    assert passes == [(40, 1), (10 * (2 + 3), 10 * (1 + 3))]
    passes.clear()
    score_options(model, [Question([*start, k, 50], [[60], [61], [62]], "x") for k in range(10)])
    assert passes == [(40, 1), (20, 10)]  # letters add nothing, and one state answers for them all
    passes.clear()
    score_options(model, [Question([*start, 41], [[1]], "x"), Question([*range(5)], [[1]], "y"), Question([3, 4], [[1]], "z")])
    assert passes == [(41 + 5 + 2, 3)]  # nothing to share: all in one pass
    passes.clear()
    score_options(model, [Question([1, 2, k], [[1]], "x") for k in range(3)])
    assert passes == [(9, 3)]  # so little is shared that a pass for it costs more


def test_passes_are_as_large_as_allowed(model, passes, monkeypatch):
    questions = [Question([k, *range(10 + k % 5)], [[1], [2]], str(k)) for k in range(30)]
    for allowed in (1, 40, 100, 4096):
        passes.clear()
        score_options(model, questions, micro_tokens=allowed)
        assert sum(tokens for tokens, _ in passes) == sum(len(q.prompt) for q in questions)
        assert all(tokens <= max(allowed, 15) for tokens, _ in passes)
        assert len(passes) == {1: 30, 40: 12, 100: 5, 4096: 1}[allowed]  # padding counts: 2 of 15, 3 of 13 or less …
    passes.clear()
    monkeypatch.setattr(choices, "SCORES", 30)  # 4 heads x 15 places = 60 scores a token: it counts as two
    score_options(model, questions, micro_tokens=100)
    assert passes[0] == (45, 3)
    monkeypatch.setattr(choices, "SCORES", 1 << 30)
    shared = [Question([*range(90), k % 90, k // 90], [[1], [2]], "x") for k in range(1000)]
    passes.clear()
    score_options(model, shared, micro_tokens=1000)
    # 92 places x 2 heads x 16 = 46 hidden sizes of keys in each row: these fill memory sooner than 2 tokens do.
    assert passes[0] == (90, 1) and passes[1] == (2 * 87, 87) and 87 == 1000 * 4 // 46 + 1


def test_goes_on_with_less_when_memory_runs_out(model, monkeypatch, capsys):
    questions, whole, sizes = some_questions(), Llama.hidden, []
    expected = score_options(model, questions)

    def short(self, ids, *more):
        sizes.append(len(ids))
        if len(ids) > 60:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return whole(self, ids, *more)

    monkeypatch.setattr(Llama, "hidden", short)
    done = []
    found = score_options(model, questions, on_done=done.append)
    flat = [(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert max(abs(a.logprob - b.logprob) for a, b in flat) < 2e-5 and sum(done) == len(questions)
    told = capsys.readouterr().err
    assert "out of memory while scoring options: from here on" in told and 1 <= told.count("\n") < 6
    assert max(sizes[-10:]) <= 60  # it does not try too much again
    monkeypatch.setattr(Llama, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        score_options(model, questions)
    monkeypatch.setattr(Llama, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        score_options(model, questions)


def test_adapters_beside_the_weights_and_merged(model):
    questions = some_questions()
    bare = score_options(model, questions)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, 4, 8.0, dropout=0.5)
    train_some(model)
    expected = [one_by_one(model.eval(), question) for question in questions]
    model.train()  # dropout is off all the same, and on again afterwards
    assert difference(score_options(model, questions), expected) < 2e-5 and model.training and model.adapter.drops
    assert abs(expected[0][0][0] - bare[0][0].logprob) > 1e-2  # the adapter changes something
    with merged(model):
        assert difference(score_options(model, questions), expected) < 1e-4
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["int8", "streamed"])
def test_quantised_and_streamed_bases(tmp_path, kind):
    folder = write_folder(tmp_path / "base", raw_config(num_hidden_layers=6))
    model = load_model(folder, quantize="int8" if kind == "int8" else "none")
    questions = some_questions()
    expected = [one_by_one(model, question) for question in questions]
    if kind == "streamed":
        stream_layers(model, "cpu", base_size(model)[1] - 2 * Layout.of(model.model.layers[0]).size)
        assert model.stream is not None
    assert difference(score_options(model, questions), expected) < 2e-5


def errors(found, expected) -> torch.Tensor:
    """Of each option's log-probability, for each of its tokens."""
    flat = [(a[0], b[0]) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return torch.tensor([abs(a - b) for a, b in flat])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_as_exact_as_it_can_be(tmp_path, device):
    folder = write_folder(tmp_path, dtype=torch.bfloat16)  # weights that both types hold exactly
    questions = some_questions()
    exact = [one_by_one(load_model(folder, torch.float32), question) for question in questions]
    model = load_model(folder, torch.bfloat16, device)
    found, plain = score_options(model, questions), [one_by_one(model, question) for question in questions]
    assert 1e-4 < errors(plain, exact).mean()
    assert errors(found, exact).mean() < 1.2 * errors(plain, exact).mean() and errors(found, exact).max() < 2 * errors(plain, exact).max()


def test_predict_walks_the_states_in_blocks(monkeypatch):
    states, head = torch.randn(50, 16), torch.randn(203, 16)
    sources, targets = torch.randint(0, 50, (300,)), torch.randint(0, 203, (300,))
    targets[:40] = (states[sources[:40]] @ head.T).argmax(-1)
    truth = token_stats(states[sources], head, targets)
    for held in (choices.LOGITS["cpu"], 203 * 7, 1):
        monkeypatch.setitem(choices.LOGITS, "cpu", held)
        logprobs, hits = predict(states, head, sources, targets)
        assert (logprobs + truth.nll).abs().max() < 1e-5 and logprobs.max() <= 0
        assert torch.equal(hits, truth.hit) and 40 <= hits.sum() < 60


def test_options_of_one_place_differ_exactly_in_bfloat16():
    states, head = torch.randn(50, 16).bfloat16(), torch.randn(203, 16).bfloat16()
    logprobs, _ = predict(states, head, torch.arange(50).repeat_interleave(4), torch.tensor([3, 5, 7, 11]).repeat(50))
    exact = (states.double() @ head.double().T).log_softmax(-1)[:, [3, 5, 7, 11]]
    found = logprobs.double().view(50, 4)
    assert ((found - found[:, :1]) - (exact - exact[:, :1])).abs().max() < 1e-5  # rounded logits would be 1e-2 off
    assert (found - exact).abs().max() < 0.1


def test_what_cannot_be_scored(model):
    assert score_options(model, []) == []
    for bad in (Question([], [[1]]), Question([1], []), Question([1], [[1], []])):
        with pytest.raises(ValueError, match="question 1: prompt, options and each option need"):
            score_options(model, [Question([1], [[1]]), bad])
