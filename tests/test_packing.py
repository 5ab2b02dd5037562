"""Examples packed one behind the other give what each gives alone: per token, in gradients, at any length and split."""

import numpy as np
import pytest
import torch
from tiny import raw_config, tiny_model, train_some, write_folder
from transformers import LlamaForCausalLM

from data.batching import Examples, collate
from kernels.linear import Joined, product, rotate, swiglu_linear
from lora import add_lora
from lora.layers import dropout_keys, lora_layers, lora_parameters, merged
from lora.resume import Learner
from masking.score import micro_nll
from model import attention, load_model
from model.attention import Pack
from train import fit

G = torch.Generator().manual_seed(0)


def ragged(count, longest=40, shortest=1):
    lengths = torch.randint(shortest, longest, (count,), generator=G).tolist()
    return lengths, [torch.randint(0, 97, (n,), generator=G) for n in lengths]


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True, "head_dim": 8}])
def model(tmp_path, request):
    model = tiny_model(tmp_path, **request.param)
    add_lora(model, 4, 8.0, dropout=0.2, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model


def test_packed_equals_one_by_one(model):
    model.train()
    lengths, examples = ragged(9)
    lengths, examples = [1, *lengths, 1, 33], [torch.tensor([5]), *examples, torch.tensor([96]), torch.arange(33)]
    names = torch.arange(len(lengths))
    sight = Pack(lengths, model.config)
    keys = dropout_keys(3, 8, names.repeat_interleave(torch.tensor(lengths)), sight.positions)
    factors = [torch.randn(n, 64, generator=G) for n in lengths]
    states = model.hidden(torch.cat(examples), sight, row_keys=keys)
    (states * torch.cat(factors)).sum().backward()
    packed = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad(set_to_none=True)
    for part, own, ids, factor in zip(states.detach().split(lengths), keys.split(lengths), examples, factors, strict=True):
        alone = model.hidden(ids[None], row_keys=own)[0]
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)
        (alone * factor).sum().backward()
    for one, other in zip(packed, lora_parameters(model), strict=True):
        assert (one - other.grad).norm() <= 1e-5 * one.norm() and one.norm() > 0


def test_packed_equals_transformers(tmp_path):
    folder = write_folder(tmp_path, raw_config(rope_theta=500.0))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder)
    lengths, examples = ragged(7)
    with torch.no_grad():
        states = ours.hidden(torch.cat(examples), Pack(lengths, ours.config)) @ ours.head_weight.T
        for part, ids in zip(states.split(lengths), examples, strict=True):
            torch.testing.assert_close(part, theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 37, 10_000])
def test_chosen_rows_at_any_budget(model, budget):
    """The losses of completions, with prompts of one token and answers of one token among them."""
    pairs = [([7], [8]), ([7], list(range(20))), (list(range(30)), [3]), *(([1] * a, [2] * b) for a, b in ((3, 9), (12, 2)))]
    examples, found = Examples.from_pairs(pairs), {}
    model.eval()
    for micro in collate(examples, [3, 0, 4, 2, 1], budget, None):
        assert len(micro.input_ids) == sum(micro.lengths) and (sum(micro.lengths) <= budget or len(micro.lengths) == 1)
        for i, nll in zip(micro.indices, micro_nll(model, micro).split(micro.sizes), strict=True):
            found[i] = nll.detach()
    for i, (prompt, answer) in enumerate(pairs):
        logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        expected = torch.stack([-logp[len(prompt) + k - 1, token] for k, token in enumerate(answer)]).detach()
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


def test_passes_are_even():
    examples = Examples.from_pairs([([1] * 10, [2] * 11)] * 9)  # 20 tokens run of each
    assert [len(m.lengths) for m in collate(examples, list(range(9)), 100, None)] == [5, 4]
    sizes = [len(m.input_ids) for m in collate(examples, list(range(9)), 160, None)]
    assert sum(sizes) == 180 and max(sizes) <= 160 and min(sizes) >= 60  # 100 and 80, not 160 and 20


