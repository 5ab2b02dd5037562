"""Growth: the maps of the paper, every tensor where its map says, the logits of transformers, and no half-grown model."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_weights, raw_config, write_folder

from model import growth, load_model, stream
from model.growth import connection_rate, grow, grown_config, growth_timing, layer_map, main, new_layers
from study.errors import LetheError

REPO = Path(__file__).parent.parent
TOKENS = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(7))
STACK = list(range(6)) * 2


def source_of(folder: Path, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
    return write_folder(folder, raw_config(num_hidden_layers=layers, **changes), seed, dtype)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return load_model(folder)(TOKENS)


def refused(message: str, *args, **options) -> None:
    with pytest.raises(LetheError, match=message) as caught:
        grow(*args, **options)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Maps


@pytest.mark.parametrize(
    ("layers", "target", "order", "expected", "rate"),
    [
        (6, 24, "stack", list(range(6)) * 4, 20 / 23),
        (3, 6, "stack", [0, 1, 2, 0, 1, 2], 0.8),
        (8, 24, "stack", list(range(8)) * 3, 21 / 23),
        (3, 6, "interpolate", [0, 0, 1, 1, 2, 2], 0.4),
        (8, 24, "interpolate", [i // 3 for i in range(24)], 7 / 23),
        (6, 8, "gradual", [0, 1, 2, 3, 4, 5, 4, 5], 6 / 7),
        (6, 24, "gradual", list(range(6)) * 4, 20 / 23),  # 6 -> 12 -> 24
        (6, 14, "gradual", [*STACK, 4, 5], 11 / 13),  # 6 -> 12, then the top two of these
        (6, 20, "gradual", [*STACK, 4, 5, *range(6)], 16 / 19),  # the top eight of the twelve
        (6, 8, "stack", [0, 1, 2, 3, 4, 5, 0, 1], 6 / 7),
        (4, 6, "interpolate", [0, 0, 1, 2, 2, 3], 3 / 5),
        (6, None, "partial:12-345*7-6", [0, 1, *[2, 3, 4] * 7, 5], 17 / 23),
        (6, 24, "partial:123456*4", list(range(6)) * 4, 20 / 23),
        (6, None, "partial:1234-56*10", [0, 1, 2, 3, *[4, 5] * 10], 14 / 23),
        (12, None, "partial:1..8-5..12", [*range(8), *range(4, 12)], 14 / 15),  # as SOLAR is made
        (12, None, "partial:1,2,4..6*2-12,-7..12", [0, 1, 3, 4, 5, 0, 1, 3, 4, 5, 11, *range(6, 12)], None),
        (12, None, "partial:12*2-3..12", [0, 1, 0, 1, *range(2, 12)], None),  # digits are single layers
    ],
)
def test_maps(layers, target, order, expected, rate):
    found = layer_map(layers, target, order)
    assert found == expected
    assert rate is None or connection_rate(found) == pytest.approx(rate, abs=1e-12)


def test_connection_rates_of_the_paper():
    for (layers, target, order), rate in {(6, 24, "stack"): 0.8696, (8, 24, "stack"): 0.9130, (8, 24, "interpolate"): 0.3043,
                                          (6, 24, "gradual"): 0.8696, (3, 6, "interpolate"): 0.4}.items():  # fmt: skip
        assert round(connection_rate(layer_map(layers, target, order)), 4) == rate


@pytest.mark.parametrize(
    ("layers", "target", "order", "message"),
    [
        (6, 12, "stak", "--order 'stak' is unknown; known: stack, interpolate, gradual, partial:BLOCKS"),
        (6, 12, "stack:3", "is unknown"),
        (6, 6, "stack", "--order stack gives 6 layers; growth wants more than the source's 6"),
        (6, 5, "gradual", "gives 6 layers; growth wants more"),
        (6, None, "interpolate", "needs --layers or --factor"),
        (6, 12, "partial:123456*3", "gives 18 layers, not 12"),
        (6, None, "partial:", "the block '' is no list of layers"),
        (6, None, "partial:12--3", "the block '' is no list of layers"),
        (6, None, "partial:12-345x7-6", "the block '345x7' is no list of layers"),
        (6, None, "partial:123*0", "the block '123\\*0' is no list"),
        (6, None, "partial:127", "there is no layer 7; the source's layers are 1 to 6"),
        (6, None, "partial:0123456", "there is no layer 0"),
        (12, None, "partial:1..9-10-11,12", "there is no layer 0.*so layer 10 is written 10,"),
        (12, None, "partial:5..3", "'5..3' is no layer and no range"),
        (12, None, "partial:1...3", "is no layer and no range"),
        (6, None, "partial:654321", "gives 6 layers; growth wants more"),
    ],
)
def test_wrong_orders_are_told(layers, target, order, message):
    with pytest.raises(LetheError, match=message) as caught:
        layer_map(layers, target, order)
    assert "\n" not in str(caught.value)


def test_new_layers_are_the_later_copies():
    assert new_layers(STACK) == [6, 7, 8, 9, 10, 11]
    assert new_layers([0, 0, 1, 1, 2, 2]) == [1, 3, 5]
    assert new_layers(layer_map(6, 8, "gradual")) == [6, 7]
    assert new_layers(layer_map(6, None, "partial:12-345*2-6")) == [5, 6, 7]


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.581e9), (7e9, 2e12, 11.113e9), (13e9, 2e12, 15.844e9), (70e9, 2e12, 42.475e9), (7e9, 300e9, 20.481e9),
     (3e9, 300e9, 12.960e9)],
)  # fmt: skip
def test_growth_timing(parameters, tokens, expected):
    assert growth_timing(parameters, 6 * parameters * tokens) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(LetheError, match="wants parameters and FLOPs"):
        growth_timing(parameters, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("order", ["stack", "interpolate", "gradual", "partial:1-23*2-3"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}], ids=["tied", "untied, biases"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_where_the_map_says(tmp_path, order, changes, dtype):
    source = source_of(tmp_path / "source", dtype=dtype, **changes)
    found = grow(source, tmp_path / "out", order=order)
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert ("lm_head.weight" in after) == bool(changes) and (len(found.map) == 6 or order.startswith("partial"))
    expected = {name: tensor for name, tensor in before.items() if ".layers." not in name}
    for i, layer in enumerate(found.map):
        own = f"model.layers.{layer}."
        expected |= {name.replace(own, f"model.layers.{i}."): tensor for name, tensor in before.items() if name.startswith(own)}
    assert after.keys() == expected.keys() and found.tensors == len(after)
    assert all(after[name].dtype == dtype and torch.equal(after[name], expected[name]) for name in after)
    assert found.parameters == sum(p.numel() for p in load_model(tmp_path / "out").parameters())
    assert (found.zeroed, found.noised, found.logit_difference) == (0, 0, None)


def test_transformers_agrees_with_layers_copied_by_hand(tmp_path):
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    rope = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}
    source = source_of(tmp_path / "source", tie_word_embeddings=False, attention_bias=True, rope_scaling=rope)
    plan = grow(source, tmp_path / "out", factor=4).map
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    by_hand = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    originals = by_hand.model.layers
    by_hand.config.num_hidden_layers = len(plan)
    by_hand.model.layers = torch.nn.ModuleList()
    for i, layer in enumerate(plan):
        copy = LlamaDecoderLayer(by_hand.config, i)  # not a deep copy: a layer knows its place
        copy.load_state_dict(originals[layer].state_dict())
        by_hand.model.layers.append(copy.eval())
    with torch.inference_mode():
        grown, oracle = theirs(TOKENS, use_cache=False).logits, by_hand(TOKENS, use_cache=False).logits
    assert torch.equal(grown, oracle)
    assert (logits(tmp_path / "out") - oracle).abs().max() < 1e-4 < oracle.std()
    assert (logits(source) - oracle).abs().max() > 0.1  # stacking does not keep the function


@pytest.mark.parametrize(
    "order, options",
    [("stack", {"factor": 3}), ("interpolate", {}), ("gradual", {"layers": 5}), ("gradual", {"factor": 4}), ("partial:1-23*3", {})],
)
def test_zero_init_keeps_the_logits(tmp_path, order, options):
    source = source_of(tmp_path / "source", attention_bias=True, mlp_bias=True)
    found = grow(source, tmp_path / "out", order=order, zero_init=True, **options)
    difference = (logits(tmp_path / "out") - logits(source)).abs().max().item()
    assert difference <= 1e-5 and found.logit_difference <= 1e-5
    after, fresh = weights_of(tmp_path / "out"), new_layers(found.map)
    silent = {name for name, tensor in after.items() if not tensor.any()}
    assert silent == {f"model.layers.{i}.{linear}.{leaf}" for i in fresh for linear in ("self_attn.o_proj", "mlp.down_proj")
                      for leaf in ("weight", "bias")}  # fmt: skip
    assert found.zeroed == len(silent) == 4 * len(fresh)


def test_zero_init_wants_all_layers_in_their_order(tmp_path):
    source = source_of(tmp_path / "source")
    for order, shown in (("partial:23*3", "2 3"), ("partial:2-13*2", "2 1 3")):
        refused(f"--zero_init cannot keep the function: the layers first occur as {shown}, not as 1 to 3", source, tmp_path / "out",
                order=order, zero_init=True)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_zero_init_that_fails_is_told(tmp_path, monkeypatch):
    source = source_of(tmp_path / "source")
    monkeypatch.setattr(growth, "OUTPUTS", ("o_proj",))  # the MLPs of the copies would still add something
    refused("the grown model's logits differ by .* from the source's", source, tmp_path / "out", zero_init=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_models_too_large_to_load_are_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "LOADED_GIB", 1e-6)
    assert main(["--source", str(source_of(tmp_path / "source")), "--out", str(tmp_path / "out"), "--zero_init"]) == 0
    assert "logits not compared: too large to load in float32 here" in capsys.readouterr().out


def test_noise_has_its_variance(tmp_path):
    hidden, inner = 128, 192
    source = source_of(tmp_path / "source", 2, hidden_size=hidden, intermediate_size=inner, num_attention_heads=4, num_key_value_heads=4)
    found = grow(source, tmp_path / "out", noise=0.2, factor=2)
    before, after, noises = weights_of(source), weights_of(tmp_path / "out"), {}
    for name, tensor in after.items():
        origin = name.replace(".layers.2.", ".layers.0.").replace(".layers.3.", ".layers.1.")
        if "proj" not in name:
            assert torch.equal(tensor, before[origin])  # embedding and norms
            continue
        noise = (tensor.double() - 0.8 * before[origin].double()) / 0.2
        deep = name.endswith(("o_proj.weight", "down_proj.weight"))
        variance = 1 / (hidden * 4**2) if deep else 2 / (5 * hidden)
        # With n values the estimate of a variance has the relative deviation sqrt(2 / n), that of a mean sqrt(variance / n).
        n = noise.numel()
        assert abs(noise.var().item() / variance - 1) < 5 * math.sqrt(2 / n) and abs(noise.mean().item()) < 5 * math.sqrt(variance / n)
        noises[name] = noise / math.sqrt(variance)
    assert found.noised == len(noises) == 4 * 7
    flat = torch.stack([noise.flatten()[: hidden * hidden] for noise in noises.values()])
    correlation = torch.corrcoef(flat) - torch.eye(len(noises))
    assert correlation.abs().max() < 6 / hidden  # every tensor has its own


def test_noise_is_told_by_the_seed_alone(tmp_path):
    source = source_of(tmp_path / "source", dtype=torch.bfloat16)
    split = tmp_path / "split"
    grow(source, tmp_path / "a", noise=0.3, seed=5)
    grow(source, split, noise=0.3, seed=5, shard_size=1)
    grow(source, tmp_path / "c", noise=0.3, seed=6)
    one, again, other = weights_of(tmp_path / "a"), weights_of(split), weights_of(tmp_path / "c")
    assert len(list(split.glob("*.safetensors"))) == len(one)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("proj" not in name) for name in one)
    # The source's tensors in other files, too, give the same bytes.
    cut = tmp_path / "cut"
    shutil.copytree(source, cut)
    whole = load_file(cut / "model.safetensors")
    (cut / "model.safetensors").unlink()
    names = sorted(whole, reverse=True)
    files = {name: f"model-0000{k % 3 + 1}-of-00003.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: whole[name] for name in names if files[name] == file}, cut / file, metadata={"format": "pt"})
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    grow(cut, tmp_path / "d", noise=0.3, seed=5)
    assert bytes_of(tmp_path / "d") == bytes_of(tmp_path / "a")


def test_zero_init_with_noise_is_noise_alone(tmp_path):
    source = source_of(tmp_path / "source")
    found = grow(source, tmp_path / "out", noise=0.5, zero_init=True)
    after = weights_of(tmp_path / "out")
    std = after["model.layers.4.mlp.down_proj.weight"].std().item()
    assert std == pytest.approx(0.5 / math.sqrt(64) / 6, rel=0.1) and found.logit_difference is None and found.zeroed == 0
    assert after["model.layers.1.mlp.down_proj.weight"].std() > 2 * std  # an original keeps half of itself


def test_shards_and_index(tmp_path):
    from transformers import AutoModelForCausalLM

    source, out = source_of(tmp_path / "source", tie_word_embeddings=False), tmp_path / "out"
    grow(source, tmp_path / "whole")
    found = grow(source, out, shard_size="100KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors" and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == found.nbytes == sum(t.nbytes for t in weights_of(out).values())
    assert all((out / name).stat().st_size < 110_000 for name in files)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(TOKENS).logits
    assert torch.equal(logits(out), logits(tmp_path / "whole")) and (logits(out) - theirs).abs().max() < 1e-4


def test_mixed_dtypes_and_doubled_heads(tmp_path):
    """Norms in float32 beside bfloat16 of odd length; a tied head that is stored all the same, and rotary buffers, are left out."""
    raw = raw_config(num_hidden_layers=2, vocab_size=97)
    weights = {name: t if "norm" in name else t.bfloat16() for name, t in random_weights(raw).items()}
    source = write_folder(tmp_path / "source", raw)
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**weights, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "out", zero_init=True)
    after = weights_of(tmp_path / "out")
    assert not extra.keys() & after.keys() and after["model.norm.weight"].dtype == torch.float32
    assert (logits(tmp_path / "out") - logits(source)).abs().max() <= 1e-5


def test_config_and_other_files(tmp_path):
    odd = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "eos_token_id": [1, 2, 3], "mlp_only_layers": [],
           "custom": {"kept": [1, None]}, "torch_dtype": "float32"}  # fmt: skip
    source = write_folder(tmp_path / "source", raw_config(num_hidden_layers=3, vocab_size=2048, **odd), tokenizer=True)
    for name in ("LICENSE.txt", "chat_template.jinja", "tokenizer.model"):
        (source / name).write_text(name)
    (source / "optimizer.pt").write_bytes(b"x")
    found = grow(source, tmp_path / "out", order="interpolate", layers=5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.map == [0, 0, 1, 1, 2] and config.pop("num_hidden_layers") == 5
    full, sliding = "full_attention", "sliding_attention"
    assert config.pop("layer_types") == [full, full, sliding, sliding, full]
    before = json.loads((source / "config.json").read_text())
    assert config == {key: value for key, value in before.items() if key not in ("num_hidden_layers", "layer_types")}
    copied = {"LICENSE.txt", "chat_template.jinja", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "generation_config.json"}  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied | {"config.json", "growth.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_growth_json_tells_all(tmp_path):
    source = source_of(tmp_path / "source")
    found = grow(source, tmp_path / "out", order="partial:1-23*2-3", noise=0.1, seed=3)
    told = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert told == dataclasses.asdict(found)
    assert told["source_fingerprint"] == load_model(source).fingerprint and told["fingerprint"] == load_model(tmp_path / "out").fingerprint
    assert (told["map"], told["connection_rate"], told["seed"]) == ([0, 1, 2, 1, 2, 2], 0.6, 3)


def test_the_config_of_three_layers_is_not_confused_with_three_end_tokens():
    raw = {"num_hidden_layers": 2, "eos_token_id": [5, 6], "layer_types": ["a", "b"], "no_rope_layers": [1, 0], "skip_layers": [1]}
    assert grown_config(raw, [0, 1, 0]) == {**raw, "num_hidden_layers": 3, "layer_types": ["a", "b", "a"], "no_rope_layers": [1, 0, 1]}


# ----------------------------------------------------------------------------------------------------------------------
# What can go wrong


@pytest.mark.parametrize("options, message", [
    ({"factor": 2, "layers": 6}, "--factor or --layers, not both"), ({"factor": 1}, "--factor must be 2 or more, not 1"),
    ({"layers": 3}, "--layers 3: growth wants more than the source's 3"), ({"noise": 1.0}, "--noise must be at least 0 and below 1"),
    ({"noise": float("nan")}, "--noise must be"), ({"shard_size": "5 apples"}, "--shard_size '5 apples' is no size"),
    ({"order": "partial:123*2", "factor": 4}, "gives 6 layers, not 12"),
])  # fmt: skip
def test_wrong_settings(tmp_path, options, message):
    refused(message, source_of(tmp_path / "source"), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_places_that_are_refused(tmp_path):
    source = source_of(tmp_path / "source")
    refused("is the source or lies in it", source, source)
    refused("is the source or lies in it", source, source / "grown")
    (tmp_path / "link").symlink_to(source)
    refused("is the source or lies in it", source, tmp_path / "link")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refused("full is not empty; give a new folder", source, tmp_path / "full")
    refused("thesis.txt is a file; give a new folder", source, tmp_path / "full" / "thesis.txt")
    refused("no model folder", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    grow(source, tmp_path / "empty")
    assert load_model(tmp_path / "empty").config.num_hidden_layers == 6


def test_the_same_growth_again_is_left_and_another_refused(tmp_path):
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    found = grow(source, out, zero_init=True)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert grow(source, out, layers=6, zero_init=True) == found
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    refused("holds another growth", source, out)
    refused("holds another growth", source_of(tmp_path / "other", seed=1), out, zero_init=True)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused("model.safetensors is cut", source, out, zero_init=True)
    (out / "growth.json").write_text("{}")
    refused("growth.json is not as growth writes it", source, out, zero_init=True)


def test_sources_that_are_refused(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused("is an adapter, and adapters are not grown; merge it", adapter, tmp_path / "out")
    source = source_of(tmp_path / "source")
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 300, len(whole) - 1):
        file.write_bytes(whole[:keep])
        refused("model.safetensors is cut or no safetensors file", source, tmp_path / "out")
    file.write_bytes(whole)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    refused("misses tensors: model.layers.3", source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    refused("only 'llama' can be loaded", source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    weights = {**load_file(file), "model.norm.weight": torch.ones(64, dtype=torch.int8)}
    save_file(weights, file)
    refused("model.norm.weight is I8; weights are F64, F32, F16, BF16 here", source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


def test_too_little_space(tmp_path, monkeypatch):
    source = source_of(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused("no space left for .*out: it takes", source, tmp_path / "out")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_growth_leaves_nothing(tmp_path, monkeypatch, fault):
    source, real, left = source_of(tmp_path / "source"), stream.chunks, [12]

    def chunks(piece):
        left[0] -= 1
        if not left[0]:
            raise fault
        return real(piece)

    monkeypatch.setattr(growth, "chunks", chunks)
    with pytest.raises((KeyboardInterrupt, LetheError)) as caught:
        grow(source, tmp_path / "out", shard_size=1)
    assert fault is KeyboardInterrupt or "no space left" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_growth_is_no_model_and_is_swept_away(tmp_path):
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    work = (
        "import sys, time; from model import growth\n"
        "def stop(*_):\n    print('now', flush=True); time.sleep(60)\n"
        "growth.verify = stop\n"
        "growth.grow(*sys.argv[1:])\n"
    )
    command = subprocess.Popen([sys.executable, "-c", work, source, out], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline() == "now\n"
    command.send_signal(signal.SIGKILL)
    command.wait()
    (left,) = (path for path in tmp_path.iterdir() if path != source)
    assert left.name.startswith(".out.") and not (left / "config.json").exists()
    with pytest.raises(LetheError, match="config.json is missing"):
        load_model(left)
    alive = tmp_path / ".out.1.growing"  # the folder of a process that lives
    alive.mkdir()
    (tmp_path / f".out.{os.getpid()}.growing").mkdir()  # of a process that had this one's number
    grow(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "out", "source"]


@pytest.mark.parametrize("harm", ["byte", "lost"])
def test_damage_while_writing_is_seen(tmp_path, monkeypatch, harm):
    source, real = source_of(tmp_path / "source"), growth.write_weights

    def write(folder, work, most, total):
        real(folder, work if harm == "byte" else work[:-1], most, total)
        if harm == "byte":
            file = folder / "model.safetensors"
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)

    monkeypatch.setattr(growth, "write_weights", write)
    refused("is not as it was written|does not hold what was written", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ----------------------------------------------------------------------------------------------------------------------
# The command, and memory


def test_the_command(tmp_path, capsys):
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    (source / "adapter_config.json").write_text("{}")
    assert main(["--source", str(source), "--out", str(out), "--order", "partial:1-23*2", "--zero-init", "--tokens", "300e9"]) == 0
    told = capsys.readouterr()
    for line in ("layers           5 by partial:1-23*2: 1-3 2-3", "connection rate  0.750", "47 tensors: 43 equal to their source, 4 zero",
                 "o_proj and down_proj of 2 copies; logits kept to", "timing law       for 3e+11 tokens in all: train"):  # fmt: skip
        assert line in told.out, told.out
    assert "holds an adapter too; adapters are not grown" in told.err
    assert main(["--source", str(source), "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: --out ") and told.err.count("\n") == 1 and not told.out


MEASURE = """
import sys
from pathlib import Path
from model.growth import grow
def resident(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
found = grow(sys.argv[1], sys.argv[2], noise=float(sys.argv[3]))
print(resident("VmHWM") - before, found.nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="writes to /proc")
@pytest.mark.parametrize("noise", [0, 0.2])
def test_memory_is_below_two_layers_and_the_embedding(tmp_path, noise):
    source = source_of(tmp_path / "source", 6, torch.bfloat16, vocab_size=16000, hidden_size=1024, intermediate_size=2048)
    done = subprocess.run([sys.executable, "-c", MEASURE, source, tmp_path / "out", str(noise)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra, nbytes = map(int, done.stdout.split())
    embedding = 2 * 16000 * 1024
    assert extra < 2 * (nbytes - embedding) / 12 + embedding < nbytes / 3


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, REPO / "benchmarks" / "growth.py", "--toy", "--zero_init", "--scratch", tmp_path, "--dtype", "float32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 4 and found["max_logit_difference"] < 1e-4 < found["logit_spread"] and found["argmax_same"] == 16
