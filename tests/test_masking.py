"""Masks: published vectors, every policy against a plain loop, token scores and their cache, the page that shows them."""

import math
import random as python_random
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tiny import random_examples, tiny_model, train_some

from data.batching import Examples, collate
from lora import add_lora
from masking import token_weights
from masking.inspect import MaskedToken, as_page, dropped_line, heat, in_terminal, masked_example, masked_markdown
from masking.score import dataset_weights, example_weights, micro_nll, score_examples
from masking.weights import policies, windows
from model import load_tokenizer
from study.errors import LetheError


def dropped(nll, policy, **settings):
    """Indices that a policy drops."""
    return (token_weights(torch.as_tensor(nll, dtype=torch.float32), policy, **settings) == 0).nonzero()[:, 0].tolist()


def from_perplexity(values):
    return torch.tensor(values, dtype=torch.float64).log().float()


# Vectors worked out by hand


def test_threshold_is_strict():
    nll = from_perplexity([1.0, 2.5, 2.6, 40, 2.4])
    assert dropped(nll, "highest", threshold=2.5) == [2, 3]
    assert dropped(nll, "lowest", threshold=2.5) == [0, 4]
    for seed in range(20):
        assert len(dropped(nll, "random", threshold=2.5, generator=torch.Generator().manual_seed(seed))) == 2
    for threshold in (1.1, 2.0, 2.5, 3.0, 10.0, 30.0, 100.0):  # a token at the threshold stays, the next float goes
        edge = torch.tensor(math.log(threshold), dtype=torch.float32)
        assert dropped(torch.stack([edge, edge.nextafter(torch.tensor(99.0))]), "highest", threshold=threshold) == [1]


def test_difference_filters():
    base, adapter = from_perplexity([1, 5, 2]), from_perplexity([1, 4, 3])
    assert dropped(base, "dpf", threshold=0.0, adapter_nll=adapter) == [2]
    assert dropped(base, "stm_dpf", threshold=4.5, adapter_nll=adapter) == [1, 2]
    assert dropped(base, "dpf", threshold=1.5, adapter_nll=adapter) == []
    for policy in ("dpf", "stm_dpf"):
        with pytest.raises(ValueError, match="adapter_nll is needed"):
            token_weights(base, policy)


