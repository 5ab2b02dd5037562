"""LoRA against PEFT: the same files, the same logits; what does not fit is refused by name; dropout that does not depend on the split."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_examples, random_weights, raw_config, tiny_model, train_some, write_folder
from transformers import LlamaForCausalLM

from data.batching import collate
from kernels.dropout import drop
from lora import add_lora, load_adapter, merge_adapter, save_adapter
from lora.layers import dropout_keys, lora_layers, lora_parameters, merged, remove_lora, target_names
from lora.merge import main as merge_main
from lora.merge import merge
from lora.resume import Learner
from model import load_model
from study.errors import LetheError
from train import fit

IDS = torch.randint(0, 97, (3, 30), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def peer(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(folder, **settings):
    """A toy model with an adapter that does something."""
    model = tiny_model(folder)
    add_lora(model, **{"rank": 4, "alpha": 8.0, **settings})
    train_some(model)
    return model


# PEFT's files


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"rank": 3, "alpha": 5.0}, {"targets": "q_proj,down_proj"}, {"dropout": 0.3}])
def test_peft_reads_our_adapter(tmp_path, settings):
    model = trained(tmp_path / "base", **settings)
    save_adapter(model, tmp_path / "adapter", "some/base")
    theirs = PeftModel.from_pretrained(peer(tmp_path / "base"), tmp_path / "adapter")
    assert (logits(model) - logits(load_model(tmp_path / "base"))).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/base"


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_SETTINGS = {
    "all": {"target_modules": EVERY},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": EVERY, "use_rslora": True},
    "two targets": {"target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "target_modules": EVERY, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.v_proj": 32},
    },
    "rslora with patterns": {"target_modules": EVERY, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "regex": {"target_modules": r".*layers\.1\..*(q_proj|gate_proj)"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "o_proj"]},
    "excluded": {"target_modules": EVERY, "exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    "excluded by regex": {"target_modules": EVERY, "exclude_modules": r".*layers\.1\.mlp.*"},
    "gaussian": {"target_modules": EVERY, "init_lora_weights": "gaussian"},
    "defaults": {"target_modules": None, "r": 8, "lora_alpha": 8},
}  # fmt: skip


def peft_adapter(base, folder, **settings):
    """An adapter written by PEFT with random B; returns PEFT's model."""
    torch.manual_seed(3)
    model = get_peft_model(peer(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", PEFT_SETTINGS)
def test_we_read_pefts_adapter(tmp_path, kind):
    base = write_folder(tmp_path / "base")
    theirs = peft_adapter(base, tmp_path / "adapter", **PEFT_SETTINGS[kind])
    if kind == "defaults":  # a minimal file: what is absent has PEFT's default
        (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in lora_parameters(ours)) == sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    # Written again, it means the same to both.
    save_adapter(ours, tmp_path / "again")
    back = load_model(base)
    load_adapter(back, tmp_path / "again")
    assert torch.equal(logits(back), logits(ours))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(peer(base), tmp_path / "again").eval()), logits(ours), rtol=1e-5, atol=1e-5)


def test_a_name_is_matched_at_its_dots(tmp_path):
    """layers.1 must not take layers.11 with it."""
    base = write_folder(tmp_path / "base", raw_config(num_hidden_layers=12, hidden_size=16, intermediate_size=16, head_dim=4))
    theirs = peft_adapter(base, tmp_path / "adapter", target_modules=["1.self_attn.q_proj", "v_proj"])
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert "model.layers.11.self_attn.q_proj" not in lora_layers(ours)


# What is refused


@pytest.fixture
def pair(tmp_path):
    model = trained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def refused(pair, message):
    model = load_model(pair[0])
    before = logits(model)
    with pytest.raises(LetheError, match=message) as caught:
        load_adapter(model, pair[1])
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before) and not lora_layers(model)


def change_tensors(pair, change, metadata=None):
    file = pair[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})


