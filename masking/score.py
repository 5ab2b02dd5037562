"""Per-token losses of a data set under a reference model, computed once and cached by content.

The cache file carries the token ids beside the losses, and they are compared when it is loaded: a mask can never be laid
over other tokens than those it was made from. Scoring that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from data.batching import Examples, Micro, collate, micro_tokens_of
from masking.weights import token_weights
from model.attention import Pack
from model.llama import Llama
from study.errors import LetheError
from study.folder import write_bytes


def micro_nll(model: Llama, micro: Micro, sight: Pack | None = None, row_keys: torch.Tensor | None = None) -> torch.Tensor:
    """nll (n,) of a micro-batch's completion tokens: the one way from tokens to losses, for training, scoring and evaluation.

    sight: of its examples, where the caller has it already. row_keys (T,): of the adapters' dropout.
    """
    sight = sight or Pack(micro.lengths, model.config, model.device)
    return model.nll(micro.input_ids, sight, micro.rows, micro.targets, row_keys)


@torch.inference_mode()
def score_examples(
    model: Llama, examples: Examples, reference: str, folder: Path,
    micro_tokens: int | None = None, progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """nll of every completion token (the end token too), flat as Examples.completion_offsets says, float32.

    reference names what the model is: the adapter's fingerprint, or "base". The model is scored in eval mode, so dropout is
    off. Cached in folder/{key}.safetensors. Raises LetheError where a cached file is cut or belongs to other tokens, and
    where a loss is not finite.
    """
    key = hashlib.sha256(json.dumps([model.fingerprint, reference, examples.key, str(model.dtype)]).encode()).hexdigest()[:16]
    file, partial = folder / f"{key}.safetensors", folder / f"{key}.partial"
    ids = np.concatenate([examples.completion(i) for i in range(len(examples))])
    if file.is_file():
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise LetheError(f"{file} is cut or no safetensors file ({error}); delete it and run again") from error
        if not np.array_equal(stored["ids"], ids):
            raise LetheError(f"{file} holds the scores of other tokens than this data set's; delete it and run again")
        return stored["nll"]
    folder.mkdir(parents=True, exist_ok=True)
    # NaN marks what is not scored yet; a file of the wrong size is a leftover of a failed write. It is written out before
    # it is mapped, so that a full disk is an error here and not a fatal signal later.
    if not partial.is_file() or partial.stat().st_size != 4 * len(ids):
        write_bytes(partial, np.full(len(ids), np.nan, dtype=np.float32).tobytes())
    nll = np.memmap(partial, dtype=np.float32, mode="r+", shape=(len(ids),))
    offsets, lengths = examples.completion_offsets, examples.lengths
    order = np.argsort(lengths, kind="stable").tolist()
    was_training = model.training
    model.eval()
    try:
        # What is packed together does not depend on what is scored already, or the last bits would.
        for at in range(0, len(order), 256):
            for micro in collate(examples, order[at : at + 256], micro_tokens_of(micro_tokens, model.device), None):
                if not any(np.isnan(nll[offsets[i] : offsets[i + 1]]).any() for i in micro.indices):
                    if progress:
                        progress(len(micro.indices))
                    continue
                scored = micro_nll(model, micro.to(model.device)).cpu().numpy()
                if not np.isfinite(scored).all():
                    who = f"examples {micro.indices[:8]} …"
                    raise LetheError(f"the reference model gives NaN or infinite losses ({who}); try --dtype float32")
                for i, part in zip(micro.indices, np.split(scored, np.cumsum(micro.sizes)[:-1]), strict=True):
                    nll[offsets[i] : offsets[i + 1]] = part
                if progress:
                    progress(len(micro.indices))
    finally:
        model.train(was_training)
    result = np.array(nll)
    write_bytes(file, save({"nll": result, "ids": ids}))
    partial.unlink(missing_ok=True)  # another worker of the study may have scored the same and been first
    return result


def example_weights(
    nll: np.ndarray, policy: str, settings: dict, mask_end: bool,
    adapter_nll: np.ndarray | None = None, generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """Weights of one completion, its end token kept unless mask_end has it treated like any other.

    settings: of token_weights, whose ValueError for one out of range becomes a LetheError here.
    """
    body = slice(None) if mask_end else slice(-1)
    other = None if adapter_nll is None else torch.from_numpy(adapter_nll[body])
    try:
        weights = token_weights(torch.from_numpy(nll[body]), policy, adapter_nll=other, generator=generator, **settings)
    except ValueError as error:
        raise LetheError(f"--mask {policy}: {error}") from error
    return weights if mask_end else torch.cat([weights, torch.ones(1)])


def dataset_weights(
    examples: Examples, policy: str, settings: dict, nll: np.ndarray | None,
    adapter_nll: np.ndarray | None = None, mask_end: bool = False, seed: int = 0,
) -> tuple[np.ndarray, dict]:
    """Weights of all completion tokens, flat float32, and statistics of what was dropped.

    nll may be None for policy none. random draws each example's tokens from (seed, example). The statistics: completion
    tokens, dropped_share of them and its spread over examples, emptied_examples (only the end token, or nothing, is left).
    """
    offsets = examples.completion_offsets
    weights = np.ones(offsets[-1], dtype=np.float32)
    if policy != "none":
        for i in range(len(examples)):
            span = slice(offsets[i], offsets[i + 1])
            generator = torch.Generator().manual_seed(seed * 1_000_003 + i) if policy == "random" else None
            other = None if adapter_nll is None else adapter_nll[span]
            weights[span] = example_weights(nll[span], policy, settings, mask_end, other, generator).numpy()
    shares = np.add.reduceat((weights == 0).astype(np.int64), offsets[:-1]) / np.diff(offsets)  # (N,) dropped share of each example
    ends = weights[offsets[1:] - 1] > 0
    bodies = np.add.reduceat((weights > 0).astype(np.int64), offsets[:-1]) - ends  # kept tokens but the end token
    stats = {
        "completion_tokens": int(offsets[-1]),
        "dropped_share": float((weights == 0).mean()),
        "dropped_share_per_example": {f"p{q}": float(np.percentile(shares, q)) for q in (5, 50, 95, 100)},
        "emptied_examples": int(((bodies == 0) & ((np.diff(offsets) > 1) | ~ends)).sum()),
        "mean_weight": float(weights.mean()),
    }
    return weights, stats
