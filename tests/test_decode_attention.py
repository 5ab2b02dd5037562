"""Decode attention: against a softmax in float64, the Triton kernels against their PyTorch twin."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import decode_attention_triton
from kernels.decode_attention import append_token, decode_attention, length_mask

REPO = Path(__file__).parent.parent


def inputs(B=5, heads=8, kv=2, S=150, D=32, dtype=torch.float32, seed=0):
    """Query, keys, values and lengths; what lies behind a sequence's length is NaN."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(B, heads, D, generator=g) * 2
    keys, values = torch.randn(2, B, kv, S, D, generator=g)
    lengths = torch.randint(1, S + 1, (B,), generator=g)
    lengths[0], lengths[-1] = 1, S
    return query.to(dtype), keys.to(dtype), values.to(dtype), lengths


def brute_force(query, keys, values, lengths):
    """Each sequence and head by itself, in float64."""
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for b, length in enumerate(lengths.tolist()):
        for h in range(query.shape[1]):
            key, value = keys[b, h // group, :length].double(), values[b, h // group, :length].double()
            out[b, h] = torch.softmax(key @ query[b, h].double() / math.sqrt(query.shape[2]), 0) @ value
    return out


@pytest.fixture(params=["", "triton"], ids=["torch", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LETHE_KERNELS", request.param)
    return request.param


SHAPES = [
    {},
    {"heads": 4, "kv": 4},
    {"heads": 3, "kv": 1, "D": 16},
    {"B": 1, "S": 1},
    {"D": 24},
    {"D": 8, "S": 64},
    {"S": 65, "heads": 20, "kv": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend, shape):
    arrays = inputs(**shape)
    torch.testing.assert_close(decode_attention(*arrays).double(), brute_force(*arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(backend, dtype):
    query, keys, values, lengths = inputs(dtype=dtype)
    exact = brute_force(query, keys, values, lengths)
    error = (decode_attention(query, keys, values, lengths).double() - exact).abs()
    keys, values = (x.repeat_interleave(4, 1) for x in (keys, values))
    z = (query[:, :, None] @ keys.mT) / math.sqrt(query.shape[2])
    z = z + length_mask(lengths, keys.shape[2], z.dtype)
    eager = ((torch.softmax(z.float(), -1).to(dtype) @ values)[:, :, 0].double() - exact).abs()
    assert error.max() <= 2 * eager.max() and error.mean() <= eager.mean()


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_any_cut_of_the_slots_gives_the_same(parts):
    arrays = inputs(S=300, seed=parts)
    got = decode_attention_triton.attend(*arrays, parts=parts)
    torch.testing.assert_close(got.double(), brute_force(*arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_what_lies_behind_the_length_is_not_read(parts):
    query, keys, values, lengths = inputs(S=256)
    expected = brute_force(query, keys, values, lengths)
    behind = (length_mask(lengths, 256) < 0).transpose(2, 3)  # (B, 1, S, 1)
    keys, values = keys.masked_fill(behind, math.nan), values.masked_fill(behind, math.nan)
    got = decode_attention_triton.attend(query, keys, values, lengths, parts=parts)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_slices_of_larger_blocks(backend):
    """Queries lie in the fused projection, keys in the first rows and slots of a cache."""
    query, keys, values, lengths = inputs()
    fused = torch.randn(len(query), 12, 32)
    fused[:, :8] = query
    cache = torch.full((2, 9, 2, 200, 32), math.nan)
    cache[0, :5, :, :150], cache[1, :5, :, :150] = keys, values
    got = decode_attention(fused[:, :8], *cache[:, :5, :, :150], lengths.to(torch.int32))
    torch.testing.assert_close(got.double(), brute_force(query, keys, values, lengths), rtol=1e-5, atol=1e-5)


def test_append_writes_one_slot(backend):
    """New keys and values are a slice of the fused projection."""
    _, keys, values, lengths = inputs()
    cache, fused = torch.cat((keys, values), dim=1), torch.randn(5, 12, 32)
    expected = cache.clone()
    for b, length in enumerate(lengths.tolist()):
        expected[b, :, length - 1] = fused[b, 8:]
    append_token(fused[:, 8:], cache, lengths)
    assert torch.equal(cache, expected)


def test_what_does_not_fit_is_refused():
    query, keys, values, lengths = inputs()
    for change in (
        (query[0], keys, values, lengths),
        (query[:, :3], keys, values, lengths),
        (query[..., :9], keys, values, lengths),
        (query, keys[:2], values[:2], lengths),
        (query, keys, values[:, :, :9], lengths),
        (query, keys, values, lengths[:2]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            decode_attention(*change)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(query.bfloat16(), keys, values, lengths)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.decode_attention_triton import append_kernel, join_kernel, part_kernel

strides = {f"{of}_{what}": "i64" for of in ("query", "keys", "values", "new", "cache") for what in ("row", "head", "slot")}
sizes = {name: "i32" for name in ("slots", "part_slots", "parts")}


def build(architecture, kernel, kinds, constants, what, tensor_cores):
    kinds = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    print(architecture, what, len(compiled.asm["cubin"]), not tensor_cores or "mma" in compiled.asm["ptx"])


for architecture in (80, 90):
    for dtype in ("*bf16", "*fp32"):
        cache = {name + "_ptr": dtype for name in ("query", "keys", "values", "new", "cache", "out")}
        for out in (dtype, "*fp32"):
            kinds = {**cache, **strides, **sizes, "lengths_ptr": "*i64", "log_total_ptr": "*fp32", "scale_log2": "fp32", "out_ptr": out}
            shape = {"KV": 8, "GROUP": 4, "D": 64, "ROWS": 16, "COLUMNS": 64, "BLOCK": 64, "WIDEN": False}
            build(architecture, part_kernel, kinds, shape, "part" + dtype, dtype == "*bf16")
        kinds = {**cache, **sizes, "parts_ptr": "*fp32", "log_total_ptr": "*fp32", "lengths_ptr": "*i64"}
        build(architecture, join_kernel, kinds, {"HEADS": 32, "D": 64, "PARTS": 4, "COLUMNS": 64}, "join" + dtype, False)
        kinds = {**cache, **strides, "lengths_ptr": "*i64"}
        build(architecture, append_kernel, kinds, {"N": 16, "D": 64, "COLUMNS": 64}, "append" + dtype, False)
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """Offline, for A100 and H100/H200, with the compiler that Triton brings."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 16 and all(int(line.split()[2]) > 1000 and line.endswith("True") for line in lines), run.stdout
