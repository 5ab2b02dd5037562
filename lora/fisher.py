"""The diagonal empirical Fisher information of what a model trains, on a data set: which parameters a task depends on.

    F_i = 1/N sum over N examples of (d loss / d theta_i)^2,      loss: the mean nll of the example's completion, its end included

Gradients are squared one example at a time (a batch's gradient squared is another quantity), at the reference answers, without
dropout, on all completion tokens whatever mask trained them. So it is the estimate that arXiv 2403.01244 compares with (200
examples, batch 1), not the Fisher information of arXiv 1612.00796: that one samples answers from the model, and takes the nll
of an answer as a sum, so that a long answer weighs more.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.batching import Examples, pack
from lora.states import state_fingerprint
from model.attention import Pack
from model.checkpoint import write_tensors
from model.llama import Llama
from model.sharding import is_sharded
from study.errors import LetheError
from study.logging import progress

FILE = "fisher.safetensors"


def diagonal_fisher(model: Llama, parameters: list[nn.Parameter], examples: Examples, samples: int = 200, seed: int = 0) -> list[Tensor]:
    """F at the model's present state, a float32 tensor of each parameter's shape (a LoRA's stacks of factors, or weights).

    On `samples` examples drawn without replacement by the seed alone, or on all where there are no more. Gradients come in the
    parameters' type and are summed in float32; their .grad is left as it is. Raises LetheError for a model spread over ranks, whose
    passes sum their gradients over examples, and where a gradient is not finite.
    """
    if samples < 1:
        raise ValueError(f"the Fisher information needs at least 1 example, not {samples}")
    if is_sharded(model):
        raise LetheError("--shard model has no gradient of a single example, which EWC needs; use L2 or leave --shard out")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(examples))[:samples]).tolist()
    found = [torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for parameter in parameters]
    scale = 2.0**16 if model.dtype == torch.float16 else 1.0  # of the loss: float16 gradients underflow without one
    was_training = model.training
    model.eval()
    try:
        with progress(len(chosen), "fisher", "examples") as bar:
            for i in chosen:
                micro = pack(examples, [i], None).to(model.device)
                gradients = None
                while gradients is None:
                    nll = model.nll(micro.input_ids, Pack(micro.lengths, model.config, model.device), micro.rows, micro.targets)  # (n,)
                    gradients = torch.autograd.grad(nll.mean() * scale, parameters)
                    if scale > 1 and not all(bool(gradient.isfinite().all()) for gradient in gradients):
                        gradients, scale = None, scale / 2
                for total, gradient in zip(found, gradients, strict=True):
                    gradient = gradient.float() / scale
                    total.addcmul_(gradient, gradient, value=1 / len(chosen))
                bar.update()
    finally:
        model.train(was_training)
    if not all(bool(f.isfinite().all()) for f in found):
        raise LetheError("the Fisher information is not finite: a gradient of the task before is NaN or infinite; try --dtype float32")
    return found


def fisher_of(
    model: Llama, names: list[str], parameters: list[nn.Parameter], examples: Examples, folder: Path, samples: int = 200, seed: int = 0
) -> list[Tensor]:
    """F of what the run in `folder` left, on that run's examples: {folder}/fisher.safetensors, computed once and written atomically.

    The model must be in that run's state, as it is when the next stage begins. The file says what it was made from, and is made
    anew where that differs. Raises LetheError as diagonal_fisher does, and for a file that is cut.
    """
    made_from = json.dumps({"base": model.fingerprint, "state": state_fingerprint(folder), "tokens": examples.key,
                            "samples": samples, "seed": seed, "dtype": str(model.dtype)})  # fmt: skip
    file = folder / FILE
    if file.is_file():
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                if (stored.metadata() or {}).get("made_from") == made_from:
                    return [stored.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise LetheError(f"{file} is cut or no safetensors file ({error}); delete it and run again") from error
    found = diagonal_fisher(model, parameters, examples, samples, seed)
    write_tensors(file, {name: f.cpu() for name, f in zip(names, found, strict=True)}, {"made_from": made_from})
    return found
