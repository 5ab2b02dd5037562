"""The thin products of LoRA and their dropout: against the plain formula in float64, the Triton kernels against their twins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import low_rank, low_rank_triton
from kernels.dropout import Span, drop, dropped_hashes, kept, masked_, mix, to_int32, words
from kernels.low_rank import thin, thin_grad_A, thin_grad_x_

REPO = Path(__file__).parent.parent
SHAPES = [(1, 100, (4,)), (70, 96, (16, 16, 16)), (33, 130, (8, 3, 48)), (130, 40, (16,) * 5)]  # rows, columns, ranks


def inputs(M, K, ranks, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, A, grad = torch.randn(M, K, generator=g), torch.randn(sum(ranks), K, generator=g), torch.randn(M, sum(ranks), generator=g)
    ends = torch.tensor([0, *ranks]).cumsum(0).tolist()
    spans = [Span(a, b, 7 * i + 3) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    return x.to(dtype), A.to(dtype), grad.to(dtype), spans, keys(M, seed)


def keys(rows, seed=0):
    return torch.randint(-(2**31), 2**31 - 1, (rows,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def masks(rows, columns, p, salt=1, seed=0):
    return drop(torch.ones(rows, columns), p, keys(rows, seed), salt) == 0


def brute_force(x, A, grad, spans, p, row_keys):
    """The plain formula in float64 and its gradients by autograd: thin, grad_A, grad_x."""
    x, A = x.double().requires_grad_(), A.double().requires_grad_()
    out = torch.cat([drop(x, p, row_keys, salt) @ A[a:b].T for a, b, salt in spans], dim=1)
    out.backward(grad.double())
    return out.detach(), A.grad, x.grad


def ours(module, x, A, grad, spans, p, row_keys, start=None):
    grad_x = torch.zeros_like(x) if start is None else start.clone()
    module.thin_grad_x_(grad_x, grad, A, spans, p, row_keys)
    return module.thin(x, A, spans, p, row_keys), module.thin_grad_A(grad, x, spans, p, row_keys), grad_x


# The products


@pytest.mark.parametrize("p", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64(shape, p, monkeypatch):
    monkeypatch.setattr(low_rank, "BLOCK", 1000)  # several blocks
    case = inputs(*shape)
    for got, expected in zip(ours(low_rank, *case[:4], p, case[4]), brute_force(*case[:4], p, case[4]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


def test_gradient_is_added():
    x, A, grad, spans, row_keys = inputs(*SHAPES[1])
    for p in (0.0, 0.3):
        expected = x.double() + brute_force(x, A, grad, spans, p, row_keys)[2]
        torch.testing.assert_close(ours(low_rank, x, A, grad, spans, p, row_keys, start=x)[2].double(), expected, rtol=1e-5, atol=2e-5)


def test_doubles_stay_double():
    case = inputs(*SHAPES[2], dtype=torch.float64)
    for got, expected in zip(ours(low_rank, *case[:4], 0.2, case[4]), brute_force(*case[:4], 0.2, case[4]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [low_rank, low_rank_triton])
def test_low_precision_is_no_worse_than_eager(module, dtype):
    x, A, grad, spans, row_keys = inputs(200, 128, (16, 16), dtype=dtype)
    p = 0.05
    low = x.clone().requires_grad_(), A.clone().requires_grad_()
    eager = torch.cat([drop(low[0], p, row_keys, salt) @ low[1][a:b].T for a, b, salt in spans], dim=1)
    eager.backward(grad)
    results = ours(module, x, A, grad, spans, p, row_keys), (eager.detach(), low[1].grad, low[0].grad)
    for got, usual, expected in zip(*results, brute_force(x, A, grad, spans, p, row_keys), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= 2 * (usual.double() - expected).norm()


def test_blocks_change_no_mask(monkeypatch):
    """Nor does a split of the rows: with a one-hot A the products show the masked input itself."""
    x, row_keys = torch.randn(50, 20), keys(50)
    A, spans = torch.eye(20), [Span(0, 20, 5)]
    whole = thin(x, A, spans, 0.4, row_keys)
    monkeypatch.setattr(low_rank, "BLOCK", 60)
    assert torch.equal(thin(x, A, spans, 0.4, row_keys), whole)
    assert torch.equal(torch.cat([thin(x[i : i + 7], A, spans, 0.4, row_keys[i : i + 7]) for i in range(0, 50, 7)]), whole)
    assert torch.equal(whole == 0, drop(x, 0.4, row_keys, 5) == 0)


def test_nothing_and_views():
    x, A, grad, spans, row_keys = inputs(30, 24, (8, 8))
    for p in (0.0, 0.1):
        got = ours(low_rank, x[:0], A, grad[:0], spans, p, row_keys[:0])
        assert [tuple(part.shape) for part in got] == [(0, 16), (16, 24), (0, 24)] and not got[1].any()
    wide, row = torch.randn(30, 50), 0.1
    for module in (low_rank, low_rank_triton):
        for one, other in zip(
            ours(module, wide[:, 4:28], A.T.contiguous().T, torch.cat((grad, grad), 1)[:, 16:], spans, row, row_keys),
            ours(module, wide[:, 4:28].contiguous(), A, grad, spans, row, row_keys),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_a_dropped_nan_is_gone_and_a_kept_one_stays():
    for p in (0.3, 0.8):  # the two ways of masked_
        x, row_keys = torch.full((4, 64), torch.nan), keys(4)
        gone = drop(torch.ones(4, 64), p, row_keys, 1) == 0
        shown = thin(x, torch.eye(64), [Span(0, 64, 1)], p, row_keys)
        assert shown.isnan().all()  # 0 * NaN: a product cannot hide it
        (of_rows,), of_columns = words(row_keys, [1], 64)
        hashes = of_rows[:, None] * of_columns
        assert torch.equal(masked_(hashes.clone(), x, p).isnan(), ~gone)


# The masks


@pytest.mark.parametrize("p", [1e-9, 0.001, 0.05, 0.3, 0.498, 0.4981, 0.5, 0.75, 0.9999])
def test_both_ways_of_masking_agree(p):
    """Over hashes at every border: the interval's ends, infinities, NaNs, zeros, and random ones."""
    n = dropped_hashes(p)
    borders = [0, -(2**31), 2**31 - 1, -(2**23), -(2**23) - n + 1, 2**31 - 2**23, -(2**31) + 2**23]
    near = [to_int32(b + d) for b in borders for d in range(-3, 4)]
    hashes = torch.cat((torch.tensor(near, dtype=torch.int32), keys(100_000)))[None]
    inside = (hashes.long() + 2**23 + n - 1) % 2**32 < n  # the definition, in wide integers
    x = torch.ones_like(hashes, dtype=torch.float32)
    assert torch.equal(kept(hashes, p), ~inside)
    assert torch.equal(masked_(hashes.clone(), x, p) == 0, inside)
    assert inside.any() and not inside.all()


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_share_and_scale(p):
    x = drop(torch.ones(2000, 500), p, keys(2000), 3)
    share = (x == 0).float()
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share.mean() - p) < 4 * error
    torch.testing.assert_close(x.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    # Of every row and every column alike: their sums vary as binomials do.
    for dim, n in ((1, 500), (0, 2000)):
        variance = share.sum(dim).var() / (n * p * (1 - p))
        assert 0.8 < variance < 1.2, (dim, variance)


def correlation(a, b, p):
    """In standard errors: about normal(0, 1) where the masks are independent."""
    return float(((a.double() - p) * (b.double() - p)).mean() / (p * (1 - p)) * a.numel() ** 0.5)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_masks_are_independent(p):
    mask = masks(3000, 1024, p)
    for salt in (2, 3, 17, 1000):
        assert abs(correlation(mask, masks(3000, 1024, p, salt), p)) < 4
    assert abs(correlation(mask, masks(3000, 1024, p, seed=1), p)) < 4
    for step in (1, 2, 3, 16, 128):
        assert abs(correlation(mask[:, step:], mask[:, :-step], p)) < 4
        assert abs(correlation(mask[step:], mask[:-step], p)) < 4
    # Every pair of columns, every pair of rows: no pair sticks out.
    centred = (mask.double() - p) / (p * (1 - p)) ** 0.5
    for matrix in (centred, centred[:1024].T):
        table = (matrix.T @ matrix / len(matrix) ** 0.5).fill_diagonal_(0)
        assert table.abs().max() < 8 and abs(table.var() - 1) < 0.05


def test_adjacent_keys_and_salts_are_independent():
    """Keys need not be mixed beforehand."""
    ones, row_keys = torch.ones(4000, 64), torch.arange(4000, dtype=torch.int32)
    first = drop(ones, 0.1, row_keys, 1) == 0
    assert abs(correlation(first[1:], first[:-1], 0.1)) < 4
    assert abs(correlation(first, drop(ones, 0.1, row_keys, 2) == 0, 0.1)) < 4
    assert not torch.equal(first[1:], (drop(ones, 0.1, row_keys, 2) == 0)[:-1])


def test_what_a_mask_depends_on():
    row_keys = keys(40)
    one = drop(torch.randn(40, 30), 0.3, row_keys, 4) == 0
    assert torch.equal(drop(torch.randn(40, 30), 0.3, row_keys, 4) == 0, one)
    assert torch.equal(drop(torch.randn(40, 50), 0.3, row_keys, 4)[:, :30] == 0, one)  # columns beyond change nothing
    x = torch.randn(3, 3)
    assert drop(x, 0.0, None, 1) is x


def test_mix_is_murmur3():
    def reference(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    values = [0, 1, 2**31 - 1, -1, -(2**31), *keys(50).tolist()]
    assert [v % 2**32 for v in mix(torch.tensor(values, dtype=torch.int32)).tolist()] == [reference(v % 2**32) for v in values]
    assert [to_int32(v) for v in (2**31, -1, 2**32 + 5, -(2**31) - 1)] == [-(2**31), -1, 5, 2**31 - 1]


# Triton, in its interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_its_twin(shape, p, dtype):
    x, A, grad, spans, row_keys = inputs(*shape, dtype=dtype)
    start = torch.randn(x.shape).to(dtype)
    both = (ours(module, x, A, grad, spans, p, row_keys, start) for module in (low_rank, low_rank_triton))
    for twin, kernel in zip(*both, strict=True):
        # In bfloat16 both round a float32 value, but the interpreter towards zero, and once for every four spans.
        bound = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 9e-3, "atol": 9e-3 * float(twin.abs().max())}
        torch.testing.assert_close(kernel, twin, **bound)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.6])
