"""Records as vectors: how alike their inputs are to a model, or to whatever embedder wrote a file of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.records import Record
from model.pooling import centre, mean_states, unit
from model.subject import Subject
from study.errors import LetheError

_BLOCK = 512  # rows whose cosines are taken at once


def prompt_text(record: Record) -> str:
    """All turns of a prompt."""
    return "\n".join(content for _, content in record.prompt)


def inputs_of(records: Sequence[Record]) -> list[str]:
    """Prompts without the lines that all of them begin with: a task's definition tells no two of its inputs apart."""
    texts = [prompt_text(record) for record in records]
    cut = os.path.commonprefix(texts).rfind("\n") + 1
    return [text[cut:] for text in texts]


def pooled_states(subject: Subject, texts: list[str]) -> np.ndarray:
    """Vectors (N, H) float64 of texts: their mean last hidden states, each dimension standardised over these texts.

    Without that all would be near copies (see model/pooling.py). A text without a token lies in the middle.
    """
    means = mean_states(subject.model, subject.tokenizer, texts)
    there = np.isfinite(means).all(1)
    if there.any():
        middle, spread = centre(means[there])
        means = (means - middle) / spread
    return np.where(there[:, None], means, 0.0)


def likeness(x: np.ndarray, limit: float) -> np.ndarray:
    """(N,): of each row of x (N, d), the largest cosine with an earlier row that stays; a row stays that is not above the limit.

    -1 where there is none. The (N, N) matrix is never whole.
    """
    x, found = unit(x).astype(np.float32), np.full(len(x), -1.0, dtype=np.float32)
    stay: list[int] = []
    for at in range(0, len(x), _BLOCK):
        block, fresh = x[at : at + _BLOCK], []
        if stay:
            found[at : at + len(block)] = (block @ x[stay].T).max(1)
        inside = block @ block.T
        for i in range(len(block)):
            if fresh:
                found[at + i] = max(found[at + i], inside[i, fresh].max())
            if found[at + i] <= limit:
                fresh.append(i)
        stay += [at + i for i in fresh]
    return found


def load_vectors(path: str | Path) -> np.ndarray:
    """A matrix (N, d) from a .npy file, or the one two-dimensional tensor of a .safetensors file. LetheError for anything else."""
    path = Path(path)
    if path.suffix not in (".npy", ".safetensors"):
        raise LetheError(f"{path}: vectors are read from .npy or .safetensors files")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        from safetensors.torch import load_file  # torch's, for bfloat16

        tensors = [tensor for tensor in load_file(path).values() if tensor.dim() == 2]
    except FileNotFoundError:
        raise LetheError(f"{path}: no such file") from None
    except Exception as error:  # safetensors has an error of its own, numpy three
        raise LetheError(f"{path} is cut or no {path.suffix} file ({str(error).splitlines()[0]}); write it again") from None
    if len(tensors) != 1:
        raise LetheError(f"{path}: {len(tensors)} matrices in it; one is needed, a row for each record")
    return tensors[0].double().numpy()
