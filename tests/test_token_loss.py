"""Per-token losses from hidden states: against float64 by brute force, the Triton kernel against its PyTorch twin."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_examples, tiny_model

from kernels import linear_nll, token_loss, token_loss_triton, token_stats
from lora import add_lora
from lora.layers import lora_parameters
from lora.resume import Learner

REPO = Path(__file__).parent.parent


def inputs(T=37, H=24, V=101, dtype=torch.float32, scale=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, H, generator=g) * scale).to(dtype)
    weight = (torch.randn(V, H, generator=g) * 0.7).to(dtype)
    return hidden, weight, torch.randint(0, V, (T,), generator=g)


def brute_force(hidden, weight, targets):
    """nll in float64 of float64 copies that can be differentiated."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.T
    return torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None])[:, 0], h, w


def eager_low(hidden, weight, targets):
    """The usual way in low precision: logits in that dtype, then a float32 cross entropy."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


@pytest.mark.parametrize("shape", [(37, 24, 101), (1, 8, 5), (200, 16, 128), (3, 64, 128256)])
def test_losses_equal_float64(shape):
    hidden, weight, targets = inputs(*shape)
    expected = brute_force(hidden, weight, targets)[0]
    nll = linear_nll(hidden, weight, targets)
    assert nll.dtype == torch.float32 and nll.shape == targets.shape
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 64, 1000), (64, 128, 32000)])
def test_low_precision_is_no_worse_than_eager(shape, dtype):
    hidden, weight, targets = inputs(*shape, dtype=dtype)
    expected = brute_force(hidden, weight, targets)[0]
    error = (linear_nll(hidden, weight, targets).double() - expected).abs()
    eager = (eager_low(hidden, weight, targets).double() - expected).abs()
    assert error.max() <= 2 * eager.max() and error.mean() <= eager.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_states(dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    factors = torch.rand(len(targets)) * 3
    factors[::4] = 0  # dropped tokens
    expected_nll, h, _ = brute_force(hidden, weight, targets)
    (expected_nll * factors).sum().backward()
    hidden.requires_grad_()
    (linear_nll(hidden, weight, targets) * factors).sum().backward()
    assert not hidden.grad[::4].any() and hidden.grad.dtype == dtype and weight.grad is None
    if dtype == torch.float32:
        torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-5)
        return
    low = hidden.detach().clone().requires_grad_()
    (eager_low(low, weight, targets) * factors).sum().backward()
    assert (hidden.grad.double() - h.grad).norm() <= 2 * (low.grad.double() - h.grad).norm()


def test_weights_may_depend_on_the_losses():
    """A mask chosen after the forward pass, from all losses, is exact."""
    hidden, weight, targets = inputs()
    expected_nll, h, _ = brute_force(hidden, weight, targets)
    keep = expected_nll.detach() < expected_nll.detach().median()
    ((expected_nll * keep).sum() / keep.sum()).backward()
    hidden.requires_grad_()
    nll = linear_nll(hidden, weight, targets)
    kept = nll.detach() < nll.detach().median()
    ((nll * kept).sum() / kept.sum()).backward()
    assert torch.equal(kept, keep)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("freeze_hidden", [False, True])
def test_gradient_of_a_trainable_head(freeze_hidden):
    hidden, weight, targets = inputs(T=150)
    factors = torch.rand(len(targets))
    expected_nll, h, w = brute_force(hidden, weight, targets)
    (expected_nll * factors).sum().backward()
    hidden.requires_grad_(not freeze_hidden)
    weight.requires_grad_()
    (linear_nll(hidden, weight, targets) * factors).sum().backward()
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-5)
    if freeze_hidden:
        assert hidden.grad is None
    else:
        torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_tied_head():
    """An embedding that is also the head gathers both gradients."""
    _, weight, targets = inputs()
    ids = torch.arange(len(targets)) % len(weight)
    both = weight.double().requires_grad_()
    logits = torch.tanh(both[ids]) @ both.T
    torch.nn.functional.cross_entropy(logits, targets).backward()
    weight.requires_grad_()
    linear_nll(torch.tanh(weight[ids]), weight, targets).mean().backward()
    torch.testing.assert_close(weight.grad.double(), both.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainable", [False, True])
def test_chunks_change_nothing(monkeypatch, trainable):
    results = []
    for tile in ((1024, 2048), (1024, 70), (7, 64)):  # one block; 70 rows each; several tiles of columns too
        monkeypatch.setattr(token_loss, "TILE", tile)
        hidden, weight, targets = inputs(T=201)
        hidden.requires_grad_()
        weight.requires_grad_(trainable)
        chunks = token_loss._blocks(hidden, weight)
        assert chunks[0][0] == 0 and chunks[-1][1] == 201 and all(a[1] == b[0] for a, b in zip(chunks, chunks[1:], strict=False))
        nll = linear_nll(hidden, weight, targets)
        (nll * torch.linspace(0, 1, 201)).sum().backward()
        stats = token_stats(hidden.detach(), weight, targets)
        results.append((len(chunks), nll.detach(), hidden.grad, weight.grad, stats.entropy))
    assert [r[0] for r in results] == [1, 3, 4]
    for _, *rest in results[1:]:
        for one, other in zip(results[0][1:], rest, strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_all_statistics_equal_float64():
    hidden, weight, targets = inputs(T=90)
    nll = brute_force(hidden, weight, targets)[0].detach()
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    stats = token_stats(hidden, weight, targets, threshold=40.0)
    torch.testing.assert_close(stats.nll.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.perplexity.double(), nll.exp(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.hit, logp.argmax(-1) == targets) and torch.equal(stats.keep, nll <= math.log(40.0))
    assert 0 < stats.keep.sum() < 90 and stats.hit.dtype == stats.keep.dtype == torch.bool


def test_equal_to_the_threshold_is_kept_and_the_first_of_a_tie_hits():
    # Two logits of ln 3 and 0 leave the first token a perplexity of 4 / 3; eight equal ones give 8 each.
    hidden, weight = torch.eye(2), torch.tensor([[0.0, 1.0]] * 8)
    targets = torch.tensor([0, 1])
    stats = token_stats(hidden, weight, targets, threshold=8.0)
    assert stats.keep.tolist() == [True, True] and stats.hit.tolist() == [True, False]
    nll = float(stats.nll[0])
    assert not token_stats(hidden, weight, targets, threshold=math.exp(nll) * (1 - 1e-6)).keep.any()
    assert token_stats(hidden, weight, targets).keep.all()


def test_no_tokens():
    hidden, weight, targets = inputs(T=5)
    hidden = hidden[:0].requires_grad_()
    nll = linear_nll(hidden, weight, targets[:0])
    nll.sum().backward()
    assert nll.shape == (0,) and hidden.grad.shape == (0, 24)
    assert [tuple(part.shape) for part in token_stats(hidden.detach(), weight, targets[:0])] == [(0,)] * 5


def test_what_does_not_fit_is_refused():
    hidden, weight, targets = inputs()
    good = {"hidden": hidden, "weight": weight, "targets": targets}
    for change in ({"hidden": hidden[0]}, {"hidden": hidden[:, :5]}, {"targets": targets[:5]}, {"weight": weight[0]}):
        with pytest.raises(ValueError, match="do not fit"):
            linear_nll(**{**good, **change})
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 101\), got \d+ to 101"):
        linear_nll(hidden, weight, targets.index_fill(0, torch.tensor([3]), 101))
    with pytest.raises(ValueError, match="targets must lie"):
        token_stats(hidden, weight, targets.index_fill(0, torch.tensor([3]), -100))
    with pytest.raises(ValueError, match="one dtype, got torch.float32 and torch.bfloat16"):
        linear_nll(hidden, weight.bfloat16(), targets)
    for threshold in (0.0, -1.0):
        with pytest.raises(ValueError, match="threshold is a perplexity"):
            token_stats(hidden, weight, targets, threshold)


# Triton, in its interpreter


def plain_rows(logits, target_logit, targets, log_threshold, gradient):
    """What one program computes for its row, by whole-row softmax."""
    top, argmax = logits.float().max(-1)
    probability = (logits.float() - top[:, None]).exp()
    total = probability.sum(-1)
    log_total = top + total.log()
    nll = (log_total - target_logit).clamp(min=0)
    probability = probability / total[:, None]
    entropy = log_total - (probability * logits).sum(-1)  # log Z - sum p z
    if gradient:
        logits.copy_(probability.scatter_add(1, targets[:, None], torch.full_like(nll, -1.0)[:, None]))
    return token_loss.TokenStats(nll, nll.exp(), entropy, argmax == targets, nll <= log_threshold)


def rows_of_both(logits, target_logit, targets, log_threshold, gradient):
    one, other = logits.clone(), logits.clone()
    torch_rows = plain_rows(one, target_logit, targets, log_threshold, gradient)
    triton_rows = token_loss.TokenStats(*token_loss_triton.rows(other, target_logit, targets, log_threshold, gradient))
    return torch_rows, triton_rows, one, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [5, 128, 1001, 9001])
@pytest.mark.parametrize("gradient", [False, True])
def test_triton_equals_its_twin(V, dtype, gradient):
    g = torch.Generator().manual_seed(V)
    targets = torch.randint(0, V, (6,), generator=g)
    logits = (torch.randn(6, V, generator=g) * 4).to(dtype)
    logits[1] += 80  # far from zero
    logits[2] = logits[2].round()  # many ties
    targets[2] = logits[2].argmax()
    target_logit = logits.float().gather(1, targets[:, None])[:, 0] + 0.001
    twin, kernel, one, other = rows_of_both(logits, target_logit, targets, math.log(300.0), gradient)
    torch.testing.assert_close(kernel.nll, twin.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel.perplexity, twin.perplexity, rtol=1e-4, atol=1e-4)
    assert torch.equal(kernel.hit, twin.hit) and kernel.hit[2] and torch.equal(kernel.keep, twin.keep)
    if gradient:  # both round the same float32 value
        torch.testing.assert_close(other, one, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-7)
    else:
        torch.testing.assert_close(kernel.entropy, twin.entropy, rtol=1e-4, atol=1e-4)
        assert torch.equal(other, logits)


def test_triton_ties_threshold_and_infinity():
    logits = torch.zeros(3, 4100)  # the tie spans two blocks
    logits[0, [7, 4099]] = 2.0
    targets = torch.tensor([7, 4099, 0])
    logits[1, [7, 4099]] = 2.0
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    for threshold in (4000.0, math.inf):
        twin, kernel, *_ = rows_of_both(logits, target_logit, targets, math.log(threshold), False)
        assert kernel.hit.tolist() == twin.hit.tolist() == [True, False, True]
        assert kernel.keep.tolist() == twin.keep.tolist()
    # Strict: a token exactly at the threshold is kept, the next smaller threshold drops it.
    for which in (0, 1):
        own = rows_of_both(logits, target_logit, targets, math.inf, False)[which].nll[2]
        for log_threshold, kept in ((float(own), True), (float(torch.nextafter(own, torch.tensor(0.0))), False)):
            assert bool(rows_of_both(logits, target_logit, targets, log_threshold, False)[which].keep[2]) == kept


@pytest.mark.parametrize("where", ["a logit", "the target's logit"])
def test_nan_stays_nan_in_both(where):
    """A diverged model must not look like one without loss."""
    logits, targets = torch.randn(2, 300), torch.tensor([3, 4])
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    if where == "a logit":
        logits[0, 100] = math.nan
    else:
        target_logit[0] = math.nan
    twin, kernel, *_ = rows_of_both(logits, target_logit, targets, math.log(30.0), False)
    assert twin.nll.isnan().tolist() == kernel.nll.isnan().tolist() == [True, False]
    assert not twin.keep[0] and not kernel.keep[0]


def test_a_training_step_with_triton_equals_the_twins(tmp_path, monkeypatch):
    from data.batching import collate
    from train import fit

    examples, after = random_examples(6), []
    for kernels in ("", "triton"):
        monkeypatch.setenv("LETHE_KERNELS", kernels)
        model = tiny_model(tmp_path)
        add_lora(model, 4, 8, dropout=0.1, generator=torch.Generator().manual_seed(0))

        def adamw(parameters):
            return [torch.optim.AdamW(parameters, lr=1e-2)]

        weights = torch.arange(int(examples.completion_offsets[-1])).remainder(3).float().numpy()
        micros = collate(examples, [0, 1, 2, 3, 4, 5], 60, weights)
        steps = list(fit(model, Learner(model, lora_parameters(model), adamw), lambda *_: micros, 2, micro_tokens=60))  # noqa: B023
        after.append(([step.loss for step in steps], [p.detach().clone() for p in lora_parameters(model)]))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-6) and after[0][0][1] < after[0][0][0]
    for one, other in zip(after[0][1], after[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # AdamW moves by 1e-2 whatever the size of a gradient


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.token_loss_triton import BLOCK, row_kernel
for architecture in (80, 90):
    for dtype in ("*bf16", "*fp32"):
        for gradient in (False, True):
            floats = {name + "_ptr": "*fp32" for name in ("target_logit", "nll", "perplexity", "entropy")}
            kinds = {"logits_ptr": dtype, **floats, "targets_ptr": "*i64", "hit_ptr": "*i8", "keep_ptr": "*i8", "stride": "i64",
                     "columns": "i32", "log_threshold": "fp32", "GRADIENT": "constexpr", "BLOCK": "constexpr"}
            source = ASTSource(fn=row_kernel, signature=kinds, constexprs={"GRADIENT": gradient, "BLOCK": BLOCK})
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
            print(architecture, dtype, gradient, len(compiled.asm["cubin"]), "exp" in compiled.asm["ptx"] or "ex2" in compiled.asm["ptx"])
"""


def test_the_kernel_compiles_for_gpus(tmp_path):
    """Offline, for A100 and H100/H200, with the compiler that Triton brings."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 8 and all(int(line.split()[3]) > 1000 and line.endswith("True") for line in lines), run.stdout