@pytest.mark.parametrize(
    ("n", "starts"),
    [(1, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (7, [0, 3]), (10, [0, 3, 6]), (11, [0, 3, 6, 7]), (12, [0, 3, 6, 8])],
)
def test_windows(n, starts):
    assert windows(n, 4, 0.2) == starts


def test_strides():
    assert len(windows(40, 4, 0.2)) == 13 and windows(10, 4, 0.5) == [0, 2, 4, 6] and windows(6, 4, 0.9) == [0, 1, 2]
    assert windows(30, 10, 0.9)[:3] == [0, 1, 2] and len(windows(30, 10, 0.9)) == 21  # 10 * (1 - 0.9) is 0.99999… in floats
    assert windows(4, 4, 0.0) == [0] and windows(3, 1, 0.5) == [0, 1, 2]
    for size, overlap in ((0, 0.2), (4, 1.0), (4, -0.1)):
        with pytest.raises(ValueError, match="group_size must be at least 1"):
            windows(10, size, overlap)


def test_group_pick():
    nll = [0, 0, 0, 0, 3, 3, 3, 3, 3, 3]
    assert dropped(nll, "bottom10") == [0, 1, 2, 3]
    assert dropped(nll, "bottom10", direction="low_confidence") == [6, 7, 8, 9]
    for direction in ("low_ppl", "low_confidence"):  # ties: the earlier
        assert dropped([1.0] * 10, "bottom10", direction=direction) == [0, 1, 2, 3]
    assert dropped([0, 0, 0, 9], "bottom10") == []  # one window loses nothing


@pytest.mark.parametrize(("count", "gone"), [(9, 1), (13, 1), (19, 1), (20, 2), (25, 2), (30, 3)])
def test_a_tenth_of_the_windows_rounded_down(count, gone):
    n = 4 + 3 * (count - 1)
    assert len(windows(n, 4, 0.2)) == count
    nll = torch.arange(n, dtype=torch.float32)  # the lowest windows stand first, each adds three tokens
    assert dropped(nll, "bottom10") == list(range(4 + 3 * (gone - 1)))


# Every policy against a loop that a reader can check


def plain_windows(n, size, overlap):
    stride = max(1, math.floor(size * (1 - overlap) + 1e-9))
    found, start = [], 0
    while start + size <= n:
        found.append((start, start + size))
        start += stride
    if not found:
        return [(0, n)]
    if found[-1][1] != n:
        found.append((n - size, n))
    return found


def plain_bottom10(nll, size, overlap, ratio, direction):
    spans = plain_windows(len(nll), size, overlap)
    if len(spans) == 1:
        return set()
    scores = [sum(nll[a:b]) / (b - a) for a, b in spans]
    sign = 1 if direction == "low_ppl" else -1
    ranked = sorted(range(len(spans)), key=lambda i: (sign * scores[i], i))
    return {i for window in ranked[: max(1, math.floor(ratio * len(spans) + 1e-9))] for i in range(*spans[window])}


def plain(nll, policy, settings, other):
    """The set of dropped positions, by definition."""
    high = {i for i, value in enumerate(nll) if value > math.log(settings["threshold"])}
    group = plain_bottom10(nll, *(settings[key] for key in ("group_size", "overlap_ratio", "ratio", "direction")))
    ranked = sorted(range(len(nll)), key=lambda i: (nll[i], i))
    return {
        "none": set(),
        "highest": high,
        "lowest": set(ranked[: len(high if settings["match"] == "highest" else group)]),
        "bottom10": group,
        "dpf": {i for i in range(len(nll)) if math.exp(other[i]) - math.exp(nll[i]) > settings["threshold"]},
        "stm_dpf": high | {i for i in range(len(nll)) if other[i] > nll[i]},
    }[policy]


@pytest.mark.parametrize("policy", ["none", "highest", "lowest", "bottom10", "dpf", "stm_dpf"])
def test_policies_equal_plain_loops(policy):
    draw = python_random.Random(7)
    for round_ in range(150):
        n = draw.choice([1, 2, 3, 4, 5, 8, 13, 40, 100])
        # Every fourth case on a coarse grid, where windows and tokens tie.
        values = [draw.choice([0.0, 0.5, 1.0, 4.0]) if round_ % 4 == 0 else draw.expovariate(0.5) for _ in range(n)]
        nll = torch.tensor(values)
        other = torch.tensor([draw.choice([value, draw.expovariate(0.5)]) for value in values])
        settings = {
            "threshold": draw.choice([1.5, 2.5, 30.0]), "group_size": draw.choice([1, 2, 4, 7]),
            "overlap_ratio": draw.choice([0.0, 0.2, 0.5, 0.9]), "ratio": draw.choice([0.1, 0.3]),
            "direction": draw.choice(["low_ppl", "low_confidence"]), "match": draw.choice(["highest", "bottom10"]),
        }  # fmt: skip
        got = set(dropped(nll, policy, adapter_nll=other, **settings))
        assert got == plain(nll.tolist(), policy, settings, other.tolist()), (settings, values)


@pytest.mark.parametrize("match", ["highest", "bottom10"])
def test_random_matches_the_count_and_covers_all(match):
    nll = torch.rand(30) * 4
    count = len(dropped(nll, match, threshold=20.0))
    seen = torch.zeros(30)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        gone = dropped(nll, "random", threshold=20.0, match=match, generator=generator)
        assert len(gone) == count > 0
        seen[gone] += 1
    assert dropped(nll, "random", threshold=20.0, match=match, generator=generator.manual_seed(299)) == gone
    spread = math.sqrt(300 * count / 30 * (1 - count / 30))
    assert (seen - 300 * count / 30).abs().max() < 5 * spread


def test_soft_weights():
    nll = from_perplexity([1.0, 1.75, 3.0, 1e9])
    expected = [1.0, math.exp(-1), math.exp(-((2 / 0.75) ** 2)), 0.0]
    torch.testing.assert_close(token_weights(nll, "soft"), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert token_weights(torch.tensor([1000.0]), "soft").tolist() == [0.0]  # exp overflows to infinity, not to NaN
    with pytest.raises(ValueError, match="tau must be positive"):
        token_weights(nll, "soft", tau=0.0)


def test_every_policy_returns_float32_and_takes_no_tokens():
    assert list(policies())[:2] == ["none", "bottom10"] and len(policies()) == 8
    for policy in policies():
        for nll in (torch.rand(9), torch.rand(0)):
            weights = token_weights(nll, policy, adapter_nll=nll)
            assert weights.dtype == torch.float32 and weights.shape == nll.shape and bool(((weights >= 0) & (weights <= 1)).all())


def test_wrong_settings():
    nll = torch.rand(9)
    for settings, message in (
        ({"policy": "top"}, "'top' is unknown; known: none, bottom10, highest"),
        ({"policy": "highest", "threshold": 0.0}, "must be positive"),
        ({"policy": "bottom10", "direction": "up"}, "direction 'up' is unknown"),
        ({"policy": "random", "match": "dpf"}, "adapter_nll is needed"),
        ({"policy": "random", "match": "lowest"}, "match 'lowest' is no policy whose count"),
        ({"policy": "random", "match": "top"}, "match 'top' is no policy whose count"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(nll, **settings)


# Scores of a data set


@pytest.fixture
def model(tmp_path):
    model = tiny_model(tmp_path / "model")
    add_lora(model, 4, 8.0, dropout=0.5)
    train_some(model)
    return model


@pytest.fixture
def examples():
    return random_examples(23)


def one_by_one(model, examples):
    """nll of each completion token by whole logits in float64, one example at a time."""
    parts = []
    for i in range(len(examples)):
        ids = torch.from_numpy(examples.ids(i).astype(np.int64))
        with torch.no_grad():
            logp = model(ids[None])[0].double().log_softmax(-1)
        parts += [-logp[t - 1, ids[t]].item() for t in range(int(examples.starts[i]), len(ids))]
    return np.array(parts)


def test_nll_belongs_to_its_token(model):
    """Tokens t0..t4 with a prompt of two: t2, t3, t4 carry the losses that the logits at 1, 2, 3 give them."""
    model.eval()
    tokens = [5, 6, 7, 8, 9]
    (micro,) = collate(Examples.from_pairs([(tokens[:2], tokens[2:])]), [0], 100, None)
    assert micro.rows.tolist() == [1, 2, 3] and micro.targets.tolist() == [7, 8, 9]
    nll = micro_nll(model, micro)
    logp = model(torch.tensor([tokens]))[0].log_softmax(-1)
    torch.testing.assert_close(nll, torch.stack([-logp[1, 7], -logp[2, 8], -logp[3, 9]]))


def test_scores_equal_one_by_one(model, examples, tmp_path):
    model.train()
    scores = score_examples(model, examples, "x", tmp_path, micro_tokens=30)
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    assert scores.dtype == np.float32 and scores.shape == (examples.completion_offsets[-1],)
    np.testing.assert_allclose(scores, one_by_one(model, examples), rtol=1e-5, atol=1e-5)
    again = score_examples(model, examples, "y", tmp_path, micro_tokens=900)
    np.testing.assert_allclose(scores, again, rtol=1e-5, atol=1e-5)


def counting(model, monkeypatch):
    calls, hidden = [], model.hidden

    def counted(*args, **settings):
        calls.append(len(args[0]))
        return hidden(*args, **settings)

    monkeypatch.setattr(model, "hidden", counted)
    return calls


def test_scores_are_cached_by_content(model, examples, tmp_path, monkeypatch):
    calls, heard = counting(model, monkeypatch), []
    scores = score_examples(model, examples, "base", tmp_path, micro_tokens=150, progress=heard.append)
    passes = len(calls)
    assert sum(heard) == 23 and passes == len(heard) >= 3 and max(calls) <= 150 and sum(calls) == len(examples.flat) - 23
    assert np.array_equal(score_examples(model, examples, "base", tmp_path), scores) and len(calls) == passes
    assert [file.suffix for file in tmp_path.glob("*.*")] == [".safetensors"]
    # Another reference, other data and another dtype are scored anew.
    score_examples(model, examples, "another", tmp_path)
    score_examples(model, random_examples(23, seed=4), "base", tmp_path)
    assert len(calls) == passes + 2 and len(list(tmp_path.glob("*.safetensors"))) == 3


def test_scoring_goes_on_where_it_stopped(model, examples, tmp_path, monkeypatch):
    heard = []
    expected = score_examples(model, examples, "base", tmp_path / "whole", micro_tokens=150, progress=heard.append)
    passes = len(heard)

    def stop_after_two(n, seen=[]):  # noqa: B006
        seen.append(n)
        if len(seen) == 2:
            raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        score_examples(model, examples, "base", tmp_path / "cut", micro_tokens=150, progress=stop_after_two)
    assert model.training
    (left,) = (tmp_path / "cut").iterdir()
    assert left.suffix == ".partial"
    calls = counting(model, monkeypatch)
    assert np.array_equal(score_examples(model, examples, "base", tmp_path / "cut", micro_tokens=150), expected)
    assert len(calls) == passes - 2
    # A leftover of the wrong size counts for nothing.
    (file,) = (tmp_path / "cut").glob("*.safetensors")
    file.with_suffix(".partial").write_bytes(b"short")
    file.unlink()
    assert np.array_equal(score_examples(model, examples, "base", tmp_path / "cut", micro_tokens=150), expected)


def test_scores_of_other_tokens_are_refused(model, examples, tmp_path):
    score_examples(model, examples, "base", tmp_path)
    other = random_examples(23, seed=4)
    object.__setattr__(other, "key", examples.key)
    with pytest.raises(LetheError, match="holds the scores of other tokens than this data set's; delete it"):
        score_examples(model, other, "base", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(LetheError, match="is cut or no safetensors file"):
        score_examples(model, examples, "base", tmp_path)


def test_a_diverged_reference_model_is_an_error(model, examples, tmp_path):
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(LetheError, match="the reference model gives NaN"):
        score_examples(model, examples, "base", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


# From scores to weights


def test_the_end_token_is_kept():
    nll = np.array([0.1, 9.0, 0.2, 9.0], dtype=np.float32)
    settings = {"threshold": 30.0}
    assert example_weights(nll, "highest", settings, mask_end=False).tolist() == [1, 0, 1, 1]
    assert example_weights(nll, "highest", settings, mask_end=True).tolist() == [1, 0, 1, 0]
    # It does not take part in the count or in the windows either.
    assert example_weights(nll, "lowest", settings, mask_end=False).tolist() == [0, 1, 1, 1]
    assert example_weights(np.zeros(5, np.float32), "bottom10", {}, mask_end=False).tolist() == [1] * 5
    assert example_weights(np.zeros(5, np.float32), "bottom10", {}, mask_end=True).tolist() == [0] * 4 + [1]
    other = np.array([0.2, 8.0, 0.1, 99.0], dtype=np.float32)
    assert example_weights(nll, "dpf", {"threshold": 0.0}, False, other).tolist() == [0, 1, 1, 1]
    assert example_weights(nll[:1], "highest", settings, mask_end=False).tolist() == [1]


def test_weights_of_a_data_set():
    examples = Examples.from_pairs([([1], [2, 3, 4]), ([1, 1], [2, 3]), ([1], [5]), ([1], [2, 3, 4, 5])])
    nll = np.array([9, 0, 9, 9, 9, 9, 0, 0, 0, 0], dtype=np.float32)
    weights, stats = dataset_weights(examples, "highest", {"threshold": 30.0}, nll)
    assert weights.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert stats["completion_tokens"] == 10 and stats["dropped_share"] == pytest.approx(0.2) and stats["mean_weight"] == pytest.approx(0.8)
    assert stats["emptied_examples"] == 1  # of the second only the end token is left
    shares = [1 / 3, 1 / 2, 0, 0]
    assert stats["dropped_share_per_example"] == {f"p{q}": pytest.approx(np.percentile(shares, q)) for q in (5, 50, 95, 100)}
    weights, stats = dataset_weights(examples, "highest", {"threshold": 30.0}, nll, mask_end=True)
    assert weights.tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert stats["dropped_share"] == pytest.approx(0.5) and stats["emptied_examples"] == 2
    weights, stats = dataset_weights(examples, "none", {}, None)
    assert weights.tolist() == [1] * 10 and stats["dropped_share"] == 0 and stats["emptied_examples"] == 0
    weights, stats = dataset_weights(examples, "soft", {"tau": 0.75}, nll)
    assert weights[[0, 3]].max() == 0 and stats["mean_weight"] == pytest.approx(0.8)


def test_random_weights_come_from_seed_and_example():
    examples = random_examples(30)
    nll = np.random.default_rng(0).exponential(3, int(examples.completion_offsets[-1])).astype(np.float32)
    one, _ = dataset_weights(examples, "random", {"threshold": 10.0}, nll, seed=1)
    assert np.array_equal(one, dataset_weights(examples, "random", {"threshold": 10.0}, nll, seed=1)[0])
    assert not np.array_equal(one, dataset_weights(examples, "random", {"threshold": 10.0}, nll, seed=2)[0])
    highest, _ = dataset_weights(examples, "highest", {"threshold": 10.0}, nll)
    for a, b in zip(examples.completion_offsets, examples.completion_offsets[1:], strict=False):
        assert (one[a:b] == 0).sum() == (highest[a:b] == 0).sum()


def test_settings_out_of_range_are_the_users_mistake():
    examples = random_examples(3)
    nll = np.ones(int(examples.completion_offsets[-1]), dtype=np.float32)
    with pytest.raises(LetheError, match="--mask highest: threshold is a perplexity and must be positive"):
        dataset_weights(examples, "highest", {"threshold": 0.0}, nll)


# What a user sees


class Page(HTMLParser):
    """Gathers tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.spans, self.text, self.links = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for key, value in attributes.items() if key in ("src", "href")]
        assert tag not in ("script", "img", "link", "b"), tag
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "span":
            self.spans.append(attributes)

    def handle_endtag(self, tag):
        assert tag == "p" or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TOKENS = [MaskedToken("a<b>&", 1.0, 1.0), MaskedToken('"\n</span><script>', 40.0, 0.0), MaskedToken("", math.nan, 0.5)]


def test_the_page():
    page = as_page("title <x>", "sub & title", [("a <prompt> & 'more'", TOKENS)] * 2)
    assert "http" not in page and "url(" not in page and "@import" not in page and page.startswith("<!doctype html>")
    parsed = Page(page.replace("<p>", "").replace('<p class="legend">', "").replace("</p>", ""))
    assert not parsed.links and parsed.open == []
    for text in ("a <prompt> & 'more'", "a<b>&", '"⏎\n</span><script>', "title <x>"):
        assert text in parsed.text
    tokens = [span for span in parsed.spans if "title" in span]
    assert [span.get("class") for span in tokens] == [None, "dropped", None] * 2
    assert tokens[1]["title"] == "perplexity 40, weight 0" and tokens[0]["style"] == "background:#ffffff"
    assert parsed.text.count("1 of 3 answer tokens dropped (33%)") == 2


def test_heat_and_text():
    assert heat(1.0) == "#ffffff" and heat(0.5) == heat(1.0) and heat(1e3) == heat(math.inf) == "#f06e14" and heat(math.nan) == "#eee"
    plain_text = in_terminal("P: ", TOKENS, colour=False)
    assert plain_text.startswith('P: a<b>&[-"⏎\n</span><script>-]·\n') and "1 of 3 answer tokens dropped" in plain_text
    assert "\033[9;31m" in in_terminal("P: ", TOKENS, colour=True)
    markdown = masked_markdown("a <p>", TOKENS)
    assert markdown == f"```\n{in_terminal('a <p>', TOKENS, colour=False)}\n```" and "[-" in markdown
    assert masked_markdown("a ``` b", TOKENS).count("```") == 2
    assert dropped_line(TOKENS[:1]) == "0 of 1 answer tokens dropped (0%)"


def test_masked_example_of_real_tokens():
    nano = load_tokenizer("nano")
    prompt, answer = nano.render_prompt((("user", "What is 2 + 2?"),)), nano.render_answer("It is 4.")
    examples = Examples.from_pairs([([1], [2, 3]), (prompt, answer)])
    nll = np.linspace(0, 900, int(examples.completion_offsets[-1])).astype(np.float32)
    weights = (nll < 500).astype(np.float32)
    text, tokens = masked_example(examples, 1, nll, weights, nano)
    assert text == "<|begin_of_text|>Input: What is 2 + 2?\nOutput:"
    assert "".join(token.text for token in tokens) == " It is 4.<|end_of_text|>" and len(tokens) == len(answer)
    assert [token.weight for token in tokens] == weights[2:].tolist() and math.isfinite(tokens[-1].perplexity)
    assert all(math.isnan(token.perplexity) for token in masked_example(examples, 1, None, weights, nano)[1])
