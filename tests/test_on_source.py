"""--train_on_source: loss on prompts too, against transformers with labels = input_ids; what is scored stays as it is."""

import numpy as np
import pytest
import torch
from tiny import cells, one_line, words
from transformers import LlamaForCausalLM

import train
from data.batching import step_indices, tokenize
from data.builtin import builtin_task
from data.folder import find_task
from model import load_tokenizer
from study.config import parse
from study.folder import read_json, read_jsonl
from study.identity import differences, identity_of


def test_everything_but_the_first_token_is_completion(tmp_path):
    nano, task = load_tokenizer("nano"), find_task("mini_svamp")
    plain = tokenize(task.train(), nano, 40, "f", tmp_path, 50)
    whole = tokenize(task.train(), nano, 40, "f", tmp_path, 50, on_source=True)
    assert plain.key != whole.key and np.array_equal(plain.flat, whole.flat) and np.array_equal(plain.offsets, whole.offsets)
    assert (whole.starts == 1).all() and (plain.starts > 1).all() and whole.ids(0)[0] == nano.bos
    assert whole.report["trainable_tokens"] == len(whole.flat) - 50
    assert whole.report["truncated_prompts"] == plain.report["truncated_prompts"] > 0


def test_loss_equals_transformers(tiny, tmp_path, monkeypatch):
    """The first step's, before which the adapter is zero; and the base is scored as without it."""
    monkeypatch.setattr("study.report.draw_all", lambda rows, folder: [])
    for out, more in (("on", ["--train_on_source"]), ("off", [])):
        assert train.main(words(tiny, tmp_path / out, "--stage", 1, *more)) == 0
    peer = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    nano = load_tokenizer("nano")
    rows = [(row["instruction"], row["input"], row["output"]) for row in builtin_task("mini_svamp")["train"][:24]]
    chosen, losses = step_indices(24, 8, 0, 0), {"on": [], "off": []}
    for instruction, question, answer in (rows[i] for i in chosen):
        prompt = nano.render_prompt((("user", f"{instruction}\n{question}"),))
        ids = torch.tensor([prompt + nano.render_answer(answer)])
        answer_only = ids.clone()
        answer_only[0, : len(prompt)] = -100
        for name, labels in (("on", ids), ("off", answer_only)):
            count = int((labels[0, 1:] != -100).sum())
            with torch.no_grad():
                losses[name].append((float(peer(ids, labels=labels).loss) * count, count))
    for name, parts in losses.items():
        expected = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
        assert read_jsonl(tmp_path / name / "lora_base/mini_svamp/metrics.jsonl")[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    on, off = cells(tmp_path / "on"), cells(tmp_path / "off")
    base = [name for name in on if name.startswith("base")]
    assert base and all(on[name] == off[name] for name in base)
    settings = read_json(tmp_path / "on/study.json")["identity"]["settings"]
    assert settings["train_on_source"] is True


def test_rehearsed_rows_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("study.report.draw_all", lambda rows, folder: [])
    more = ["--train_on_source", "--sequence", "mini_svamp,mini_simpleqa", "--rehearsal", "random"]
    assert train.main(words(tiny, tmp_path / "s", *more)) == 0
    manifests = [read_json(file) for file in (tmp_path / "s").rglob("run.json")]
    assert any(found["rehearsal"] for found in manifests)
    for found in manifests:
        assert found["data"]["trainable_tokens"] == found["data"]["tokens"] - found["examples"]


def test_it_goes_with_no_mask(tiny, tmp_path, capsys):
    for more in ([], ["--mask", "highest"], ["--sequence", "mini_svamp,mini_simpleqa", "--mask", "highest"]):
        told = one_line(words(tiny, tmp_path / "x", "--train_on_source", *more), capsys)
        assert "--train_on_source trains on whole prompts" in told and "give --mask none" in told
    assert not (tmp_path / "x").exists()


def test_older_studies_are_as_without_it():
    old = identity_of(parse([]), "m", {"a": "1"}, 0)
    del old["settings"]["train_on_source"]
    assert differences(old, identity_of(parse([]), "m", {"a": "1"}, 0)) == []
    assert differences(old, identity_of(parse(["--train_on_source"]), "m", {"a": "1"}, 0)) == [
        "train_on_source: false in the folder, true asked"
    ]