def change_config(pair, **changes):
    file = pair[1] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_renamed_keys(pair):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    change_tensors(pair, strip)
    refused(pair, "misses base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, .* and 25 more and has unexpected model.layers")
    refused(pair, "keys should begin with base_model.model.model.layers")


def test_one_missing_and_one_foreign(pair):
    change_tensors(pair, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t.pop(FIRST)}))
    refused(pair, f"misses {FIRST} and has unexpected base_model.model.lm_head.lora_A.weight")


def test_wrong_shape(pair):
    change_tensors(pair, lambda t: t.update({FIRST: t[FIRST].T.contiguous()}))
    refused(pair, rf"{FIRST} is \(64, 4\), expected \(4, 64\)")
    change_tensors(pair, lambda t: t.update({FIRST: t[FIRST].T.contiguous()}))
    change_config(pair, r=5)
    refused(pair, r"is \(4, 64\), expected \(5, 64\).* and 25 more")


def test_another_base(pair, tmp_path):
    other = write_folder(tmp_path / "other", seed=9)
    refused((other, pair[1]), "was trained on another base .fingerprint .*, base unnamed.; this model's is .*Give the --model")


def test_never_trained(pair):
    change_tensors(pair, lambda t: [t[name].zero_() for name in t if "lora_B" in name])
    refused(pair, "every lora_B is zero, so the adapter would do nothing")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(pair, value):
    change_tensors(pair, lambda t: t[FIRST].view(-1)[7].fill_(value))
    refused(pair, f"{FIRST} holds NaN or infinity")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [1]),
        ("layers_to_transform", 0), ("fan_in_fan_out", True), ("lora_bias", True), ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]), ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [3]), ("target_parameters", ["x"]),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
    ],
)  # fmt: skip
def test_features_beyond_lora(pair, key, value):
    change_config(pair, **{key: value})
    refused(pair, f"{key}=.* is not supported; merge that adapter with PEFT")


def test_other_files(pair, tmp_path):
    change_config(pair, peft_type="IA3")
    refused(pair, "peft_type 'IA3' is not LORA")
    change_config(pair, peft_type="LORA", target_modules=["q_proj", "lm_head"])
    refused(pair, "LoRA target 'lm_head' is unknown")
    change_config(pair, target_modules="nothing.*")
    refused(pair, "target_modules 'nothing.*' match no linear")
    change_config(pair, target_modules=EVERY)
    file = pair[1] / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(pair, "adapter_model.safetensors is cut or no safetensors file")
    file.unlink()
    refused(pair, "holds no adapter_config.json with adapter_model.safetensors; is it a run folder")
    (pair[1] / "adapter_model.bin").write_bytes(b"x")
    refused(pair, "pickled adapter_model.bin, which is never opened")
    refused((pair[0], tmp_path / "nowhere"), "no adapter folder")


def test_settings_out_of_range(tmp_path):
    model = tiny_model(tmp_path)
    wrong = {"rank": (0, "at least 1"), "dropout": (1.0, r"must lie in \[0, 1\)"), "targets": ("q", "target 'q' is unknown")}
    for key, (value, message) in wrong.items():
        with pytest.raises(LetheError, match=message):
            add_lora(model, **{key: value})
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, tmp_path / "x")
    assert target_names("all") == target_names("all-linear") and target_names(" q_proj, v_proj") == ("q_proj", "v_proj")


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_restores_bit_for_bit(tmp_path, dtype):
    model = tiny_model(tmp_path, dtype)
    add_lora(model, 4, 8.0)
    train_some(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, fingerprint = logits(model), model.fingerprint
    with pytest.raises(RuntimeError, match="inside"), merged(model):
        changed = model.model.layers[0].mlp.up_proj.weight
        assert not lora_layers(model) and not torch.equal(changed, before["model.layers.0.mlp.up_proj.weight"])
        raise RuntimeError("inside")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), expected) and len(lora_layers(model)) == 14 and model.fingerprint == fingerprint


