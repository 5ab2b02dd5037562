"""Sampling: transformers' filters on given logits, the right distribution, and tokens that depend on their seed alone."""

import math
import sys

import pytest
import torch
from scipy import stats
from test_generate import graphs, model, ragged  # noqa: F401  fixtures
from tiny import VOCABULARY, write_folder
from transformers import (
    LlamaForCausalLM,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import load_model, load_tokenizer
from model.generate import Decoder, generate
from model.sampling import Draw, draw_token, held, likeliest, nucleus, penalised, repeats, sample

generation = sys.modules["model.generate"]  # model.generate is the function
WARM = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}


def random_logits(rows=200, seed=0, spread=3.0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])  # from nearly even to one token that has it all
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_the_filters_are_those_of_transformers(spread, top_p):
    logits = random_logits(spread=spread)
    ids = torch.randint(0, VOCABULARY, (200, 30), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(1.2)(ids, logits.clone())
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.7)(None, expected)) if top_p < 1 else expected / 0.7
    expected = expected.softmax(-1)

    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    kept, tokens = nucleus(penalised(logits, seen, 1.2) / 0.7, top_p)
    ours = kept if tokens is None else torch.zeros_like(logits).scatter_(1, tokens, kept)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("top_k, top_p", [(0, 0.8), (1, 1.0), (7, 1.0), (40, 0.6), (500, 0.9)])
def test_all_filters_in_their_order(ngram, top_k, top_p):
    """On ragged histories of few different tokens, so that many n-grams come again; with equal logits at the edge of top-k."""
    logits = (random_logits(60) * 2).round() / 2
    g = torch.Generator().manual_seed(ngram)
    history, lengths = torch.randint(0, 5, (60, 30), generator=g), torch.randint(1, 31, (60,), generator=g)
    scores = penalised(logits, held(history, lengths, VOCABULARY), 1.2)
    banned = repeats(history, lengths, ngram, VOCABULARY)
    kept, tokens = nucleus(likeliest(scores.masked_fill(banned, -torch.inf) / 0.7, top_k), top_p)
    ours = kept if tokens is None else torch.zeros_like(logits).scatter_(1, tokens, kept)
    assert banned.any(1).sum() > 20
    for row, length in enumerate(lengths.tolist()):
        ids = history[row : row + 1, :length]
        expected = NoRepeatNGramLogitsProcessor(ngram)(ids, RepetitionPenaltyLogitsProcessor(1.2)(ids, logits[row : row + 1].clone()))
        assert torch.equal(scores[row : row + 1].masked_fill(banned[row : row + 1], -torch.inf), expected)
        expected = TemperatureLogitsWarper(0.7)(None, expected)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        if top_p == 1:
            expected = expected.softmax(-1)[0]
            assert torch.equal(ours[row] > 0, expected > 0)
            torch.testing.assert_close(ours[row] / ours[row].sum(), expected, rtol=1e-5, atol=1e-7)
            continue
        # Of equal logits at top-p's edge either side may keep others, as sorting has it: as many, of the same probabilities.
        expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0].sort(descending=True)[0]
        found = (ours[row] / ours[row].sum()).sort(descending=True)[0]
        assert int((found > 0).sum()) == int((expected > 0).sum())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
                                      {"repetition_penalty": 1.3}])  # fmt: skip