# How torch's varlen_attn is called, which three releases spell in three ways


def grouped(query, key, value, offsets, causal=True):
    outs = []
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        q, k, v = (x[a:b].transpose(0, 1)[None].float() for x in (query, key, value))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


def spelled_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1], "no grouped queries here"
    return grouped(query, key, value, cu_seq_q, is_causal)


def spelled_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1], "no grouped queries here"
    return grouped(query, key, value, cu_seq_q, window_size == (-1, 0))


def spelled_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa and query.shape[1] != key.shape[1]
    return grouped(query, key, value, cu_seq_q, window_size == (-1, 0))


@pytest.mark.parametrize("spelling", [spelled_2_10, spelled_2_11, spelled_2_13])
def test_varlen_in_every_spelling(tmp_path, monkeypatch, spelling):
    from torch.nn.attention import varlen

    model = tiny_model(tmp_path)
    lengths, examples = ragged(5)
    with torch.no_grad():
        expected = model.hidden(torch.cat(examples), Pack(lengths, model.config))
        monkeypatch.setattr(varlen, "varlen_attn", spelling)
        monkeypatch.setattr(attention, "attention_kind", lambda *_: "varlen")
        attention._varlen_settings.cache_clear()
        found = model.hidden(torch.cat(examples), Pack(lengths, model.config))
    attention._varlen_settings.cache_clear()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert attention.attention_kind(torch.device("cpu"), torch.bfloat16) == "varlen"  # the stand-in


# One product for linears with one input, one parameter for factors of one shape


def test_joined_weights_are_the_parameters(tmp_path):
    model = tiny_model(tmp_path)
    attention_block = model.model.layers[0].self_attn
    ids = torch.arange(12)[None]
    before = model(ids)
    whole = attention_block.joined("qkv").whole
    assert whole.data_ptr() == attention_block.q_proj.weight.data_ptr() and whole.shape == (64 + 32 + 32, 64)
    assert torch.equal(whole, torch.cat([getattr(attention_block, f"{k}_proj").weight for k in "qkv"]))
    with torch.no_grad():
        attention_block.k_proj.weight.zero_()  # a change of the parameter is a change of the product
    assert not torch.equal(model(ids), before) and not whole[64:96].any()
    model.double()  # the parameters have moved: they are joined anew
    assert model(ids).dtype == torch.float64 and attention_block.joined("qkv").whole.dtype == torch.float64
    assert set(model.state_dict()) == set(dict(load_model(tmp_path).named_parameters()))


def test_full_gradients_equal_transformers(tmp_path):
    """Trainable weights, norms, biases and embedding through the fused functions."""
    folder = write_folder(tmp_path, raw_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False))
    theirs, ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), load_model(folder).requires_grad_(True)
    ids = torch.randint(0, 97, (2, 21), generator=G)
    theirs(ids).logits.log_softmax(-1)[..., 3].sum().backward()
    ours(ids).log_softmax(-1)[..., 3].sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


def test_a_handful_of_parameters(tmp_path):
    model = tiny_model(tmp_path, num_hidden_layers=5)
    add_lora(model, 4, 8.0)
    stacks = {name: tuple(p.shape) for name, p in model.adapter.stacks.items()}
    assert stacks == {"A_4x64": (30, 4, 64), "A_4x96": (5, 4, 96), "B_32x4": (10, 32, 4), "B_64x4": (15, 64, 4), "B_96x4": (10, 96, 4)}
    assert len(lora_layers(model)) == 35 and {p.requires_grad for p in lora_parameters(model)} == {True}
    address = model.model.layers[2].mlp.down_proj.weight.data_ptr()
    with merged(model):  # in place: what knows the addresses goes on
        assert model.model.layers[2].mlp.down_proj.weight.data_ptr() == address


# Memory


