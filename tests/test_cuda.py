"""On a GPU: every kernel against its twin, training and generation against the CPU, and no step that waits for the device."""

import numpy as np
import pytest
import torch
from tiny import random_examples, tiny_model, train_some

from data.batching import collate
from kernels import layers, linear_nll, low_rank, token_stats
from kernels.decode_attention import decode_attention
from kernels.dropout import Span
from lora import add_lora
from lora.layers import lora_parameters
from lora.resume import Learner
from model.attention import Pack, attention_kind
from model.generate import generate, generate_and_score
from train import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
G = torch.Generator().manual_seed(0)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would blur float32 products to bfloat16's ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def near(found, expected, dtype, slack=1.0):
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    difference = (found.cpu().double() - expected.double()).abs().max().item()
    assert difference <= slack * bound * max(1.0, expected.double().abs().max().item())


def both(*shapes, dtype):
    """The same values here and there."""
    here = [torch.randn(*shape, generator=G).to(dtype) for shape in shapes]
    return here, [x.cuda() for x in here]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_norm_rotary_swiglu(dtype):
    (x, residual, weight, grad), there = both((37, 200), (37, 200), (200,), (37, 200), dtype=dtype)
    X, R, W, D = there
    normed, total, rstd = layers.add_rms_norm(x, residual, weight, 1e-5)
    for found, expected in zip(layers.add_rms_norm(X, R, W, 1e-5), (normed, total, rstd), strict=True):
        near(found, expected, dtype)
    near(layers.rms_norm_again(total.cuda(), W, rstd.cuda()), normed, dtype)
    found = layers.add_rms_norm_backward(D.clone(), total.cuda(), W, rstd.cuda(), R, True)
    expected = layers.add_rms_norm_backward(grad.clone(), total, weight, rstd, residual, True)
    for one, other in zip(found, expected, strict=True):
        near(one, other, dtype, slack=2)
    (heads, gate_up, up), (H, GU, U) = both((37, 5, 32), (37, 96), (37, 48), dtype=dtype)
    cos, sin = torch.rand(2, 37, 16, generator=G)
    for inverse in (False, True):
        layers.rotate_(heads[:, :3], cos, sin, inverse)
        layers.rotate_(H[:, :3], cos.cuda(), sin.cuda(), inverse)
        near(H, heads, dtype)
    near(layers.swiglu(GU), layers.swiglu(gate_up), dtype)
    near(layers.swiglu_backward(U, GU), layers.swiglu_backward(up, gate_up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_cuda_low_rank(dtype, p):
    (x, A, low, grad), (X, AA, LL, GG) = both((45, 72), (24, 72), (45, 24), (45, 72), dtype=dtype)
    keys = torch.randint(-(2**31), 2**31 - 1, (45,), dtype=torch.int32, generator=G)
    spans = [Span(0, 8, 3), Span(8, 24, 4)]
    near(low_rank.thin(X, AA, spans, p, keys.cuda()), low_rank.thin(x, A, spans, p, keys), dtype, slack=4)
    near(low_rank.thin_grad_A(LL, X, spans, p, keys.cuda()), low_rank.thin_grad_A(low, x, spans, p, keys), dtype, slack=4)
    low_rank.thin_grad_x_(GG, LL, AA, spans, p, keys.cuda())
    low_rank.thin_grad_x_(grad, low, A, spans, p, keys)
    near(GG, grad, dtype, slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True])
def test_cuda_loss(dtype, trainable):
    (hidden, weight), (HH, WW) = both((300, 64), (1001, 64), dtype=dtype)
    targets, factor = torch.randint(0, 1001, (300,), generator=G), torch.rand(300, generator=G)
    results = []
    for h, w, t, f in ((hidden, weight, targets, factor), (HH, WW, targets.cuda(), factor.cuda())):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(trainable)
        nll = linear_nll(h, w, t)
        (nll * f).sum().backward()
        stats = token_stats(h.detach(), w.detach(), t, 300.0)
        results.append([nll.detach(), h.grad, *([w.grad] if trainable else []), stats.entropy])
    for found, expected in zip(results[1], results[0], strict=True):
        near(found, expected, dtype, slack=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_decode_attention(dtype):
    (query, keys, values), there = both((5, 8, 64), (5, 2, 300, 64), (5, 2, 300, 64), dtype=dtype)
    lengths = torch.tensor([1, 300, 64, 65, 7])
    near(decode_attention(*there, lengths.cuda()), decode_attention(query, keys, values, lengths), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_pack_equals_cpu(tmp_path, dtype):
    here, there = tiny_model(tmp_path, head_dim=16), tiny_model(tmp_path, dtype, head_dim=16).cuda()
    lengths = [1, 33, 7, 60, 2]
    ids = torch.randint(0, 97, (sum(lengths),), generator=G)
    with torch.no_grad():
        expected = here.hidden(ids, Pack(lengths, here.config))
        near(there.hidden(ids.cuda(), Pack(lengths, there.config, "cuda")), expected, dtype, slack=5)


def steps_of(model, micro_tokens=200):
    examples = random_examples(24)
    weights = np.random.default_rng(0).choice([0.0, 1.0], int(examples.completion_offsets[-1])).astype(np.float32)
    settings = {"micro_tokens": micro_tokens, "schedule": "constant", "seed": 5}
    optimizers = lambda p: [torch.optim.AdamW(p, lr=1e-2)]  # noqa: E731
    learner = Learner(model, lora_parameters(model), optimizers)
    return fit(model, learner, lambda _, t: collate(examples, list(range(24)), t, weights), 8, **settings)


def subject(folder, dtype, device):
    model = tiny_model(folder, dtype)
    add_lora(model, 8, 8.0, dropout=0.1, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_trains_as_the_cpu_does(tmp_path, dtype):
    """The same losses, dropout and masks included: the masks are a hash, not a device's generator."""
    expected = [step.loss for step in steps_of(subject(tmp_path, torch.float32, "cpu"))]
    found = [step.loss for step in steps_of(subject(tmp_path, dtype, "cuda"))]
    assert found == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 3e-2) and expected[7] < expected[0]


def test_cuda_a_step_never_waits(tmp_path):
    model = subject(tmp_path, torch.bfloat16, "cuda")
    steps = steps_of(model)
    for _ in range(3):  # kernels compile, optimizer states appear
        next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = [next(steps) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(step.loss > 0 for step in seen)


def test_cuda_generates_as_the_cpu_does(tmp_path):
    here, there = tiny_model(tmp_path), tiny_model(tmp_path).cuda()
    prompts = [torch.randint(0, 97, (int(n),), generator=G).tolist() for n in torch.randint(1, 30, (40,), generator=G)]
    answers = [[1, 2, 3]] * 40
    stops = {5, 11, 50}
    expected, losses = generate_and_score(here, prompts, answers, 24, stops, batch_size=16)
    found, others = generate_and_score(there, prompts, answers, 24, stops, batch_size=16)
    assert found == expected and others == pytest.approx(losses, rel=1e-4)
    assert generate(there, prompts, 24, stops, batch_size=3) == expected  # and without refilled buckets


def test_cuda_uses_varlen_attention_where_torch_has_it():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("before Ampere")
    assert attention_kind(torch.device("cuda"), torch.bfloat16) == "varlen"
