"""The Llama and its decoding against transformers: same weights, same logits, same tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, random_weights, raw_config, tiny_model, train_some, write_folder
from transformers import LlamaForCausalLM

from lora import add_lora
from lora.layers import dropout_keys, lora_parameters
from model import load_model
from model.config import LlamaConfig, rotary_frequencies
from study.errors import LetheError

# Rotary settings of Llama 3.1 and 3.2, with a context short enough that the test's positions reach all three bands.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": {"rope_theta": 500000.0, "tie_word_embeddings": False},
    "llama3.1": {"rope_theta": 500000.0, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    "llama3.2": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 32.0}},
    "one key-value head": {"num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


def peer(folder, **settings) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(tmp_path, shape):
    folder = write_folder(tmp_path, raw_config(**SHAPES[shape]))
    ids = tokens(3, 120)
    ours, theirs = logits(load_model(folder), ids), logits(peer(folder), ids)
    assert theirs.std() > 0.5  # else the comparison would say little
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama2", "llama3.2", "linear rope"])
def test_both_spellings_of_the_rotary_settings(tmp_path, shape):
    old = load_model(write_folder(tmp_path / "old", raw_config(**SHAPES[shape])))
    peer(tmp_path / "old").save_pretrained(tmp_path / "new")  # transformers 5 writes rope_parameters and dtype
    written = json.loads((tmp_path / "new/config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written and "rope_theta" not in written
    new = load_model(tmp_path / "new")
    ids = tokens(2, 120)
    assert torch.equal(logits(old, ids), logits(new, ids))
    assert old.config == new.config and old.fingerprint == new.fingerprint


def test_released_rotary_settings_reach_far():
    """Frequencies of Llama-3.2-1B itself, against its published formula in float64."""
    scaling = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    raw = raw_config(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, rope_scaling=scaling)
    expected = []
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        rounds = 8192 * frequency / (2 * torch.pi)  # turns within the original context
        share = min(1.0, max(0.0, (rounds - 1) / (4 - 1)))
        expected.append(frequency * share + frequency / 32 * (1 - share))
    got = rotary_frequencies(LlamaConfig.from_dict(raw)).double()
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_sharded_weights(tmp_path):
    raw = raw_config(tie_word_embeddings=False)
    whole = load_model(write_folder(tmp_path / "whole", raw))
    peer(tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    # And dealt out in turn, so that no file holds neighbours.
    weights = load_file(tmp_path / "whole/model.safetensors")
    (tmp_path / "dealt").mkdir()
    (tmp_path / "dealt/config.json").write_text(json.dumps(raw))
    dealt = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(weights))}
    (tmp_path / "dealt/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dealt}))
    for file in set(dealt.values()):
        save_file({name: weights[name] for name in dealt if dealt[name] == file}, tmp_path / "dealt" / file)
    ids = tokens(2, 20)
    for name in ("shards", "dealt"):
        shards = load_model(tmp_path / name)
        assert torch.equal(logits(whole, ids), logits(shards, ids))
        assert whole.fingerprint == shards.fingerprint  # an adapter fits its base however the base is cut into files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_files(tmp_path, dtype):
    folder = write_folder(tmp_path, dtype=dtype)
    ids = tokens(2, 60)
    exact = logits(peer(folder), ids)
    torch.testing.assert_close(logits(load_model(folder), ids), exact, rtol=1e-5, atol=1e-5)
    low = load_model(folder, dtype)
    assert all(parameter.dtype == dtype for parameter in low.parameters())
    theirs = logits(LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval(), ids).float()
    assert (logits(low, ids).float() - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_a_tied_file_may_repeat_its_head(tmp_path):
    plain = load_model(write_folder(tmp_path / "plain"))
    weights = random_weights(raw_config())
    folder = write_folder(tmp_path / "doubled", weights={**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    ids = tokens(2, 20)
    assert torch.equal(logits(load_model(folder), ids), logits(plain, ids))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model = tiny_model(tmp_path)
    add_lora(model, 4, 8, dropout=0.3)
    train_some(model)
    model.train()
    ids = tokens(2, 30)
    gradients = []
    for saving in (False, True):
        model.gradient_checkpointing = saving
        model.zero_grad(set_to_none=True)
        keys = dropout_keys(0, 3, torch.tensor([7, 9]).repeat_interleave(30), torch.arange(30).repeat(2))
        model.hidden(ids, row_keys=keys).log_softmax(-1)[..., 5].sum().backward()
        gradients.append([p.grad for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().max() > 0 for g in gradients[0])


def test_hidden_at_chosen_rows(tmp_path):
    model = tiny_model(tmp_path)
    ids, rows = tokens(3, 10), torch.tensor([0, 9, 17, 29])
    torch.testing.assert_close(model.hidden(ids, rows=rows), model.hidden(ids).reshape(30, -1)[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vocab_size": "97"}, "'vocab_size' is missing or no integer"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is unknown here"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs the key 'low_freq_factor'"),
        ({"num_attention_heads": 5, "head_dim": 16}, "5 heads cannot share 2"),
    ],
)
def test_configs_that_cannot_be_loaded(change, message):
    with pytest.raises(LetheError, match=message):
        LlamaConfig.from_dict(raw_config(**change))


def test_bf16_head_of_a_saved_folder_is_not_doubled(tmp_path):
    from model.checkpoint import save_weights

    model = tiny_model(tmp_path)
    add_lora(model, 2, 2)
    save_weights(model, tmp_path / "again.safetensors", torch.bfloat16)
    written = load_file(tmp_path / "again.safetensors")
    assert set(written) == set(random_weights(raw_config())) and {t.dtype for t in written.values()} == {torch.bfloat16}
    assert not list(tmp_path.glob("*.partial"))