def test_greedy_with_processors_is_that_of_transformers(tmp_path, settings):
    folder = write_folder(tmp_path)
    ours, theirs, prompts = load_model(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ragged(16)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None,
                                  pad_token_id=0, **settings)  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert expected != generate(ours, prompts, 24, [])
    for batch in (1, 5, 64):
        assert sample(ours, prompts, 24, [], temperature=0, seeds=[0] * 16, batch_size=batch, **settings) == expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_n_gram_is_drawn_twice(model, size):  # noqa: F811
    prompts = ragged(12)
    outputs = sample(model, prompts, 30, [], temperature=0.7, top_k=12, no_repeat_ngram_size=size, seeds=range(12), batch_size=5)
    free = sample(model, prompts, 30, [], temperature=0.7, top_k=12, seeds=range(12))

    def repeated(prompt, ids):
        whole = prompt + ids
        grams = [tuple(whole[i : i + size]) for i in range(len(whole) - size + 1)]
        return any(gram in grams[:i] for i, gram in enumerate(grams) if i + size > len(prompt))

    assert not any(repeated(*pair) for pair in zip(prompts, outputs, strict=True))
    assert any(repeated(*pair) for pair in zip(prompts, free, strict=True))


def test_draws_are_the_inverse_of_the_distribution_function():
    probabilities, tokens = torch.tensor([[0.5, 0.25, 0.0, 0.125]]).expand(7, 4), torch.tensor([[9, 4, 7, 2]]).expand(7, 4)
    at = torch.tensor([0.0, 0.5, 0.5714, 0.5715, 0.857, 0.8572, 1 - 2**-53], dtype=torch.float64)  # of a sum of 0.875: steps at 4/7 and 6/7
    assert draw_token(probabilities, tokens, at).tolist() == [9, 9, 9, 4, 4, 2, 2]
    assert draw_token(probabilities, None, at).tolist() == [0, 0, 0, 1, 1, 3, 3]


def test_tokens_come_as_often_as_they_should(model):  # noqa: F811
    """Chi-square, on the first and on the second token of seeded samples."""
    prompt, count = [3, 14, 15], 4000
    outputs = sample(model, [prompt] * count, 2, [], temperature=0.8, seeds=range(count), batch_size=512)
    with torch.no_grad():
        first = (model(torch.tensor([prompt]))[0, -1].double() / 0.8).softmax(-1)
        second = (model(torch.tensor([[*prompt, t] for t in range(VOCABULARY)]))[:, -1].double() / 0.8).softmax(-1)
    for place, expected in enumerate((first, first @ second)):
        found = torch.bincount(torch.tensor([ids[place] for ids in outputs]), minlength=VOCABULARY).double()
        common = expected * count >= 5  # rare ones together
        merged = [torch.cat([x[common], x[~common].sum()[None]]).numpy() for x in (found, expected * count)]
        assert len(merged[0]) > 10 and stats.chisquare(*merged).pvalue > 0.01
        assert stats.chisquare(merged[0], merged[1][::-1].copy()).pvalue < 1e-6  # it would tell another distribution
    assert len({tuple(ids) for ids in outputs}) > 100


def test_cold_sampling_is_greedy(model):  # noqa: F811
    prompts = ragged()
    expected = generate(model, prompts, 12, [])
    seeds = range(len(prompts))
    assert sample(model, prompts, 12, [], temperature=0, seeds=seeds) == expected
    assert sample(model, prompts, 12, [], temperature=1e-4, seeds=seeds) == expected
    assert sample(model, prompts, 12, [], top_p=1e-6, seeds=seeds) == expected
    assert sample(model, prompts, 12, [], seeds=seeds) != expected


@pytest.mark.parametrize("settings", [WARM, {}, {"temperature": 0, "repetition_penalty": 1.5}])
def test_tokens_are_those_of_the_whole_model(model, settings):  # noqa: F811
    """Against a loop over whole passes of one sequence, with its own reading of the settings."""
    prompts, seeds = ragged(6), [5, 77, 2**47, 0, 9, 5]
    T, top_p, penalty = (settings.get(name, 1.0) for name in ("temperature", "top_p", "repetition_penalty"))
    for prompt, seed, ours in zip(prompts, seeds, sample(model, prompts, 9, [], seeds=seeds, **settings), strict=True):
        uniforms, ids = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist(), list(prompt)
        for u in uniforms:
            with torch.no_grad():
                scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), model(torch.tensor([ids]))[:, -1].double())[0]
            if not T:
                ids.append(int(scores.argmax()))
                continue
            p = (scores / T).softmax(-1)
            order = range(VOCABULARY) if top_p == 1 else sorted(range(VOCABULARY), key=lambda t: -p[t])
            kept, total = [], 0.0
            for token in order:
                if total < top_p:
                    kept.append((token, float(p[token])))
                    total += float(p[token])
            at = u * total
            ids.append(next(token for i, (token, _) in enumerate(kept) if sum(x for _, x in kept[: i + 1]) > at))
        assert ids[len(prompt) :] == ours