def test_triton_has_the_same_masks(p):
    x, row_keys = torch.rand(90, 64) + 1, keys(90)
    spans = [Span(0, 64, 1), Span(64, 128, -5)]
    shown = low_rank_triton.thin(x, torch.eye(64).repeat(2, 1), spans, p, row_keys)
    for a, b, salt in spans:
        assert torch.equal(shown[:, a:b] == 0, drop(x, p, row_keys, salt) == 0)


def test_dispatch(monkeypatch):
    """LETHE_KERNELS=triton reaches the kernels; without dropout there is none to reach."""
    x, A, grad, spans, row_keys = inputs(*SHAPES[1])
    twin = ours(low_rank, x, A, grad, spans, 0.1, row_keys)
    monkeypatch.setenv("LETHE_KERNELS", "triton")
    calls = []
    for name in ("thin", "thin_grad_A", "thin_grad_x_"):
        real = getattr(low_rank_triton, name)
        monkeypatch.setattr(low_rank_triton, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    for one, other in zip(twin, ours(low_rank, x, A, grad, spans, 0.1, row_keys), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
    ours(low_rank, x, A, grad, spans, 0.0, None)
    assert sorted(calls) == ["thin", "thin_grad_A", "thin_grad_x_"]
    with pytest.raises(ValueError, match="last dimension of grad_x"):
        thin_grad_x_(x.T.contiguous().T, grad, A, spans, 0.1, row_keys)
    assert torch.equal(thin_grad_A(grad, x, spans, 0.0, None), grad.T @ x)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.low_rank_triton import thin_grad_A_kernel, thin_grad_x_kernel, thin_kernel
for architecture in (80, 90):
    for dtype, dot in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        for kernel in (thin_kernel, thin_grad_A_kernel, thin_grad_x_kernel):
            fixed = {"DOT": dot, "COUNT": 3, "RANK": 16, "ROWS": 64, "COLUMNS": 64}
            kinds = {}
            for name in kernel.arg_names:
                pointer = {"keys_ptr": "*i32", "partial_ptr": "*fp32"}.get(name, "*" + dtype)
                kinds[name] = "constexpr" if name in fixed else pointer if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"
            source = ASTSource(fn=kernel, signature=kinds, constexprs={k: v for k, v in fixed.items() if k in kernel.arg_names})
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4, "num_stages": 3})
            print(architecture, dtype, kernel.__name__, len(compiled.asm["cubin"]), "mma" in compiled.asm["ptx"], compiled.metadata.shared)
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """Offline, for A100 and H100/H200, with the compiler that Triton brings; 16-bit products go to the matrix units."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 18 and all(int(size) > 1000 and int(shared) <= 96 << 10 for *_, size, _, shared in lines), run.stdout
    assert all((mma == "True") == (dtype != "fp32") for _, dtype, _, _, mma, _ in lines), run.stdout
