"""Text or token files as rows to pretrain on: documents end to end, each between its begin and end token, cut into rows of equal length.

A corpus is "builtin" (the nano model's, data/builtin_corpus.py), a file, or a folder of files:

    .npy .bin    token ids as they are (.bin: uint16, or uint32 for a vocabulary beyond 65536)
    .json .jsonl .parquet    one document a row, under "text"
    any other    text; <|endoftext|> parts documents

Tokens are written to a flat file once, and mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from data.batching import Micro
from data.builtin_corpus import documents
from data.folder import fingerprint_files
from data.rows import iter_rows
from model.tokenizer import Tokenizer
from study.errors import LetheError
from study.folder import write_error, write_json
from study.logging import progress

TOKENS = (".npy", ".bin")
ROWS = (".json", ".jsonl", ".parquet")
PART = "<|endoftext|>"
CHUNK = 1 << 20  # characters read at a time
BATCH = 1000  # documents tokenised together


@dataclass(frozen=True)
class Corpus:
    """Rows of row_length tokens. The last `held_out` of them are never trained on: the loss on them is what curves show."""

    key: str  # names the content
    flat: np.ndarray  # (tokens,) unsigned
    row_length: int
    held_out: int

    def __len__(self) -> int:
        """Rows to train on."""
        return max(0, len(self.flat) // self.row_length - self.held_out)

    def row(self, i: int) -> np.ndarray:
        return self.flat[i * self.row_length : (i + 1) * self.row_length]

    def rows_of(self, step: int, per_step: int, seed: int, skip: int = 0) -> list[int]:
        """The rows of a step: pass e over the corpus is a permutation drawn from (seed, e), of which `skip` rows are gone before step 0."""
        found: list[int] = []
        place, end = skip + step * per_step, skip + (step + 1) * per_step
        while place < end:
            epoch, within = divmod(place, len(self))
            taken = np.random.default_rng((seed, epoch)).permutation(len(self))[within : within + end - place]
            found += taken.tolist()
            place += len(taken)
        return found

    def micros(self, rows: Sequence[int], micro_tokens: int) -> list[Micro]:
        """These rows as passes of at most micro_tokens tokens; every token but a row's first is predicted from those before it."""
        size = max(1, micro_tokens // self.row_length)
        return [pack_rows(self, rows[i : i + size], i) for i in range(0, len(rows), size)]

    def test_micros(self, micro_tokens: int) -> list[Micro]:
        """The held-out rows."""
        return self.micros(list(range(len(self), len(self) + self.held_out)), micro_tokens)


def pack_rows(corpus: Corpus, rows: Sequence[int], place: int = 0) -> Micro:
    """Rows of a corpus as one forward pass."""
    batch = torch.from_numpy(np.stack([corpus.row(i) for i in rows]).astype(np.int64))  # (B, L)
    size, targets = corpus.row_length - 1, batch[:, 1:].reshape(-1)
    lengths, examples = [size] * len(rows), torch.arange(place, place + len(rows)).repeat_interleave(size)
    inputs, count = batch[:, :-1].reshape(-1), len(targets)
    weights = torch.ones(count)
    return Micro(inputs, lengths, examples, torch.arange(count), targets, lengths, list(rows), count, weights, float(count))


def load_corpus(
    spec: str, tokenizer: Tokenizer, cache: Path, *, tokens: int, row_length: int = 256, held_out: int = 64, seed: int = 0
) -> Corpus:  # fmt: skip
    """The corpus that `spec` names, tokenised into cache/{key} or mapped from there.

    tokens: how many to train on; of a longer corpus no more are read (with those held out), a shorter one is passed over again.
    seed: of the built-in corpus. Raises LetheError where there is no such file, or too little in it.
    """
    files = [] if spec == "builtin" else corpus_files(Path(spec))
    wanted = (-(-tokens // row_length) + held_out) * row_length
    said = [spec == "builtin" and f"builtin {seed}", fingerprint_files(*files), tokenizer.fingerprint, wanted]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "report.json").is_file():
        texts = documents(seed) if spec == "builtin" else None
        try:
            _write(files, texts, tokenizer, folder, wanted)
        except OSError as error:
            raise write_error(folder, error) from error
    dtype = json.loads((folder / "report.json").read_text())["dtype"]
    file = folder / "ids.bin"
    flat = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    found = Corpus(f"{key}-{row_length}-{held_out}", flat, row_length, held_out)
    if len(found) < 1:
        enough = f"rows of {row_length} and {held_out} held out take {(held_out + 1) * row_length} or more"
        raise LetheError(f"--corpus {spec}: {len(flat)} tokens are too few; {enough}")
    return found


def corpus_files(path: Path) -> list[Path]:
    """The file, or the files of a folder and below, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LetheError(f"--corpus {path}: no such file or folder; give text or token files, or 'builtin'")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise LetheError(f"--corpus {path}: the folder is empty")
    return files


def read_documents(file: Path) -> Iterator[str]:
    """The documents of a file of text or rows, streamed."""
    if file.suffix in ROWS:
        for where, row in iter_rows(file):
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise LetheError(f"{where}: no text under 'text'; a corpus has one document a row")
            yield text
        return
    try:
        with file.open(encoding="utf-8") as handle:
            rest = ""
            while chunk := handle.read(CHUNK):
                *whole, rest = (rest + chunk).split(PART)
                yield from whole
            yield rest
    except UnicodeDecodeError as error:
        raise LetheError(f"{file}: no UTF-8 text at byte {error.start}; token files end in .npy or .bin") from None
    except OSError as error:
        raise LetheError(f"{file}: cannot be read ({error.strerror or error})") from None


def read_tokens(file: Path, vocabulary: int) -> np.ndarray:
    """The ids of a token file, mapped. Raises LetheError for what is no token file of this vocabulary."""
    dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    try:
        ids = np.load(file, mmap_mode="r") if file.suffix == ".npy" else np.memmap(file, dtype=dtype, mode="r")
    except (OSError, ValueError):
        raise LetheError(f"{file}: empty, cut or no token file; .npy as numpy saves it, .bin of {dtype} ids") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise LetheError(f"{file}: holds {ids.dtype} of shape {ids.shape}; a token file is one line of whole numbers")
    return ids


def _write(files: list[Path], texts: Iterator[str] | None, tokenizer: Tokenizer, folder: Path, wanted: int) -> None:
    """ids.bin, at most `wanted` tokens, and report.json, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    written = 0
    with open(folder / "ids.bin", "wb") as out, progress(wanted, "corpus", "tokens") as bar:

        def put(ids: np.ndarray) -> None:
            nonlocal written
            ids = ids[: wanted - written]
            out.write(ids.astype(dtype).tobytes())
            written += len(ids)
            bar.update(len(ids))

        for file in [file for file in files if file.suffix in TOKENS]:
            ids = read_tokens(file, tokenizer.vocab_size)
            for i in range(0, min(len(ids), wanted - written), CHUNK):
                part = np.asarray(ids[i : i + CHUNK])
                if len(part) and not 0 <= part.min() <= part.max() < tokenizer.vocab_size:
                    worst, known = part.max() if part.max() >= tokenizer.vocab_size else part.min(), tokenizer.vocab_size
                    raise LetheError(f"{file}: holds the id {worst}, and this tokenizer has {known}; they do not belong together")
                put(part)
        texts = texts or chain.from_iterable(read_documents(file) for file in files if file.suffix not in TOKENS)
        texts = (text for text in texts if text.strip())
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        end = [tokenizer.special.get("<|end_of_text|>", tokenizer.end_id)]
        while written < wanted and (batch := list(islice(texts, BATCH))):
            for encoded in tokenizer.hf.encode_batch(batch, add_special_tokens=False):
                put(np.array([*begin, *encoded.ids, *end], dtype=np.int64))
    write_json(folder / "report.json", {"tokens": written, "dtype": dtype.name, "files": [str(file) for file in files]})