@pytest.mark.parametrize("settings", [WARM, {"temperature": 0.9}, {"temperature": 0, "repetition_penalty": 1.3},
                                      {**WARM, "top_k": 20, "no_repeat_ngram_size": 2}])  # fmt: skip
def test_a_sequence_depends_on_its_seed_alone(model, settings):  # noqa: F811
    prompts, seeds = ragged(20), [100 + i for i in range(20)]
    alone = [sample(model, [p], 24, [], seeds=[s], **settings)[0] for p, s in zip(prompts, seeds, strict=True)]
    stops = {alone[0][3], alone[5][10], alone[9][0]}
    cut = [ids[: next((i for i, token in enumerate(ids) if token in stops), 24)] for ids in alone]
    assert len({len(ids) for ids in cut}) > 3 and [] in cut
    decoder = Decoder(model, 6)
    for batch in (1, 3, 8, 64):
        assert sample(model, prompts, 24, stops, seeds=seeds, batch_size=batch, **settings) == cut
    backwards = sample(model, prompts[::-1], 24, stops, seeds=seeds[::-1], decoder=decoder, **settings)
    assert backwards[::-1] == cut
    generate(model, prompts, 8, stops, decoder=decoder)  # greedy in between
    assert sample(model, prompts, 24, stops, seeds=seeds, decoder=decoder, **settings) == cut
    if settings["temperature"]:
        assert sample(model, prompts, 24, [], seeds=[s + 1 for s in seeds], **settings) != alone


@pytest.mark.parametrize("poll", [1, 5, 16])
def test_captured_steps_and_rare_looks_change_nothing(model, monkeypatch, request, poll):  # noqa: F811
    prompts, seeds = ragged(20), range(20)
    tokenizer = Letters()
    free = sample(model, prompts, 24, [], seeds=seeds, **WARM)
    stops, texts = {free[0][3], free[9][0]}, [tokenizer.decode(free[5][10:12]), tokenizer.decode(free[7][5:8])]

    def run(**more):
        return sample(model, prompts, 24, stops, seeds=seeds, stop_texts=texts, tokenizer=tokenizer, **more, **WARM)

    expected = run(batch_size=1)
    assert expected != sample(model, prompts, 24, stops, seeds=seeds, **WARM) and len(expected[5]) <= 10
    captured = request.getfixturevalue("graphs")
    monkeypatch.setitem(generation.POLL, "cpu", poll)
    for batch in (1, 3, 8, 32):
        assert run(batch_size=batch) == expected
    del captured[:]
    decoder = Decoder(model, 6)
    greedy = generate(model, prompts, 12, [], decoder=decoder)
    assert run(decoder=decoder) == expected and run(decoder=decoder) == expected
    assert captured.count(6) == 2  # greedy, then drawn, then not again
    assert generate(model, prompts, 12, [], decoder=decoder) == greedy == generate(model, prompts, 12, [])


def test_less_memory_changes_nothing(model, monkeypatch, capsys):  # noqa: F811
    prompts = ragged(9)
    expected, advance = sample(model, prompts, 8, [], seeds=range(9), **WARM), Decoder._advance

    def short_of_memory(self, width, seen=None):
        if width > 2:
            raise RuntimeError("out of memory")
        advance(self, width, seen)

    monkeypatch.setattr(Decoder, "_advance", short_of_memory)
    assert sample(model, prompts, 8, [], seeds=range(9), batch_size=8, **WARM) == expected
    assert "2 sequences at a time" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Stop texts


