"""Texts as vectors: the mean of a text's last hidden states, and what makes such means comparable.

The states are those after the final norm, over a text's own tokens, read as plain text behind the begin token, which does not
count. States of language models point one way and a few of their dimensions are huge, so the cosine of any two texts is near 1:
standardise each dimension (see centre) before comparing, after arXiv 2109.04404.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.attention import Pack
from model.llama import Llama
from model.tokenizer import Tokenizer

LONGEST = 2048  # tokens of a text, or what the model has positions for
PASS_TOKENS = {"cpu": 4096, "cuda": 16384}  # of texts in one pass


def mean_states(model: Llama, tokenizer: Tokenizer, texts: list[str], micro_tokens: int | None = None) -> np.ndarray:
    """Means (N, H) float64 of the texts' states, NaN for a text of no token. micro_tokens: in a pass; changes memory, not the result."""
    begin, ids = encode_texts(model, tokenizer, texts)
    room, parts, filled = micro_tokens or PASS_TOKENS[model.device.type], [[]], 0
    for tokens in ids:
        if parts[-1] and filled + len(begin) + len(tokens) > room:
            parts, filled = [*parts, []], 0
        parts[-1].append(tokens)
        filled += len(begin) + len(tokens)
    sums = np.concatenate([state_sums(model, begin, part) for part in parts])
    with np.errstate(invalid="ignore"):
        return sums / np.array([len(tokens) for tokens in ids], dtype=np.float64).reshape(-1, 1)


def encode_texts(model: Llama, tokenizer: Tokenizer, texts: list[str], longest: int = LONGEST) -> tuple[list[int], list[list[int]]]:
    """(the begin token as a list, [] where there is none; ids of each text without outer white space). A longer one loses its middle."""
    begin, room = [] if tokenizer.bos is None else [tokenizer.bos], min(longest, model.config.max_position_embeddings) - 1
    ids = [tokenizer.encode(text.strip()) for text in texts]
    return begin, [part if len(part) <= room else part[: room // 2] + part[len(part) - (room - room // 2) :] for part in ids]


@torch.inference_mode()
def state_sums(model: Llama, begin: list[int], texts: list[list[int]]) -> np.ndarray:
    """Sums (n, H) float64 of the states of each text's tokens, read behind `begin`, which does not count. One packed pass."""
    filled = [begin + ids for ids in texts if ids]
    sums = np.zeros((len(texts), model.config.hidden_size))
    if not filled:
        return sums
    was_training = model.training
    model.eval()
    try:
        flat = torch.tensor([token for ids in filled for token in ids], device=model.device)
        states: Tensor = model.hidden(flat, Pack([len(ids) for ids in filled], model.config, model.device)).float()  # (T, H)
    finally:
        model.train(was_training)
    parts = states.split([len(ids) for ids in filled])
    sums[[i for i, ids in enumerate(texts) if ids]] = torch.stack([part[len(begin) :].sum(0) for part in parts]).double().cpu().numpy()
    return sums


def centre(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (H,) of embeddings (N, H); a dimension that never moves keeps its scale."""
    spread = embeddings.std(0)
    return embeddings.mean(0), np.where(spread > 0, spread, 1.0)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
