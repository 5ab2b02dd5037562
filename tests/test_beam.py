"""Beam search against transformers': the same tokens for the same weights, wherever beams end, at any batch size."""

import random
import sys

import pytest
import torch
from test_generate import model, ragged  # noqa: F401  a fixture
from tiny import VOCABULARY, tiny_model, train_some, write_folder
from transformers import LlamaForCausalLM

from lora import add_lora
from lora.layers import merged
from model import load_model, load_tokenizer
from model.beam import beam_search, places_of
from model.cache import KVCache
from model.checkpoint import NANO
from model.generate import generate

beams = sys.modules["model.beam"]
GROWTH = ({"num_beams": 5, "no_repeat_ngram_size": 3}, {"num_beams": 3, "length_penalty": 0.8},
          {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2})  # fmt: skip
OTHERS = ({"num_beams": 2, "early_stopping": True, "repetition_penalty": 1.3}, {"num_beams": 3, "length_penalty": -1.0},
          {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"}, {"num_beams": 3, "length_penalty": 0.0})  # fmt: skip


def short(settings: dict) -> str:
    return "-".join(f"{name[:3]}{value}" for name, value in settings.items())


@torch.no_grad()
def peer_beams(peer, prompts, new, stops, pad, batch=1, **settings):
    """transformers' beam search, padded on the left where it takes several prompts, cut at the first stop id."""
    results = []
    for at in range(0, len(prompts), batch):
        chunk = prompts[at : at + batch]
        longest = max(map(len, chunk))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in chunk])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in chunk])
        more = {"max_new_tokens": new, "do_sample": False, "eos_token_id": stops or None, "pad_token_id": pad, **settings}
        for row in peer.generate(ids, attention_mask=mask, **more)[:, longest:].tolist():
            results.append(row[: next((i for i, token in enumerate(row) if token in (stops or [pad])), len(row))])
    return results


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(ours, theirs, 50 ragged prompts without the last two ids, which are stop ids and padding)."""
    folder = write_folder(tmp_path_factory.mktemp("toy"))
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCABULARY - 2, (n,), generator=g).tolist() for n in torch.randint(1, 40, (50,), generator=g).tolist()]
    return load_model(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts


@pytest.mark.parametrize("settings", [*GROWTH, *OTHERS], ids=short)
def test_the_toy_model_on_50_prompts(toy, settings):
    ours, theirs, prompts = toy
    stops, new = [VOCABULARY - 2, VOCABULARY - 1], 12
    expected = peer_beams(theirs, prompts, new, stops, stops[1], **settings)
    assert len({len(ids) for ids in expected}) > 3 or settings.get("length_penalty") == 2
    assert expected != generate(ours, prompts, new, stops)
    assert beam_search(ours, prompts, new, stops, **settings) == expected
    assert peer_beams(theirs, prompts, new, stops, stops[1], batch=10, **settings) == expected


@pytest.fixture(scope="module")
def nano():
    """(ours, theirs, 50 prompts: words of the built-in tasks, cut anywhere; the stop ids)."""
    from data.folder import find_task

    tokenizer, rng = load_tokenizer("nano"), random.Random(0)
    records = [record for name in ("mini_svamp", "mini_simpleqa") for record in find_task(name).test[:25]]
    prompts = [tokenizer.render_prompt(record.prompt) for record in records]
    prompts = [ids if rng.random() < 0.5 else ids[: rng.randint(1, len(ids))] for ids in prompts]
    return load_model("nano"), LlamaForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval(), prompts, sorted(tokenizer.stop_ids)


@pytest.mark.parametrize("settings", GROWTH, ids=short)
def test_the_built_in_model_on_50_prompts(nano, settings):
    ours, theirs, prompts, stops = nano
    expected = peer_beams(theirs, prompts, 8, stops, stops[0], **settings)
    assert beam_search(ours, prompts, 8, stops, **settings) == expected
    longer = beam_search(ours, prompts, 24, stops, **settings)
    assert longer == peer_beams(theirs, prompts, 24, stops, stops[0], batch=25, **settings) != expected
    assert len({len(ids) for ids in longer}) > 5


@pytest.mark.parametrize("settings", [GROWTH[2], OTHERS[0]], ids=short)
def test_batch_size_order_and_rare_looks_change_nothing(toy, monkeypatch, settings):
    ours, _, prompts = toy
    stops = [3, 9, 27, VOCABULARY - 1]
    expected = beam_search(ours, prompts, 20, stops, **settings)
    assert len({len(ids) for ids in expected}) > 8
    for batch, poll in ((9, 1), (1, 7), (37, 7), (400, 7)):
        monkeypatch.setitem(beams.POLL, "cpu", poll)
        assert beam_search(ours, prompts, 20, stops, batch_size=batch, **settings) == expected
    monkeypatch.setitem(beams.PREFILL_TOKENS, "cpu", 30)
    assert beam_search(ours, prompts[::-1], 20, stops, batch_size=24, **settings)[::-1] == expected


def test_rows_that_wait_idle_at_their_limit_harm_nobody(toy, monkeypatch):
    ours, _, prompts = toy
    prompts, stops = [ids[:12] for ids in prompts + prompts[::-1]], range(0, VOCABULARY, 4)
    settings, extend, idle = {"num_beams": 2, "early_stopping": True}, beams.Search._extend, []
    expected = beam_search(ours, prompts, 10, stops, batch_size=2, **settings)

    def watched(self, rows, *more):
        idle.append(int((self.counts[rows] == self.limit).sum()))
        extend(self, rows, *more)

    monkeypatch.setattr(beams.Search, "_extend", watched)
    monkeypatch.setitem(beams.REFILL, "cpu", 2)
    assert beam_search(ours, prompts, 10, stops, batch_size=20, **settings) == expected and sum(idle)


def test_the_way_of_cuda_copies_beams_that_stay_to_themselves(toy, monkeypatch):
    """On CUDA the host does not ask which beams moved: all are copied."""
    ours, _, prompts = toy
    expected, seen, move = beam_search(ours, prompts[:20], 12, [], num_beams=3), [], KVCache.move

    def all_of_them(self, sources, targets, places=None):
        if isinstance(places, torch.Tensor):
            seen.append(len(sources))
            assert not set(sources.tolist()) & set(targets.tolist())  # no slot is both
            still = torch.tensor([slot for slot in range(len(self.lengths)) if slot not in targets.tolist()], dtype=torch.long)
            room = places[:1].expand(len(still), -1) if len(places) else places.new_zeros(len(still), 0)
            sources, targets, places = torch.cat([sources, still]), torch.cat([targets, still]), torch.cat([places, room])
        move(self, sources, targets, places)

    monkeypatch.setattr(KVCache, "move", all_of_them)
    assert beam_search(ours, prompts[:20], 12, [], num_beams=3) == expected and any(seen)


def test_beams_take_places_of_dead_ones():
    for N in (2, 3, 5):
        parents = torch.cartesian_prod(*[torch.arange(N)] * N)  # all there are
        for row, places in zip(parents.tolist(), places_of(parents).tolist(), strict=True):
            assert sorted(places) == list(range(N))
            assert all(places[i] == p for i, p in enumerate(row) if p not in row[:i])  # a first child stays
            assert all(places[i] not in row for i, p in enumerate(row) if p in row[:i])


def test_the_best_of_all_sequences(model):  # noqa: F811
    """With as many beams as there are sequences the search is exhaustive: against all sequences of two tokens, in float64."""
    prompt, stops = [5, 17, 40], [8]
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].double().log_softmax(-1)
        second = model(torch.tensor([[*prompt, t] for t in range(VOCABULARY)]))[:, -1].double().log_softmax(-1)
    for penalty in (0.0, 1.0, 3.0):
        worth = {(stops[0],): float(first[stops[0]])}
        whole = (first[:, None] + second) / 2**penalty
        worth |= {(a, b): float(whole[a, b]) for a in range(VOCABULARY) for b in range(VOCABULARY) if a != stops[0]}
        best = [token for token in max(worth, key=worth.__getitem__) if token not in stops]
        assert beam_search(model, [prompt], 2, stops, num_beams=VOCABULARY - 1, length_penalty=penalty, early_stopping="never") == [best]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_n_gram_comes_twice(model, size):  # noqa: F811
    prompts = [ids[:20] for ids in ragged(12)]
    for prompt, ids in zip(prompts, beam_search(model, prompts, 20, [], num_beams=3, no_repeat_ngram_size=size), strict=True):
        whole = prompt + ids
        grams = [tuple(whole[i : i + size]) for i in range(len(whole) - size + 1)]
        new = grams[max(0, len(prompt) - size + 1) :]
        assert len(ids) == 20 and len(set(new)) == len(new) and not set(new) & set(grams[: len(grams) - len(new)])


def test_edges(model):  # noqa: F811
    prompts, heard = ragged(7), []
    model.train()
    assert len(beam_search(model, prompts, 6, [3], num_beams=2, batch_size=4, on_done=heard.append)) == 7
    assert sum(heard) == 7 and len(heard) > 1 and model.training
    assert beam_search(model, prompts, 0, [], num_beams=2) == [[]] * 7 and beam_search(model, [], 4, [], num_beams=2) == []
    assert all(len(ids) <= 1 for ids in beam_search(model, prompts, 1, [3], num_beams=4))
    assert beam_search(model, prompts, 9, range(VOCABULARY), num_beams=2, length_penalty=0.0) == [[]] * 7
    for words, settings in {
        "num_beams is at least 2": {"num_beams": 1}, "above 0": {"num_beams": 2, "repetition_penalty": 0.0},
        "at least 0": {"num_beams": 2, "no_repeat_ngram_size": -1}, "'never', not 'always'": {"num_beams": 2, "early_stopping": "always"},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            beam_search(model, prompts, 4, [], **settings)
    with pytest.raises(ValueError, match="prompt is empty"):
        beam_search(model, [[1], []], 4, [], num_beams=2)


def test_adapters_and_bfloat16(tmp_path):
    model, prompts = tiny_model(tmp_path), ragged(10)  # noqa: F811
    plain = beam_search(model, prompts, 10, [], num_beams=3)
    add_lora(model, rank=4, alpha=8.0, dropout=0.5, targets="all")
    train_some(model)
    beside = beam_search(model, prompts, 10, [], num_beams=3)
    with merged(model):
        assert beam_search(model, prompts, 10, [], num_beams=3) == beside != plain
    half = load_model(tmp_path, torch.bfloat16)
    found = beam_search(half, prompts, 10, [], num_beams=3)
    assert all(len(ids) == 10 for ids in found) and sum(a[:2] == b[:2] for a, b in zip(found, plain, strict=True)) >= 5


def test_less_memory_changes_nothing(model, monkeypatch, capsys):  # noqa: F811
    prompts = ragged(9)
    expected, step = beam_search(model, prompts, 8, [], num_beams=2), beams.Search._step

    def short_of_memory(self, width, longest, most):
        if width > 2:
            raise RuntimeError("out of memory")
        step(self, width, longest, most)

    monkeypatch.setattr(beams.Search, "_step", short_of_memory)
    assert beam_search(model, prompts, 8, [], num_beams=2, batch_size=16) == expected
    assert "2 prompts at a time" in capsys.readouterr().err
