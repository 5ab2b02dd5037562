"""The training loop: one step against a loop written out in float64, and what happens when a step cannot be taken."""

import math

import numpy as np
import pytest
import torch
from tiny import random_examples, tiny_model, train_some
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import train
from data.batching import collate
from lora import add_lora
from lora.layers import lora_parameters
from lora.resume import Learner
from optim.masters import collect_gradients, make_masters, write_back
from optim.schedule import lr_factor
from study.errors import LetheError

EXAMPLES = random_examples(12)
TOTAL = int(EXAMPLES.completion_offsets[-1])
WEIGHTS = np.random.default_rng(0).choice([0.0, 0.5, 1.0], TOTAL).astype(np.float32)


def subject(folder, dtype=torch.float32, **settings):
    model = tiny_model(folder, dtype)
    add_lora(model, 4, 8.0, **settings, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model


def adamw(lr=1e-2):
    return lambda parameters: [torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)]


def batches(weights=WEIGHTS, indices=range(12)):
    return lambda step, micro_tokens: collate(EXAMPLES, list(indices), micro_tokens, weights)


def fit(model, parameters, optimizers, *arguments, micro_tokens=100, **settings):
    """In passes of at most 100 tokens: three of them a step."""
    return train.fit(model, Learner(model, parameters, optimizers), *arguments, micro_tokens=micro_tokens, **settings)


def values(model):
    return [parameter.detach().clone() for parameter in lora_parameters(model)]


def loop_in_float64(model, weights, steps, lr, normalize="kept", clip=1.0):
    """The same training by whole logits, plain autograd and AdamW written out, all in float64; returns losses and norms."""
    model.double()
    parameters = lora_parameters(model)
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, norms = [], []
    for step in range(1, steps + 1):
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(len(EXAMPLES)):
            ids, start = torch.from_numpy(EXAMPLES.ids(i).astype(np.int64)), int(EXAMPLES.starts[i])
            nll = -model(ids[None])[0].log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
            loss = loss + (nll * torch.from_numpy(weights[slice(*EXAMPLES.completion_offsets[i : i + 2])])).sum()
        loss = loss / (weights.sum() if normalize == "kept" else TOTAL)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        losses.append(loss.item())
        norms.append(norm)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(1.0, clip / norm) if clip else g
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p.mul_(1 - lr * 0.01)
                p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return losses, norms


@pytest.mark.parametrize("normalize", ["kept", "all"])
@pytest.mark.parametrize("clip", [0, 0.5])
def test_steps_equal_a_loop_in_float64(tmp_path, normalize, clip):
    model = subject(tmp_path)
    settings = {"schedule": "constant", "max_grad_norm": clip, "normalize": normalize}
    steps = list(fit(model, lora_parameters(model), adamw(), batches(), 3, **settings))
    other = subject(tmp_path)
    losses, norms = loop_in_float64(other, WEIGHTS, 3, 1e-2, normalize, clip)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-5) and losses[2] < losses[0]
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=1e-4) and norms[0] > 0.5
    for one, expected in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=2e-5)
    assert [step.outcome for step in steps] == ["stepped"] * 3 and [step.number for step in steps] == [0, 1, 2]
    assert steps[0].kept == pytest.approx((WEIGHTS > 0).mean()) and steps[0].tokens == len(EXAMPLES.flat)


def spied_gradients(model, norm=0.0, **settings):
    """The gradients that the optimizer gets in one step."""
    found = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            found.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    micros = settings.pop("batches", batches())
    (step,) = fit(model, lora_parameters(model), lambda p: [Spy(p, lr=1.0)], micros, 1, max_grad_norm=norm, **settings)
    return step, found


def test_all_divides_by_every_completion_token(tmp_path):
    model = subject(tmp_path)
    kept, mine = spied_gradients(model)
    full, other = spied_gradients(model, normalize="all")
    share = WEIGHTS.sum() / TOTAL
    assert full.loss == pytest.approx(kept.loss * share, rel=1e-6)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a * share, b, rtol=1e-5, atol=1e-9)


def test_clipping(tmp_path):
    model = subject(tmp_path)
    free, whole = spied_gradients(model)
    clipped, cut = spied_gradients(model, norm=0.1)
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-6) and free.grad_norm > 0.1
    assert math.sqrt(sum(float(g.square().sum()) for g in cut)) == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(cut[3], whole[3] * (0.1 / free.grad_norm), rtol=1e-4, atol=1e-9)
    loose, same = spied_gradients(model, norm=1e6)
    assert all(torch.equal(a, b) for a, b in zip(same, whole, strict=True))


def test_a_step_with_nothing_kept_is_skipped(tmp_path):
    nothing = np.zeros_like(WEIGHTS)

    def now_and_then(step, micro_tokens):
        return collate(EXAMPLES, list(range(12)), micro_tokens, WEIGHTS if step == 1 else nothing)

    model = subject(tmp_path)
    before = values(model)
    for normalize in ("kept", "all"):
        steps = fit(model, lora_parameters(model), adamw(), batches(nothing), 2, normalize=normalize)
        assert [(step.outcome, step.loss, step.kept, step.grad_norm) for step in steps] == [("skipped", 0.0, 0.0, 0.0)] * 2
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    # Neither weight decay nor the moments of AdamW move: a step after a skipped one is a first step.
    outcomes = [step.outcome for step in fit(model, lora_parameters(model), adamw(), now_and_then, 3, schedule="constant")]
    assert outcomes == ["skipped", "stepped", "skipped"]
    other = subject(tmp_path)
    list(fit(other, lora_parameters(other), adamw(), batches(), 1, schedule="constant"))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))