def test_merged_on_a_model_that_has_not_run_yet(tmp_path):
    """The first pass joins the weights of q, k, v into new memory: what comes back must come back there."""
    save_adapter(trained(tmp_path / "base"), tmp_path / "adapter")
    expected = logits(load_model(tmp_path / "base"))
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    with merged(model):
        assert not torch.equal(logits(model), expected)
    remove_lora(model)
    assert torch.equal(logits(model), expected)


def test_merged_keeps_the_mode_set_inside(tmp_path):
    model = trained(tmp_path, dropout=0.5)
    model.train()
    with merged(model):
        model.eval()
    assert not any(module.training for module in model.modules())


def test_merge_equals_the_adapter(tmp_path):
    model = trained(tmp_path / "base", rslora=True)
    save_adapter(model, tmp_path / "adapter")
    expected, fingerprint = logits(model), model.fingerprint
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters()) and set(model.state_dict()) == set(random_weights(raw_config()))
    assert model.fingerprint != fingerprint
    with pytest.raises(LetheError, match="another base"):  # put on twice, it would count double
        load_adapter(model, tmp_path / "adapter")


def test_remove_gives_the_base_back(tmp_path):
    base = tiny_model(tmp_path)
    expected = logits(base)
    add_lora(base, 2, 2)
    assert torch.equal(logits(base), expected)  # B is zero
    train_some(base)
    add_lora(base, 3, 3)  # replaces
    assert torch.equal(logits(base), expected) and all(layer.rank == 3 for layer in lora_layers(base).values())
    remove_lora(base)
    assert torch.equal(logits(base), expected) and not lora_layers(base)


def nano_like(folder):
    return write_folder(folder, raw_config(vocab_size=2048), tokenizer=True)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merge_command(tmp_path, capsys, dtype):
    base = nano_like(tmp_path / "base")
    model = load_model(base)
    add_lora(model, 4, 8.0)
    train_some(model)
    save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "merged"
    argv = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(out), "--dtype", dtype]
    assert merge_main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "merge_report.json").read_text()) and report["tokens"] > 30
    assert report["max_logit_difference"] < (1e-4 if dtype == "auto" else 0.5)
    assert report["argmax_agreement"] > (0.999 if dtype == "auto" else 0.8)
    theirs = LlamaForCausalLM.from_pretrained(out)
    assert theirs.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    if dtype == "auto":
        torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=1e-5, atol=3e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    capsys.readouterr()
    assert merge_main(argv) == 2
    assert capsys.readouterr().err == f"error: --out {out} is not empty; give a new folder\n"


def test_merge_refusals(tmp_path):
    base = nano_like(tmp_path / "base")
    with pytest.raises(LetheError, match="no adapter folder"):
        merge(str(base), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(LetheError, match="--dtype 'int8' is unknown"):
        merge(str(base), tmp_path / "nowhere", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


# Starting values and dropout


def keys_of(seed, step, examples, length):
    """Row keys of examples that are `length` tokens long each."""
    return dropout_keys(seed, step, examples.repeat_interleave(length), torch.arange(length).repeat(len(examples)))


def test_starting_values_are_pefts(tmp_path):
    model = tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256, head_dim=32)
    add_lora(model, 64, 64.0, generator=torch.Generator().manual_seed(0))
    theirs = dict(get_peft_model(peer(tmp_path / "base"), LoraConfig(r=64, target_modules=EVERY)).named_parameters())
    for name, layer in lora_layers(model).items():
        other = theirs[f"base_model.model.{name}.lora_A.default.weight"]
        bound = 1 / math.sqrt(layer.linear.in_features)
        assert layer.lora_A.abs().max() <= bound and other.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert other.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.lora_B.any()
    first = [p.clone() for p in lora_parameters(model)]
    add_lora(model, 64, 64.0, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first, lora_parameters(model), strict=True))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_statistics(p):
    rows, columns = 2048, 512
    keys = keys_of(0, 5, torch.arange(32), rows // 32)
    x = torch.ones(rows, columns)
    masks = [drop(x, p, keys, salt) for salt in (1, 2, 3, 225)]
    spread = math.sqrt(p / (1 - p))  # of an element, whose mean is 1
    for mask in masks:
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
        assert abs(mask.mean() - 1) < 5 * spread / math.sqrt(mask.numel())
        # Means over a row or a column vary as independent draws would.
        assert mask.mean(0).std().item() == pytest.approx(spread / math.sqrt(rows), rel=0.15)
        assert mask.mean(1).std().item() == pytest.approx(spread / math.sqrt(columns), rel=0.15)
    limit = 5 / math.sqrt(x.numel())

    def correlation(a, b):
        return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item())

    for i, one in enumerate(masks):
        assert all(correlation(one, other) < limit for other in masks[i + 1 :])  # between projections
        assert correlation(one[1:], one[:-1]) < limit and correlation(one[:, 1:], one[:, :-1]) < limit  # between neighbours
        assert correlation(one[64:], one[:-64]) < limit  # the same position of the next example