class Full:
    """Passes of more than `most` tokens run out of memory, in the words of the device or of the host."""

    def __init__(self, model, most, words):
        self.hidden, self.most, self.words, self.tried = model.hidden, most, words, []

    def __call__(self, input_ids, *args, **settings):
        self.tried.append(len(input_ids))
        if len(input_ids) > self.most:
            raise RuntimeError(self.words) if isinstance(self.words, str) else self.words()
        return self.hidden(input_ids, *args, **settings)


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory: you", MemoryError])
def test_out_of_memory_goes_on_in_smaller_passes(tmp_path, monkeypatch, capsys, words):
    lengths, tokens = ragged(12, shortest=4)
    examples = Examples.from_pairs([(ids[:2].tolist(), ids[2:].tolist()) for ids in tokens])
    weights = np.ones(examples.completion_offsets[-1], dtype=np.float32)
    after = []
    for most in (10_000, 90):
        model = tiny_model(tmp_path)
        add_lora(model, 4, 8.0, dropout=0.1, generator=torch.Generator().manual_seed(0))
        train_some(model)
        full = Full(model, most, words)
        monkeypatch.setattr(model, "hidden", full)
        steps = list(fit(model, Learner(model, lora_parameters(model), lambda p: [torch.optim.SGD(p, lr=0.1)]),
                         lambda _, t: collate(examples, list(range(12)), t, weights), 3, micro_tokens=4096))  # noqa: B023  # fmt: skip
        after.append(([p.detach().clone() for p in lora_parameters(model)], [step.loss for step in steps]))
    total = sum(lengths) - 12
    assert steps[0].micro_tokens == steps[2].micro_tokens < total and full.tried[0] == total and total > 180
    assert full.tried.count(total) == 1 and max(full.tried[-6:]) <= 90  # the later steps know it from the start
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-5)
    for one, other in zip(after[0][0], after[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    told = capsys.readouterr().err.splitlines()
    assert len(told) <= 2 and f"out of memory at step 0 with {total} tokens in a pass: going on with at most {total // 2}" in told[0]


def test_one_example_too_large_is_an_error(tmp_path, monkeypatch):
    model = tiny_model(tmp_path)
    add_lora(model, 4, 8.0)
    monkeypatch.setattr(model, "hidden", Full(model, 3, "CUDA out of memory."))
    examples = Examples.from_pairs([([1, 2, 3], [4, 5, 6])] * 3)
    weights = np.ones(9, dtype=np.float32)
    micros = lambda _, t: collate(examples, [0, 1, 2], t, weights)  # noqa: E731
    with pytest.raises(RuntimeError, match="out of memory"):
        list(fit(model, Learner(model, lora_parameters(model), lambda p: [torch.optim.SGD(p)]), micros, 1, micro_tokens=100))


@pytest.mark.parametrize("rows", [1, 15, 16, 64, 512, 513])
@pytest.mark.parametrize("outputs", [8, 1536])
def test_products_in_either_layout(rows, outputs):
    x, weight, bias = torch.randn(rows, 24, generator=G), torch.randn(outputs, 24, generator=G), torch.randn(outputs, generator=G)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    y = product(x, weight, bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    wide_columns = outputs == 1536 and 16 <= rows <= 512
    assert y.is_contiguous() != wide_columns  # what follows is tested with both
    gate_up = torch.nn.functional.silu(expected[:, : outputs // 2]) * expected[:, outputs // 2 :]
    down = torch.randn(16, outputs // 2, generator=G)
    got = swiglu_linear(y, Joined(down, (down,), None))
    torch.testing.assert_close(got.double(), gate_up @ down.double().T, rtol=1e-4, atol=1e-3)
    turned = rotate(y, 1, torch.zeros(rows, 2), torch.ones(rows, 2))
    assert turned.is_contiguous()
    torch.testing.assert_close(turned[:, :2].double(), -expected[:, 2:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned[:, 4:].double(), expected[:, 4:], rtol=1e-5, atol=1e-5)