def test_weights_from_the_steps_own_losses(tmp_path):
    def below_the_mean(nll, micro):
        assert not nll.requires_grad and len(nll) == sum(micro.sizes) and micro.weights is None
        return torch.cat([(part <= part.mean()).float() for part in nll.split(micro.sizes)])

    model = subject(tmp_path)
    step, online = spied_gradients(model, batches=batches(None), online_weights=below_the_mean)
    # The same weights, fixed beforehand from the same model's losses.
    fixed = np.ones(TOTAL, dtype=np.float32)
    with torch.no_grad():
        for i in range(len(EXAMPLES)):
            ids, start = torch.from_numpy(EXAMPLES.ids(i).astype(np.int64)), int(EXAMPLES.starts[i])
            nll = -model(ids[None])[0].log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
            fixed[slice(*EXAMPLES.completion_offsets[i : i + 2])] = (nll <= nll.mean()).float().numpy()
    same, offline = spied_gradients(model, batches=batches(fixed))
    assert step.kept == same.kept == pytest.approx(fixed.mean()) and 0 < step.kept < 1
    for a, b in zip(online, offline, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_float16_overflow_is_skipped_and_training_goes_on(tmp_path):
    def one_wild_step(step, micro_tokens):
        return collate(EXAMPLES, list(range(12)), micro_tokens, WEIGHTS * (1e4 if step == 1 else 1.0))

    model = subject(tmp_path, torch.float16)
    seen, outcomes, losses = [values(model)], [], []
    for step in fit(model, lora_parameters(model), adamw(), one_wild_step, 6, schedule="constant"):
        outcomes.append(step.outcome)
        losses.append(step.loss)
        seen.append(values(model))
    assert outcomes == ["stepped", "overflowed", *["stepped"] * 4]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True)) and losses[5] < losses[2] < losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in lora_parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_learns_like_float32(tmp_path, dtype):
    losses = {}
    for kind in (torch.float32, dtype):
        model = subject(tmp_path, kind)
        losses[kind] = [step.loss for step in fit(model, lora_parameters(model), adamw(), batches(), 6, schedule="constant")]
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.03) and losses[dtype][5] < 0.9 * losses[dtype][0]


def test_nan_is_an_error_that_names_the_step(tmp_path):
    model = subject(tmp_path)
    steps = fit(model, lora_parameters(model), adamw(), batches(), 3)
    next(steps)
    lora_parameters(model)[0].data[0, 0] = math.nan
    step = next(steps)  # a step does not wait for the device: its loss is read when it is asked for
    with pytest.raises(LetheError, match=r"the loss is nan at step 1 \(examples \[.*\] …\); lower --learning_rate"):
        step.loss  # noqa: B018


def test_dropout_is_on_while_training(tmp_path):
    model = subject(tmp_path, dropout=0.3)
    one, two = (spied_gradients(model, seed=seed)[1] for seed in (0, 1))
    assert model.training and (one[0] - two[0]).norm() > 0.01 * one[0].norm()
    assert torch.equal(spied_gradients(model, seed=0)[1][0], one[0])


def test_several_optimizers_and_the_schedule(tmp_path):
    """Each gets its own peak, all the same factor; a rate of zero moves nothing."""
    model = subject(tmp_path)
    before = values(model)

    def two(parameters):
        return [torch.optim.SGD(parameters[::2], lr=0.0), torch.optim.SGD(parameters[1::2], lr=1e-3)]

    steps = list(fit(model, lora_parameters(model), two, batches(), 4, schedule="linear", warmup=2))
    after = values(model)
    assert all(torch.equal(a, b) for a, b in zip(before[::2], after[::2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1::2], after[1::2], strict=True))
    assert [step.learning_rate for step in steps] == [0.0] * 4


# Schedules and masters


@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (7, 1), (1, 0), (3, 3)])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_factors_after_the_warm_up_equal_transformers(total, warmup, kind):
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[kind]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = make(optimizer, warmup, total).lr_lambdas[0]
    for step in range(total):
        # Their first step of a warm-up has a rate of zero; ours starts one notch higher.
        expected = theirs(step + 1) if step < warmup - 1 else theirs(step) if step >= warmup else 1.0
        assert lr_factor(step, total, warmup, kind) == pytest.approx(expected, abs=1e-12)
        assert 0 < lr_factor(step, total, warmup, kind) <= 1


def test_floor_constant_and_unknown():
    assert [lr_factor(s, 10, 0, "linear", 0.1) for s in (0, 5)] == [1.0, pytest.approx(0.55)]
    assert lr_factor(5, 10, 0, "cosine", 0.1) == pytest.approx(0.55)
    assert [lr_factor(s, 10, 2, "constant") for s in (0, 1, 9)] == [0.5, 1.0, 1.0]
    for step in (0, 9):
        with pytest.raises(ValueError, match="schedule 'cosin' is unknown; known: cosine"):
            lr_factor(step, 10, 2, "cosin")


def test_masters_keep_what_bfloat16_would_lose():
    low, high = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(4))
    masters = make_masters([low, high])
    assert masters[0].dtype == torch.float32 and masters[1] is high
    optimizer = torch.optim.SGD(masters, lr=1e-3)  # a thousandth is lost in a bfloat16 of 1
    for _ in range(10):
        (low.float().sum() + high.sum()).backward()
        collect_gradients([low, high], masters)
        assert low.grad is None and masters[0].grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        write_back([low, high], masters)
    torch.testing.assert_close(masters[0].detach(), torch.full((4,), 0.99))
    assert torch.equal(low, masters[0].bfloat16()) and low.dtype == torch.bfloat16 and (low < 1).all()