class Letters:
    """A tokenizer whose token t is one letter, or two where t is a multiple of 5."""

    def decode(self, ids):
        return "".join(chr(0x100 + t) + "." * (t % 5 == 0) for t in ids)


def cut_of(text, stop, tokenizer, ids):
    """By brute force: the fewest tokens whose text reaches the stop text's begin."""
    return next(k for k in range(len(ids) + 1) if len(tokenizer.decode(ids[:k])) >= text.index(stop))


def test_a_stop_text_ends_a_sequence(model):  # noqa: F811
    tokenizer, prompts = Letters(), ragged(12)
    free = sample(model, prompts, 20, [], seeds=range(12))
    texts = [tokenizer.decode(ids) for ids in free]
    for place, length in ((0, 2), (3, 1), (8, 4), (18, 2)):
        stop = tokenizer.decode(free[4][place : place + length])
        expected = [ids[: cut_of(text, stop, tokenizer, ids)] if stop in text else ids for text, ids in zip(texts, free, strict=True)]
        assert len(expected[4]) <= place
        more = {"stop_texts": [stop, "never"], "tokenizer": tokenizer}
        for batch in (1, 5, 12):
            assert sample(model, prompts, 20, [], seeds=range(12), batch_size=batch, **more) == expected


def test_where_a_text_is_cut():
    tokenizer = load_tokenizer("nano")
    draw = Draw([], 1.0, 1.0, 1.0, ("Input:", "\n\n\n"), tokenizer)

    def cut(text):
        ids = tokenizer.encode(text)
        at = draw.cut(ids)
        return None if at is None else tokenizer.decode(ids[:at])

    assert cut(" 3 cups\nOutput: 3.\n\nInput: 4 cups\nInput: 5") == " 3 cups\nOutput: 3.\n\n"
    assert cut("Input: x") == "" and cut(" Input: x") in ("", " ", " Input")  # a token in which it begins stays whole
    assert cut("Inputs: none") is None and cut("") is None
    assert cut("é ü \n\n\n Input:") == "é ü "
    assert draw.stops_in(tokenizer.encode("x Input: y")) and not draw.stops_in(tokenizer.encode("x Inp"))
    first = Draw([], 1.0, 1.0, 1.0, ("bcd", "c"), Chars())
    assert first.cut([ord(c) for c in "abcd"]) == 2  # "c" is complete first, though "bcd" begins before it


class Chars:
    def decode(self, ids):
        return "".join(map(chr, ids))


def test_bad_settings(model):  # noqa: F811
    prompts = ragged(2)
    for words, settings in {
        "2 prompts, and 1 seeds": {"seeds": [1]}, "temperature": {"temperature": -1.0}, "top_p": {"top_p": 0.0},
        "in .0, 1.": {"top_p": 1.1}, "repetition_penalty": {"repetition_penalty": 0.0}, "top_k and": {"top_k": -1},
        "are at least 0": {"no_repeat_ngram_size": -2}, "need a tokenizer": {"stop_texts": ["a"]},
        "not empty": {"stop_texts": [""], "tokenizer": Chars()},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sample(model, prompts, 4, [], **{"seeds": [1, 2], **settings})
    assert sample(model, prompts, 0, [], seeds=[1, 2]) == [[], []] and sample(model, [], 4, [], seeds=[]) == []


def test_answers_are_scored_while_drawing(model):  # noqa: F811
    prompts, answers = ragged(5), ragged(5, seed=8)
    draw = Draw(list(range(5)), 1.0, 1.0, 1.0)
    outputs, losses = Decoder(model, 3).run(prompts, 6, [], answers, draw=draw)
    assert outputs == sample(model, prompts, 6, [], seeds=range(5))
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, Decoder(model, 5).run(prompts, 1, [], answers)[1], strict=True))
