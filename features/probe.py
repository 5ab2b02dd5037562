"""What a few steps of training on a data set do to the model: a short LoRA run, read closely, then taken off again.

The run is train.fit's, on four fifths of the sample; losses before and after are of the fifth that it never saw. Beside it stands
a fixed set of what the model can do already, the retain set: `forgetting` is how much of that the run has cost.
A value that cannot be had is None, and the dictionary then has a "reason" beside its columns.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batching import Examples, Micro, collate, step_indices
from data.builtin_corpus import documents
from data.records import Record, iter_records, load_records
from features.dataset import Sample
from features.likelihood import budget, checked, encode, longest, mean_nll
from lora.drift import base_weight, drift, kl_to_base
from lora.layers import add_lora, lora_layers, remove_lora
from lora.resume import Learner
from model.checkpoint import NANO
from model.llama import Llama
from model.subject import Subject
from model.tokenizer import Tokenizer, load_tokenizer
from study.errors import LetheError
from train import fit

PROBE_COLUMNS = (
    "initial_loss", "final_loss", "loss_decay_rate", "loss_stability", "avg_grad_norm", "gradient_cosine", "grad_near_zero_share",
    "avg_param_change", "relative_weight_change", "landscape_sharpness", "forgetting", "retain_kl", "probe_kl",
)  # fmt: skip
RATE = 1e-3  # constant; at 1e-4 twenty steps leave the built-in model's forgetting within what the seed changes
RANK, ALPHA = 8, 16.0
STEP = 8  # examples in an optimizer step, whatever fits into a pass
FEWEST = 8  # examples that a probe needs
HELD_OUT = 0.2, 64  # share of the sample that is not trained on, and at most so many examples
NEAR_ZERO = 0.1  # of the root mean square of its matrix's gradient
RADIUS, DRAWS = 0.1, 4  # size of a random change relative to its weight matrix; how many, each taken with both signs
DOCUMENTS, DOCUMENT_SEED = 64, 20_011  # the built-in model's general set; assets/nano was trained on documents of seed 0
RETAIN_ROWS = 256  # of a retain file


def probe_features(
    subject: Subject, sample: Sample, *, steps: int, batch_size: int, seed: int, retain: Examples, learning_rate: float = RATE
) -> dict:
    """The columns of PROBE_COLUMNS, and "reason" where one is None. Losses are in nats a completion token.

        initial_loss, final_loss   loss on the held-out examples before any step and after the last: L0, LT
        loss_decay_rate            (L0 - LT) / L0
        loss_stability             1 / (1 + standard deviation of the steps' losses)
        avg_grad_norm              mean over steps of the gradient's norm, before clipping
        gradient_cosine            mean cosine of successive steps' gradients: do examples pull the same way?
        grad_near_zero_share       share of gradient entries below a tenth of their matrix's root mean square (a normal
                                   distribution has 0.08): large where few entries carry the gradient
        avg_param_change           |factors after - factors before|, over all of LoRA's A and B
        relative_weight_change     |dW| / |W| over the adapted matrices (lora.drift)
        landscape_sharpness        mean rise of the held-out loss when the trained weights are randomly changed (see sharpness)
        forgetting                 loss on the retain set after the probe - before it: positive where the probe has cost ability
        retain_kl                  KL(base || probed) on the retain set's answers, nats a token: never negative, less noisy than forgetting
        probe_kl                   the same on the held-out examples, which foretells forgetting in arXiv 2509.04259

    The run: LoRA (rank 8, alpha 16, no dropout, all linears), AdamW at learning_rate, 8 examples a step, clipped at 1.
    batch_size: examples in a pass, which changes memory and not the values. retain: see load_retain. The base is as it was
    afterwards, to the bit. Raises ValueError for a model with an adapter on it.
    """
    model, found, said = subject.model, dict.fromkeys(PROBE_COLUMNS), []
    if model.adapter is not None:
        raise ValueError("the probe trains an adapter of its own: merge the one on the model first")
    pairs = encode(subject.tokenizer, sample.records, longest(model))
    if len(pairs) < FEWEST:
        return found | {"reason": f"probe: {len(pairs)} examples are too few, it needs {FEWEST}"}
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    aside = min(math.ceil(HELD_OUT[0] * len(pairs)), HELD_OUT[1])
    held_out, trained = (Examples.from_pairs([pairs[i] for i in part]) for part in (order[:aside], order[aside:]))
    was_training, frozen = model.training, [parameter.requires_grad for parameter in model.parameters()]
    try:
        found["initial_loss"] = before = mean_nll(model, held_out, batch_size)
        general = mean_nll(model, retain, batch_size)
        add_lora(model, RANK, ALPHA, 0.0, "all", generator=torch.Generator().manual_seed(seed))
        found |= learn(model, trained, steps, batch_size, seed, learning_rate)
        found["final_loss"] = after = mean_nll(model, held_out, batch_size)
        found["loss_decay_rate"] = (before - after) / before if before else None
        found["relative_weight_change"] = drift(model)["relative_frobenius"]
        found["forgetting"] = mean_nll(model, retain, batch_size) - general
        for name, examples in (("retain_kl", retain), ("probe_kl", held_out)):
            found[name] = kl_to_base(model, examples, micro_tokens=budget(examples, batch_size)).mean()
        found["landscape_sharpness"] = sharpness(model, held_out, batch_size, seed) - after  # last: it moves the adapter
    except LetheError as error:  # a loss or a gradient that is not finite
        said = [f"probe: {error}"]
    finally:
        remove_lora(model)
        for parameter, flag in zip(model.parameters(), frozen, strict=True):
            parameter.requires_grad_(flag)
        model.train(was_training)
    return checked(found, "probe", said)


def learn(model: Llama, examples: Examples, steps: int, batch_size: int, seed: int, learning_rate: float) -> dict:
    """Trains the model's fresh adapter, and returns what can be read on the way. Raises LetheError for a loss that is not finite."""
    factors = list(model.adapter.parameters())
    start = [factor.detach().clone() for factor in factors]
    gradients: list[Tensor] = []
    cosines, shares = [], []

    def read(*_) -> None:
        """Before each step of the optimizer. Clipping has scaled the gradients, which changes neither cosines nor shares."""
        matrices = [matrix for factor in factors for matrix in factor.grad]
        gradients.append(torch.cat([matrix.flatten() for matrix in matrices]))
        if len(gradients) > 1:
            cosines.append(float(F.cosine_similarity(gradients.pop(0), gradients[-1], dim=0)))
        shares.append(near_zero_share(matrices))

    learner = Learner(model, factors, lambda masters: [torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)])
    learner.optimizers[0].register_step_pre_hook(read)
    weights = np.ones(examples.completion_offsets[-1], dtype=np.float32)

    def batches(step: int, micro_tokens: int) -> list[Micro]:
        return collate(examples, step_indices(len(examples), STEP, seed, step), micro_tokens, weights)

    taken = list(fit(model, learner, batches, steps, micro_tokens=budget(examples, batch_size), schedule="constant", seed=seed))
    losses = [step.loss for step in taken]
    norms = [step.grad_norm for step in taken if step.outcome == "stepped"]
    change = sum((factor.detach() - old).double().square().sum() for factor, old in zip(factors, start, strict=True))
    return {
        "loss_stability": 1 / (1 + float(np.std(losses))) if len(losses) > 1 else None,
        "avg_grad_norm": average(norms), "gradient_cosine": average(cosines), "grad_near_zero_share": average(shares),
        "avg_param_change": float(change.sqrt()),
    }  # fmt: skip


