"""Decoding against transformers: the same tokens at any batch size, wherever sequences stop and slots are filled anew."""

import math
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, raw_config, tiny_model, train_some, write_folder
from transformers import LlamaForCausalLM

from kernels import decode_attention_triton
from lora import add_lora
from lora.layers import merged
from model import load_model
from model.cache import Decode, KVCache, Prefill
from model.generate import Decoder, generate, generate_and_score

generation = sys.modules["model.generate"]  # model.generate is the function
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "factor": 32.0}
SHAPES = {
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3.2": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def ragged(count=16, longest=40, seed=5):
    g = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(1, longest, (count - 1,), generator=g).tolist()]
    return [torch.randint(0, VOCABULARY, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def peer_tokens(model, prompts, new, stops):
    """transformers' greedy generate, a prompt at a time, cut at the first stop id."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=0
        )
        row = out[0, len(prompt) :].tolist()
        results.append(row[: next((i for i, token in enumerate(row) if token in stops), len(row))])
    return results


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path, shape):
    folder = write_folder(tmp_path, raw_config(**SHAPES[shape]))
    ours, theirs, prompts = load_model(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ragged()
    free = generate(ours, prompts, 24, [])
    assert all(len(ids) == 24 for ids in free)
    # Stop ids that these continuations really meet, early and late.
    stops = sorted({free[0][3], free[5][10], free[9][0]})
    expected = peer_tokens(theirs, prompts, 24, stops)
    assert len({len(ids) for ids in expected}) > 3 and [] in expected
    for batch in (1, 3, 5, 16, 64):  # fewer slots than prompts are filled again and again
        assert generate(ours, prompts, 24, set(stops), batch_size=batch) == expected


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path)


def test_edges(model):
    prompts, heard = ragged(5), []
    long = generate(model, prompts, 6, [], batch_size=2, on_done=heard.append)
    assert heard == [2, 2, 1]
    for new in (1, 2, 6):
        for batch in (1, 2, 9):
            assert generate(model, prompts, new, [], batch_size=batch) == [ids[:new] for ids in long]
    assert generate(model, prompts, 6, range(VOCABULARY), batch_size=2) == [[]] * 5  # every prompt ends at once
    assert generate(model, prompts, 0, []) == [[]] * 5 and generate(model, [], 4, []) == []
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [[1], []], 4, [])
    with pytest.raises(ValueError, match="at least one sequence"):
        generate(model, prompts, 4, [], batch_size=0)


def test_how_prompts_are_packed_changes_nothing(model, monkeypatch):
    prompts = ragged(9)
    expected = generate(model, prompts, 8, [])
    for budget in (1, 30, 70):
        monkeypatch.setitem(generation.PREFILL_TOKENS, "cpu", budget)
        assert generate(model, prompts, 8, [], batch_size=4) == expected


class FakeGraph:
    """Stands in for a CUDA graph: holds the step that it captured, which does not run then, and runs it when replayed."""

    capturing = None
    captured: list[int] = []

    def __init__(self):
        self.steps = []

    def pool(self):
        return (0, 0)

    def replay(self):
        for step in self.steps:
            step()

    @classmethod
    @contextmanager
    def capture(cls, graph, pool=None):
        cls.capturing = graph
        yield
        cls.capturing = None


@pytest.fixture
def graphs(monkeypatch):
    """Decoders on CPU go the way of CUDA: steps of the sizes in BUCKETS, captured once, and rare looks at the flags."""
    advance, init = Decoder._advance, Decoder.__init__

    def advance_or_capture(self, width, seen=None):
        if FakeGraph.capturing is None:
            return advance(self, width, seen)
        FakeGraph.capturing.steps.append(lambda: advance(self, width, seen))
        FakeGraph.captured.append(width)

    def capturing_init(self, model, slots=64):
        init(self, model, slots)
        self.captures = True

    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes = {"CUDAGraph": FakeGraph, "graph": FakeGraph.capture, "Stream": lambda: stream, "current_stream": lambda: stream}
    for name, fake in {**fakes, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Decoder, "_advance", advance_or_capture)
    monkeypatch.setattr(Decoder, "__init__", capturing_init)
    monkeypatch.setattr(generation, "BUCKETS", (1, 2, 4, 8))
    monkeypatch.setattr(FakeGraph, "captured", [])
    return FakeGraph.captured


@pytest.mark.parametrize("poll", [1, 5, 16])
def test_captured_steps_and_rare_looks_change_nothing(model, monkeypatch, request, poll):
    """Sequences that ended go on for a while, and steps compute idle slots."""
    prompts = ragged(20)
    free = generate(model, prompts, 24, [])
    stops = {free[0][3], free[5][10], free[9][0]}
    expected = generate(model, prompts, 24, stops)
    request.getfixturevalue("graphs")
    monkeypatch.setitem(generation.POLL, "cpu", poll)
    for batch in (1, 3, 8, 32):
        assert generate(model, prompts, 24, stops, batch_size=batch) == expected


def test_graphs_are_captured_once(model, graphs):
    prompts, decoder = ragged(7), Decoder(model, 6)
    add_lora(model, 4, 8)
    train_some(model)

    def output(count=7, stops=(), decoder=decoder):
        return generate(model, prompts[:count], 6, stops, decoder=decoder)

    assert output(2) == output(2, decoder=Decoder(model, 2)) and graphs[:2] == [2, 1]
    del graphs[:]
    first = output()
    assert graphs == [6, 4]  # those that were missing
    assert output() == first and graphs == [6, 4]
    del graphs[:]
    with merged(model):  # in place, but without the adapter beside the weights
        assert output() == first and graphs == [6, 4, 2, 1]
    del graphs[:]
    load = model.adapter
    add_lora(model, 4, 8)
    assert model.adapter is not load and output() != first and graphs == [6, 4, 2, 1]
    del graphs[:]
    output(stops=[first[0][2]])
    assert graphs == [6, 4, 2, 1]


def test_a_decoder_is_used_again(model):
    decoder, prompts = Decoder(model, 4), ragged(10)
    expected = generate(model, prompts, 12, [])
    assert generate(model, prompts, 12, [], decoder=decoder) == expected
    first = decoder.cache
    stop = expected[3][2]
    again = generate(model, prompts[:7], 10, [stop], decoder=decoder)  # smaller, with what the first call left behind
    assert again == generate(model, prompts[:7], 10, [stop]) and decoder.cache is first
    longer = generate(model, [prompt * 5 for prompt in prompts], 100, [], decoder=decoder)
    assert longer == generate(model, [prompt * 5 for prompt in prompts], 100, []) and decoder.cache.room > first.room
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn_like(model.model.embed_tokens.weight) * 0.3
    assert generate(model, prompts, 12, [], decoder=decoder) == generate(model, prompts, 12, []) != expected


def test_it_is_without_dropout(model):
    add_lora(model, 4, 8, dropout=0.5)
    train_some(model)
    prompts = ragged(4)
    expected = generate(model, prompts, 8, [])
    model.train()
    assert generate(model, prompts, 8, []) == expected
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers_are_scored_on_the_way(model, batch):
    prompts, answers = ragged(11), ragged(11, 30, seed=8)
    stop = generate(model, prompts, 12, [])[4][5]
    outputs, losses = generate_and_score(model, prompts, answers, 12, [stop], batch_size=batch)
    assert outputs == generate(model, prompts, 12, [stop])
    for prompt, answer, loss in zip(prompts, answers, losses, strict=True):
        ids = torch.tensor([prompt + answer])
        logp = model(ids)[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
        expected = -logp.gather(1, torch.tensor(answer)[:, None]).mean().item()
        assert math.isclose(loss, expected, rel_tol=1e-5)
    assert generate_and_score(model, prompts, answers, 0, [], batch)[1] == pytest.approx(losses, rel=1e-5)
    with pytest.raises(ValueError, match="answer of at least one token"):
        generate_and_score(model, prompts, [*answers[1:], []], 4, [])


@pytest.mark.parametrize("words", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_batch(model, monkeypatch, capsys, words):
    prompts = ragged(9)
    expected = generate(model, prompts, 8, [])
    advance = Decoder._advance

    def short_of_memory(self, width, seen=None):
        if width > 2:
            raise RuntimeError(words)
        advance(self, width, seen)

    monkeypatch.setattr(Decoder, "_advance", short_of_memory)
    decoder = Decoder(model, 8)
    assert generate(model, prompts, 8, [], decoder=decoder) == expected and decoder.slots == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in told] == [" from here on 4 sequences at a time", " from here on 2 sequences at a time"]
    monkeypatch.setattr(Decoder, "_advance", lambda *_: short_of_memory(decoder, 3))
    with pytest.raises(RuntimeError, match=words):
        generate(model, prompts, 8, [])
    assert not model.training


@pytest.mark.parametrize("kernels", ["", "triton"])
def test_prefill_and_decoding_see_what_the_whole_sees(model, monkeypatch, kernels):
    """Prompts into scattered slots, the rest of each text token by token: the states are those of one whole pass."""
    texts, kept = ragged(3, 20)[1:] + ragged(2, 25, seed=1)[1:], []
    texts = [text * 3 for text in texts]
    whole = [model.hidden(torch.tensor([text]))[0] for text in texts]
    monkeypatch.setenv("LETHE_KERNELS", kernels)
    kept = [len(text) - 4 for text in texts]
    cache = KVCache(model.config, 5, 80, torch.float32, "cpu")
    for block in cache.layers:
        block.fill_(7.0)  # what lies behind a length must not matter
    slots = [2, 0, 1]
    packed = torch.tensor([token for text in texts for token in text])
    with torch.inference_mode():
        states = model.hidden(packed, Prefill(cache, slots, [len(text) for text in texts], kept))
        for state, expected in zip(states.split([len(text) for text in texts]), whole, strict=True):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
        for step in range(4):
            cache.lengths[slots] = torch.tensor([n + step + 1 for n in kept])
            tokens = torch.zeros(3, dtype=torch.long)
            tokens[slots] = torch.tensor([text[n + step] for text, n in zip(texts, kept, strict=True)])
            states = model.hidden(tokens, Decode(cache, 3))
            for slot, expected, n in zip(slots, whole, kept, strict=True):
                torch.testing.assert_close(states[slot], expected[n + step], rtol=1e-4, atol=1e-4)


def test_triton_decodes_the_same_tokens(model, monkeypatch):
    prompts, calls = ragged(4, 12), []
    expected = generate(model, prompts, 4, [], batch_size=3)
    attend = decode_attention_triton.attend
    monkeypatch.setattr(decode_attention_triton, "attend", lambda *a: calls.append(1) or attend(*a))
    monkeypatch.setenv("LETHE_KERNELS", "triton")
    assert generate(model, prompts, 4, [], batch_size=3) == expected and calls


def test_the_likeliest_token_is_the_first_of_equals():
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 30, (50, 640), generator=g).float()  # ties in and between blocks
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert generation._likeliest(logits).tolist() == expected
    assert generation._likeliest(logits[:, :97]).tolist() == [row.index(max(row)) for row in logits[:, :97].tolist()]
