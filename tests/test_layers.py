"""add + RMSNorm, rotary positions and SwiGLU: against autograd of the plain formula in float64, Triton against its twins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import layers, layers_triton

REPO = Path(__file__).parent.parent
EPS = 1e-5
SHAPES = [(1, 1), (1, 100), (7, 64), (70, 193)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_inputs(T, H, dtype=torch.float32):
    x, residual, grad, grad_summed = draw(4, T, H, dtype=dtype).unbind()
    return x * 3, residual, grad, grad_summed, draw(H, dtype=dtype, seed=1) + 1


def plain_norm(x, residual, weight):
    """Hugging Face's LlamaRMSNorm on the sum: statistics in float32 or wider."""
    summed = x if residual is None else x + residual
    wide = summed if summed.dtype == torch.float64 else summed.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), summed


def plain_rotate(heads, cos, sin):
    """Hugging Face's apply_rotary_pos_emb."""
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gradients(function, inputs, grads):
    """Of the inputs, by autograd, in the inputs' dtype."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    torch.autograd.backward(outputs, grads)
    return [x.grad for x in inputs]


@pytest.fixture(params=[1 << 18, 150])
def block(request, monkeypatch):
    """One block, or several, the last one short."""
    monkeypatch.setattr(layers, "BLOCK", request.param)


# The twins


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_equals_float64(block, shape, with_residual):
    x, residual, grad, grad_summed, weight = norm_inputs(*shape)
    residual = residual if with_residual else None
    normed, summed, rstd = layers.add_rms_norm(x, residual, weight, EPS)
    wide = [t if t is None else t.double() for t in (x, residual, weight)]
    expected, total = plain_norm(*wide)
    torch.testing.assert_close(normed.double(), expected, **CLOSE)
    torch.testing.assert_close(summed.double(), total, **CLOSE)
    torch.testing.assert_close(rstd.double(), (total.pow(2).mean(-1) + EPS).rsqrt(), **CLOSE)
    assert rstd.dtype == torch.float32 and (with_residual or summed is x)
    assert torch.equal(layers.rms_norm_again(summed, weight, rstd), normed)
    for other in (grad_summed, None):
        both = grad.double(), torch.zeros_like(total) if other is None else other.double()
        expected = gradients(lambda s, w: plain_norm(s, None, w), (total, wide[2]), both)
        for weight_grad in (True, False):
            got, got_weight = layers.add_rms_norm_backward(grad.clone(), summed, weight, rstd, other, weight_grad)
            torch.testing.assert_close(got.double(), expected[0], rtol=1e-4, atol=1e-5)
            if weight_grad:
                torch.testing.assert_close(got_weight.double(), expected[1], rtol=1e-4, atol=1e-4)
            else:
                assert got_weight is None


@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_equals_float64(block, inverse):
    qkv, angle = draw(40, 7 * 10), draw(40, 5, seed=1)
    before = qkv.clone()
    layers.rotate_(qkv.view(40, 7, 10)[:, :5], angle.cos(), angle.sin(), inverse)
    expected = before.view(40, 7, 10).double()
    expected[:, :5] = plain_rotate(expected[:, :5], angle.double().cos(), angle.double().sin() * (-1 if inverse else 1))
    torch.testing.assert_close(qkv.view(40, 7, 10).double(), expected, **CLOSE)
    assert torch.equal(qkv[:, 50:], before[:, 50:])  # the values stay
    layers.rotate_(qkv.view(40, 7, 10)[:, :5], angle.cos(), angle.sin(), not inverse)
    torch.testing.assert_close(qkv, before, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_float64(block, shape):
    T, inner = shape
    gate_up, grad = draw(T, 2 * inner) * 4, draw(T, inner, seed=1)
    torch.testing.assert_close(layers.swiglu(gate_up).double(), plain_swiglu(gate_up.double()), **CLOSE)
    (expected,) = gradients(plain_swiglu, (gate_up.double(),), (grad.double(),))
    torch.testing.assert_close(layers.swiglu_backward(grad, gate_up).double(), expected, **CLOSE)
    again = gate_up.clone()
    assert layers.swiglu_backward(grad, again, out=again) is again
    assert torch.equal(again, layers.swiglu_backward(grad, gate_up))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp in the interpreter; 1 / infinity is what is wanted
def test_swiglu_far_from_zero():
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]])
    for module in (layers, layers_triton):
        out = torch.empty_like(gate_up)
        assert module.swiglu(gate_up).tolist() == [[0, 0, 200, 2e4]]
        module.swiglu_backward(torch.ones(1, 4), gate_up, out)
        assert out.tolist() == [[0, 0, 2, 2, 0, 0, 100, 1e4]]


def test_doubles_stay_double():
    x, residual, grad, grad_summed, weight = norm_inputs(9, 20, torch.float64)
    normed, summed, rstd = layers.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(normed, plain_norm(x, residual, weight)[0], rtol=1e-12, atol=1e-12)
    expected = gradients(lambda s, w: plain_norm(s, None, w), (summed, weight), (grad, grad_summed))
    got = layers.add_rms_norm_backward(grad.clone(), summed, weight, rstd, grad_summed, True)
    torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=1e-12)
    gate_up = draw(9, 40, dtype=torch.float64)
    (expected,) = gradients(plain_swiglu, (gate_up,), (grad,))
    torch.testing.assert_close(layers.swiglu_backward(grad, gate_up), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", [layers, layers_triton])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(module, dtype):
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
    factor = 3 if module is layers_triton and dtype == torch.bfloat16 else 2

    def bounded(got, usual, expected):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= factor * (usual.double() - expected).norm()

    x, residual, grad, grad_summed, weight = norm_inputs(60, 128, dtype)
    normed, summed, rstd = module.add_rms_norm(x, residual, weight, EPS)
    bounded(normed, plain_norm(x, residual, weight)[0], plain_norm(x.double(), residual.double(), weight.double())[0])
    got, got_weight = module.add_rms_norm_backward(grad.clone(), summed, weight, rstd, grad_summed, True)
    both = [
        gradients(lambda s, w: plain_norm(s, None, w), (summed.to(kind), weight.to(kind)), (grad.to(kind), grad_summed.to(kind)))
        for kind in (dtype, torch.float64)
    ]
    bounded(got, both[0][0], both[1][0])
    bounded(got_weight.to(dtype), both[0][1], both[1][1])
    gate_up, grad = draw(60, 256, dtype=dtype), grad
    bounded(module.swiglu(gate_up), plain_swiglu(gate_up), plain_swiglu(gate_up.double()))
    out = torch.empty_like(gate_up)
    module.swiglu_backward(grad, gate_up, out)
    bounded(out, *(gradients(plain_swiglu, (gate_up.to(kind),), (grad.to(kind),))[0] for kind in (dtype, torch.float64)))
    heads, angle = draw(60, 4, 16, dtype=dtype), draw(60, 8)
    turned = heads.clone()
    module.rotate_(turned, angle.cos(), angle.sin(), False)
    usual = plain_rotate(heads, angle.cos().to(dtype), angle.sin().to(dtype))
    bounded(turned, usual, plain_rotate(heads.double(), angle.double().cos(), angle.double().sin()))


def test_nothing():
    for module in (layers, layers_triton):
        normed, summed, rstd = module.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPS)
        grad, grad_weight = module.add_rms_norm_backward(normed, summed, torch.ones(8), rstd, None, True)
        module.rotate_(torch.empty(0, 2, 4), torch.empty(0, 2), torch.empty(0, 2), False)
        gate_up = torch.empty(0, 8)
        module.swiglu_backward(module.swiglu(gate_up), gate_up, gate_up)
        assert normed.shape == grad.shape == (0, 8) and rstd.shape == (0,) and torch.equal(grad_weight, torch.zeros(8))


# Triton, in its interpreter


def everything(module, T, H, dtype, weight_grad=True):
    """All outputs of a module on one set of inputs, with views wherever a caller may pass them."""
    x, residual, grad, grad_summed, weight = norm_inputs(T, H, dtype)
    found = []
    for other in (residual, None):
        normed, summed, rstd = module.add_rms_norm(x, other, weight, EPS)
        assert torch.equal(module.rms_norm_again(summed, weight, rstd), normed)
        from_above = grad_summed if other is None else None
        back, back_weight = module.add_rms_norm_backward(grad.clone(), summed, weight, rstd, from_above, weight_grad)
        found += [normed, summed, rstd, back, *([back_weight] if weight_grad else [])]
    gate_up = torch.cat((x, grad, residual), 1)[:, H // 2 : H // 2 + 2 * H]  # rows of a wider matrix
    out = torch.empty(T, 2 * H, dtype=dtype)
    module.swiglu_backward(grad_summed, gate_up, out)
    qkv, angle = draw(T, 7 * 12, dtype=dtype), draw(T, 6)
    for inverse in (False, True, True):
        module.rotate_(qkv.view(T, 7, 12)[:, :5], angle.cos(), angle.sin(), inverse)
    return [*found, module.swiglu(gate_up), out, qkv]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_its_twin(shape, dtype):
    for twin, kernel in zip(*(everything(module, *shape, dtype) for module in (layers, layers_triton)), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(kernel, twin, **CLOSE)
        else:  # the interpreter cuts bfloat16 off where a GPU rounds it, three times over
            assert kernel.dtype == twin.dtype and (kernel.double() - twin.double()).norm() <= 2**-6 * twin.double().norm() + 1e-6


def test_triton_weight_gradient_over_several_programs(monkeypatch):
    monkeypatch.setattr(layers_triton, "ROWS", 16)
    for weight_grad in (True, False):
        both = (everything(module, 70, 33, torch.float32, weight_grad) for module in (layers, layers_triton))
        for twin, kernel in zip(*both, strict=True):
            torch.testing.assert_close(kernel, twin, **CLOSE)


def test_triton_columns_over_several_programs(monkeypatch):
    monkeypatch.setattr(layers_triton, "COLUMNS", 16)
    for twin, kernel in zip(*(everything(module, 3, 50, torch.float32) for module in (layers, layers_triton)), strict=True):
        torch.testing.assert_close(kernel, twin, **CLOSE)


def test_dispatch(monkeypatch):
    """LETHE_KERNELS=triton reaches every kernel, and each does what its twin does."""

    def run():
        found = everything(layers, 5, 24, torch.float32)
        return [*found, layers.swiglu_backward(draw(5, 4), draw(5, 8, seed=2))]

    twin, calls = run(), set()
    monkeypatch.setenv("LETHE_KERNELS", "triton")
    for name in ("add_rms_norm", "rms_norm_again", "add_rms_norm_backward", "rotate_", "swiglu", "swiglu_backward"):
        real = getattr(layers_triton, name)
        monkeypatch.setattr(layers_triton, name, lambda *args, real=real, name=name: (calls.add(name), real(*args))[1])
    for one, other in zip(twin, run(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="last dimension of heads"):
        layers.rotate_(torch.zeros(4, 6, 2).transpose(1, 2), torch.zeros(4, 3), torch.zeros(4, 3))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import layers_triton as module
constants = {
    "norm_kernel": {"ADD": True, "AGAIN": False, "BLOCK": 2048},
    "norm_backward_kernel": {"OTHER": True, "WEIGHT": True, "ROWS": 64, "BLOCK": 2048},
    "rotate_kernel": {"INVERSE": False, "HEADS": 64, "HALF": 32},
    "swiglu_kernel": {"BLOCK": 1024},
    "swiglu_backward_kernel": {"BLOCK": 1024},
}
special = dict.fromkeys(("rstd_ptr", "partial_ptr", "cos_ptr", "sin_ptr"), "*fp32") | {"eps": "fp32"}
for architecture in (80, 90):
    for dtype in ("*bf16", "*fp32"):
        for name, fixed in constants.items():
            kernel = getattr(module, name)
            kinds = {arg: dtype if arg.endswith("_ptr") else "i32" for arg in kernel.arg_names}
            kinds |= {arg: kind for arg, kind in special.items() if arg in kinds} | dict.fromkeys(fixed, "constexpr")
            source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
            print(architecture, dtype, name, len(compiled.asm["cubin"]))
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """Offline, for A100 and H100/H200, with the compiler that Triton brings."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 20 and all(int(line.split()[3]) > 1000 for line in lines), run.stdout