def average(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def near_zero_share(matrices: list[Tensor]) -> float:
    """Share of entries below NEAR_ZERO of their matrix's root mean square. A matrix of zeros does not count: those of A at step 1."""
    sizes = torch.stack([matrix.square().mean().sqrt() for matrix in matrices])
    small = sum((matrix.abs() < NEAR_ZERO * size).sum() for matrix, size in zip(matrices, sizes, strict=True))
    total = sum(matrix.numel() for matrix, size in zip(matrices, sizes.tolist(), strict=True) if size)
    return float(small) / total if total else math.nan


@torch.no_grad()
def sharpness(model: Llama, examples: Examples, batch_size: int, seed: int) -> float:
    """Mean loss over random changes dW of the adapted matrices with |dW| = RADIUS |W| for each; the adapter is left changed.

    dW = scale N A, N normal: a change within the span of the adapter's A, whose rows are random too. So it costs no copy of the
    base, and does the same on a quantised one. Each is taken with both signs, which cancels the slope and leaves curvature.
    """
    generator, layers, losses = torch.Generator().manual_seed(seed), lora_layers(model).values(), []
    trained = [layer.lora_B.clone() for layer in layers]
    norms = [torch.linalg.vector_norm(base_weight(model, layer), dtype=torch.float32).to(model.device) for layer in layers]
    for _ in range(DRAWS):
        changes = []
        for layer, norm in zip(layers, norms, strict=True):
            noise = torch.randn(layer.lora_B.shape, generator=generator).to(model.device)
            size = layer.scale * (noise @ (layer.lora_A @ layer.lora_A.T) * noise).sum().sqrt()  # |scale N A|
            changes.append(noise * (RADIUS * norm / size))
        for sign in (1, -1):
            for layer, old, change in zip(layers, trained, changes, strict=True):
                layer.lora_B.copy_(old + sign * change)
            losses.append(mean_nll(model, examples, batch_size))
    return float(np.mean(losses))


def load_retain(path: str | Path | None, subject: Subject) -> Examples:
    """The fixed general set: losses are of its answers, or of whole documents. path: a record file, its first 256 records.

    Without one it is general_records. Raises LetheError where the file cannot be read or nothing of it fits the model.
    """
    records = general_records(subject.tokenizer) if path is None else list(islice(iter_records(path), RETAIN_ROWS))
    pairs = encode(subject.tokenizer, records, longest(subject.model))
    if not pairs:
        raise LetheError(f"{path}: no answer of the retain set fits into {longest(subject.model)} tokens; give another file with --retain")
    return Examples.from_pairs(pairs)


def general_records(tokenizer: Tokenizer) -> list[Record]:
    """General texts: for the built-in model documents like those of its pretraining, for others the questions of retain.jsonl."""
    if tokenizer.fingerprint == load_tokenizer(str(NANO), tokenizer.template).fingerprint:
        return [Record((), text) for text in islice(documents(DOCUMENT_SEED), DOCUMENTS)]
    return load_records(Path(__file__).parent / "retain.jsonl")
