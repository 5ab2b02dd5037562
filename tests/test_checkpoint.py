"""Loading models: every broken folder is one clear error, the hub is asked once, memory stays near the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_weights, raw_config, tiny_model, write_folder

from model import load_model, load_tokenizer
from model.checkpoint import fetch_from_hub, find_model
from study.errors import LetheError

REPO = Path(__file__).parent.parent


def refused(folder, message):
    with pytest.raises(LetheError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def rewrite(folder, change):
    """The folder's weights after `change` has had its way with the dict of them."""
    weights = random_weights(json.loads((folder / "config.json").read_text()))
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


def test_no_such_model(tmp_path):
    refused(tmp_path / "nowhere", "no model folder '.*nowhere' here, and it is no hub id")
    (tmp_path / "weights.bin").write_text("x")
    refused(tmp_path / "weights.bin", "is a file; --model wants the folder")


def test_config_is_missing_cut_or_lacks_a_key(folder):
    file = folder / "config.json"
    text = file.read_text()
    file.write_text(text[:40])
    refused(folder, "config.json is no valid JSON")
    file.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "intermediate_size"}))
    refused(folder, "config.json: the key 'intermediate_size' is missing")
    file.write_text("[1, 2]")
    refused(folder, "config.json holds a list, not an object")
    file.unlink()
    refused(folder, "config.json is missing; a model folder holds")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_cut_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors is cut or no safetensors file .*fetch it again")


def test_missing_shard_and_broken_index(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    refused(folder, "model-00001-of-00002.safetensors is missing, though model.safetensors.index.json names it")
    index.write_text("{}")
    refused(folder, "index.json names no file")


def test_misfits_are_named(folder):
    rewrite(folder, lambda w: [w.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)])
    refused(folder, r"misses tensors: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight; its config")
    rewrite(folder, lambda w: w.update({f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2, 2) for i in (2, 3, 4, 5)}))
    refused(folder, "unexpected tensors: model.layers.2.*, model.layers.3.*, model.layers.4.* and 1 more")
    rewrite(folder, lambda w: w.update({"model.norm.weight": torch.ones(63)}))
    refused(folder, r"misshapen tensors: model.norm.weight \(63,\), expected \(64,\)")


def test_a_missing_head_is_named(tmp_path):
    untied = raw_config(tie_word_embeddings=False)
    refused(write_folder(tmp_path, untied, weights=random_weights(raw_config())), "misses tensors: lm_head.weight")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.00.pth", "Meta's own layout .*fetch the Hugging Face version"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights .*never opened"),
        ("readme.txt", "holds no model.safetensors"),
    ],
)
def test_other_layouts(folder, name, message):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, message)


def test_tokenizer_missing_or_cut(tmp_path):
    folder = write_folder(tmp_path, tokenizer=True)
    file = folder / "tokenizer.json"
    assert load_tokenizer(folder).template == "plain"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(LetheError, match="tokenizer.json is cut or no tokenizer file"):
        load_tokenizer(folder)
    file.unlink()
    with pytest.raises(LetheError, match="tokenizer.json is missing; copy it"):
        load_tokenizer(folder)


def test_fingerprint_tells_models_apart(tmp_path):
    one, again, other = (tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.fingerprint == again.fingerprint != other.fingerprint and len(one.fingerprint) == 16
    low = load_model(tmp_path / "a", torch.bfloat16)
    assert low.fingerprint == one.fingerprint  # of the file, not of the dtype it is used in
    assert not any(parameter.requires_grad for parameter in one.parameters()) and not one.training


def test_hub_id_offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = rf"owner/some-model is not in the cache \({tmp_path}\).*hf download owner/some-model.*local folder"
    with pytest.raises(LetheError, match=said):
        find_model("owner/some-model")


def test_gated_comes_before_not_found(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        status_code, headers, request = 403, {}, None

    def gate(*_, **__):
        raise errors.GatedRepoError("403 Client Error", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gate)
    with pytest.raises(LetheError, match="meta-llama/Llama-3.2-1B is gated: accept its licence at https://.*hf auth login.*local folder"):
        fetch_from_hub("meta-llama/Llama-3.2-1B")


ASK = """
import sys
from model import load_model, load_tokenizer
from study.errors import LetheError
for name in sys.argv[1:]:
    try:
        print(name, load_model(name).fingerprint, load_tokenizer(name).vocab_size)
    except LetheError as error:
        print(name, "error:", error)
"""


def ask(url, home, *names, offline="0"):
    """Loads models by hub id in another process, since the hub's address is read at import."""
    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", ASK, *names], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_hub_models_are_fetched_and_then_cached(tmp_path, hub):
    url, files, asked = hub
    folder = write_folder(tmp_path / "model", tokenizer=True)
    for file in folder.iterdir():
        files[f"owner/tiny/{file.name}"] = files[f"gated/tiny/{file.name}"] = file.read_bytes()
    for unwanted in ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json"):
        files[f"owner/tiny/{unwanted}"] = b"{}"
    good, gated, unknown, malformed = ask(url, tmp_path / "hf", "owner/tiny", "gated/tiny", "owner/nothing", "owner/a--b")
    expected = f"owner/tiny {load_model(folder).fingerprint} 2048"
    assert good == expected
    assert "gated/tiny is gated: accept its licence" in gated
    assert "no model 'owner/nothing': no such folder here and no such repository on the hub" in unknown
    assert "error:" in malformed and "owner/a--b" in malformed
    assert not any("original" in line or ".bin" in line for line in asked if "resolve" in line)
    # Without the network the cached one still loads, and another says what to do.
    before = len(asked)
    cached, absent = ask(url, tmp_path / "hf", "owner/tiny", "owner/other", offline="1")
    assert cached == expected and "owner/other is not in the cache" in absent and len(asked) == before


MEASURE = """
import sys, threading
import torch
from model import load_model
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
torch.zeros(8) @ torch.zeros(8)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], torch.bfloat16)
done.set(); thread.join()
print(max(peak, anonymous()) - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    raw = raw_config(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=16, head_dim=64)
    block = torch.randn(32000 * 1024, dtype=torch.bfloat16)
    from model.llama import Llama, LlamaConfig

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(LlamaConfig.from_dict(raw)).named_parameters()}
    weights = {name: block[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}
    folder = write_folder(tmp_path, raw, dtype=torch.bfloat16, weights=weights)
    del weights
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    grown, size = map(int, run.stdout.split())
    assert size > 200e6 and grown <= 1.15 * size + 8e6, (grown, size)
