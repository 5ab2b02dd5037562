"""Text and token files as rows to pretrain on."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import raw_config, write_folder

from data.builtin_corpus import documents
from data.corpus import Corpus, load_corpus
from masking.score import micro_nll
from model import load_model
from model.checkpoint import NANO
from model.tokenizer import load_tokenizer
from study.errors import LetheError

TEXTS = ["One plain sentence.", "A second one,\nof two lines.", "And 3 more words here."] * 40


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


def stream(tokenizer, texts):
    """Documents end to end, by brute force."""
    return [token for text in texts for token in [0, *tokenizer.hf.encode(text, add_special_tokens=False).ids, 1]]


def test_the_builtin_corpus_is_its_documents(tokenizer, tmp_path):
    found = load_corpus("builtin", tokenizer, tmp_path, tokens=5000, row_length=64, held_out=4, seed=3)
    assert len(found) == -(-5000 // 64) and found.flat.dtype == np.uint16 and len(found.flat) == (len(found) + 4) * 64
    assert found.flat.tolist() == stream(tokenizer, islice(documents(3), 300))[: len(found.flat)]
    again = load_corpus("builtin", tokenizer, tmp_path, tokens=5000, row_length=64, held_out=4, seed=3)
    assert again.key == found.key and isinstance(again.flat, np.memmap)
    assert load_corpus("builtin", tokenizer, tmp_path, tokens=5000, row_length=64, held_out=4, seed=4).key != found.key


@pytest.mark.parametrize("kind", ["text", "lines", "array", "folder", "npy", "bin"])
def test_files_of_every_kind(kind, tokenizer, tmp_path):
    expected = stream(tokenizer, TEXTS)
    path = tmp_path / {"text": "a.txt", "lines": "a.jsonl", "array": "a.json", "folder": "all", "npy": "a.npy", "bin": "a.bin"}[kind]
    if kind == "text":
        path.write_text("<|endoftext|>".join(TEXTS))
    elif kind == "lines":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    elif kind == "array":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "folder":
        (path / "below").mkdir(parents=True)
        (path / "b.txt").write_text("<|endoftext|>".join(TEXTS[:60]))
        (path / "below" / "c.txt").write_text("<|endoftext|>".join(TEXTS[60:]))
        (path / ".hidden").write_text("nothing of this")
    elif kind == "npy":
        np.save(path, np.array(expected, dtype=np.int64))
    else:
        np.array(expected, dtype=np.uint16).tofile(path)
    found = load_corpus(str(path), tokenizer, tmp_path / "cache", tokens=10**6, row_length=16, held_out=2)
    assert found.flat.tolist() == expected  # a short corpus whole; its last, uncut row is no row
    assert len(found) == len(expected) // 16 - 2


def test_a_text_longer_than_a_chunk_is_read_as_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data.corpus.CHUNK", 7)
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS))
    found = load_corpus(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache", tokens=10**6, row_length=16, held_out=0)
    assert found.flat.tolist() == stream(tokenizer, TEXTS)


def test_rows_come_in_permutations_and_go_on_where_others_stopped():
    corpus = Corpus("", np.arange(10 * 4 + 3), 4, 2)
    assert len(corpus) == 8
    passes = [row for step in range(8) for row in corpus.rows_of(step, 3, 5)]  # 24 rows: three passes
    for epoch in range(3):
        assert sorted(passes[8 * epoch : 8 * epoch + 8]) == list(range(8)), "a held-out row, or one twice in a pass"
    assert passes[:8] != passes[8:16]
    assert [row for step in range(3) for row in corpus.rows_of(step, 3, 5, skip=15)] == passes[15:]
    assert [row.tolist() for row in map(corpus.row, (8, 9))] == [[32, 33, 34, 35], [36, 37, 38, 39]]  # those held out


def test_the_loss_is_that_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = raw_config()
    folder = write_folder(tmp_path / "model", raw)
    rng = np.random.default_rng(0)
    corpus = Corpus("", rng.integers(0, raw["vocab_size"], 6 * 16), 16, 2)
    rows = [3, 0, 2]
    ids = torch.tensor(np.stack([corpus.row(i) for i in rows]))
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = peer(input_ids=ids, labels=ids).loss
    model = load_model(folder)
    micros = corpus.micros(rows, 32)  # two rows a pass
    assert [micro.lengths for micro in micros] == [[15, 15], [15]] and sum(micro.completions for micro in micros) == 45
    assert [micro.examples.unique().tolist() for micro in micros] == [[0, 1], [2]], "dropout's masks would repeat"
    nll = torch.cat([micro_nll(model, micro) for micro in micros])
    torch.testing.assert_close(nll.mean(), expected, rtol=1e-5, atol=1e-6)
    assert [micro.indices for micro in corpus.test_micros(1000)] == [[4, 5]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.txt", None, "no such file or folder; give text or token files, or 'builtin'"),
        ("short.txt", b"too short", "tokens are too few; rows of 16 and 2 held out take 48 or more"),
        ("empty.txt", b"", "0 tokens are too few"),
        ("latin.txt", b"caf\xe9 " * 50, "no UTF-8 text at byte 3; token files end in .npy or .bin"),
        ("rows.jsonl", b'{"txt": "a"}\n', "rows.jsonl:1: no text under 'text'"),
        ("big.bin", np.full(100, 60000, np.uint16).tobytes(), "holds the id 60000, and this tokenizer has 2048"),
        ("odd.bin", b"abc", "no token file"),
        ("text.npy", b"not numpy", "no token file"),
    ],
)
def test_what_is_no_corpus_is_told_in_one_line(name, content, told, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LetheError) as error:
        load_corpus(str(path), tokenizer, tmp_path / "cache", tokens=1000, row_length=16, held_out=2)
    assert told in str(error.value) and "\n" not in str(error.value) and name in str(error.value)


def test_tokens_of_two_dimensions_and_an_empty_folder(tokenizer, tmp_path):
    np.save(tmp_path / "square.npy", np.ones((4, 4)))
    (tmp_path / "none").mkdir()
    for path, told in ((tmp_path / "square.npy", "one line of whole numbers"), (tmp_path / "none", "the folder is empty")):
        with pytest.raises(LetheError, match=told):
            load_corpus(str(path), tokenizer, tmp_path / "cache", tokens=1000)