def test_dropout_is_a_function_of_its_key(tmp_path):
    x, examples = torch.randn(20, 16), torch.tensor([4, 8])
    keys = keys_of(1, 2, examples, 10)
    assert torch.equal(drop(x, 0.3, keys, 1), drop(x, 0.3, keys, 1))
    others = [keys_of(2, 2, examples, 10), keys_of(1, 3, examples, 10), keys_of(1, 2, examples + 1, 10)]
    assert not any((keys == other).any() for other in others) and len(keys.unique()) == 20
    # Another length and another place in the pack leave an example's keys alone.
    longer = keys_of(1, 2, torch.tensor([7, 8, 4]), 25).view(3, 25)
    assert torch.equal(longer[2, :10], keys.view(2, 10)[0]) and torch.equal(longer[1, :10], keys.view(2, 10)[1])
    model = tiny_model(tmp_path)
    add_lora(model, 4, 4.0, dropout=0.5)
    train_some(model.train())
    assert not torch.equal(logits(model), logits(model))  # without keys: torch's generator
    assert keys_of(2**40 + 3, 10**6, torch.tensor([10**9]), 3).dtype == torch.int32


def test_no_dropout_is_bit_equal(tmp_path):
    model = trained(tmp_path)
    expected = logits(model)
    model.train()
    assert torch.equal(logits(model), expected)
    model.adapter.dropout = 0.4
    assert not torch.equal(logits(model), expected)
    model.eval()
    assert torch.equal(logits(model), expected)


def gradients(model, micros, seed=0):
    """The gradients that one step of the loop hands to its optimizer."""
    found = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            found.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    settings = {"micro_tokens": 1, "max_grad_norm": 0, "seed": seed}
    (step,) = fit(model, Learner(model, lora_parameters(model), lambda p: [Spy(p, lr=0.1)]), lambda *_: micros, 1, **settings)
    return step, found


@pytest.mark.parametrize("saving", [False, True])
def test_a_step_does_not_depend_on_its_split(tmp_path, saving):
    model = trained(tmp_path, dropout=0.25)
    model.gradient_checkpointing = saving
    examples = random_examples(16)
    weights = torch.rand(int(examples.completion_offsets[-1]), generator=torch.Generator().manual_seed(2))
    weights = (weights * (weights > 0.3)).numpy()
    results = [gradients(model, collate(examples, list(range(16)), size, weights)) for size in (10_000, 150, 1)]
    first, expected = results[0]
    for step, found in results[1:]:
        assert step.loss == pytest.approx(first.loss, rel=1e-6) and step.kept == first.kept and step.tokens == first.tokens
        for one, other in zip(expected, found, strict=True):
            assert (one - other).norm() <= 1e-6 * one.norm()
    _, another = gradients(model, collate(examples, list(range(16)), 10_000, weights), seed=1)
    assert (expected[0] - another[0]).norm() > 0.01 * expected[0].norm()  # dropout did act
