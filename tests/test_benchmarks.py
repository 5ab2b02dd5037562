"""benchmarks/: the random model loads everywhere and is what its seed says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import raw_config, write_folder

from benchmarks.make_random_llama import main
from model import load_model, load_tokenizer

REPO = Path(__file__).parent.parent
ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}


@pytest.mark.parametrize("tied, shard_mib", [(True, 1024), (False, 0)], ids=["one file, tied", "a file a tensor"])
def test_transformers_agrees_on_a_random_model(tmp_path, tied, shard_mib):
    from transformers import AutoModelForCausalLM

    raw = raw_config(vocab_size=2048, tie_word_embeddings=tied, rope_scaling=ROPE, initializer_range=0.2, torch_dtype="float16")
    source = write_folder(tmp_path / "source", raw, tokenizer=True)
    (source / "model.safetensors").unlink()  # only the configuration is needed
    made = tmp_path / "made"
    assert main(["--config", str(source), "--out", str(made), "--shard_mib", str(shard_mib)]) == 0
    ids = torch.tensor([load_tokenizer(made).encode("If Ann has 12 pens and gives 5 away, how many are left?" * 6)])  # past the old context
    ours = load_model(made)(ids)
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.inference_mode():
        assert (ours - theirs(ids).logits).abs().max() < 1e-4 < ours.std()
    assert AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == torch.bfloat16
    files = sorted(file.name for file in made.glob("*.safetensors"))
    if shard_mib:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files and len(files) == len(theirs.state_dict()) == len(index["weight_map"])


def test_the_seed_is_the_model(tmp_path, capsys):
    source = write_folder(tmp_path / "source")

    def made(name, *more):
        assert main(["--config", str(source), "--out", str(tmp_path / name), *more]) == 0
        return load_model(tmp_path / name).state_dict()

    first, again, other = made("a"), made("b", "--shard_mib", "0"), made("c", "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert main(["--config", str(source), "--out", str(tmp_path / "a")]) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["--config", str(tmp_path), "--out", str(tmp_path / "d")]) == 2 and "config.json is missing" in capsys.readouterr().err


def test_it_is_a_command(tmp_path):
    script = REPO / "benchmarks" / "make_random_llama.py"
    source = write_folder(tmp_path / "source")
    command = [sys.executable, script, "--config", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "model.safetensors" in done.stdout, done.stderr
