"""What the benchmarks of single kernels share: a row of the table, and the command that fills and prints it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import finish, machine_lines, seconds_of
from kernels import dispatch


@dataclass
class Row:
    """One kernel at one size. ours and eager may work in place when timed; shown gives ours on fresh inputs."""

    kernel: str
    size: str
    nbytes: int  # that must be read and written
    ours: Callable[[], object]
    eager: Callable[[], object]
    exact: Callable[[], object]  # the result in float64
    shown: Callable[[], object] | None = None
    comparable: bool = True  # whether eager's result is the same thing


def first(result: object) -> Tensor:
    """The tensor that is compared, of whatever a call returns: several side by side are joined."""
    if isinstance(result, list):
        return torch.cat(result, dim=1)
    return result[0] if isinstance(result, tuple) else result


def error(result: object, exact: Tensor) -> float:
    return float((first(result).double() - exact).abs().max() / exact.abs().max())


@contextmanager
def twins():
    """Within it CUDA tensors take the PyTorch form, which is what the kernel is measured against."""
    from kernels import decode_attention, layers, low_rank

    modules = (decode_attention, layers, low_rank)
    for module in modules:
        module.use_triton = lambda tensor: False
    try:
        yield
    finally:
        for module in modules:
            module.use_triton = dispatch.use_triton


def measure(row: Row, device: str, repeats: int) -> dict:
    exact = first(row.exact())
    found = {"kernel": row.kernel, "size": row.size, "nbytes": row.nbytes}
    found["error"] = error((row.shown or row.ours)(), exact)
    found["eager_error"] = error(row.eager(), exact) if row.comparable else None
    del exact
    found["ours_ms"] = 1e3 * seconds_of(row.ours, device, repeats, warmup=3)
    found["eager_ms"] = 1e3 * seconds_of(row.eager, device, repeats, warmup=3)
    found["twin_ms"] = None
    if device == "cuda":
        with twins():
            found["twin_ms"] = 1e3 * seconds_of(row.ours, device, repeats, warmup=3)
    found["gb_per_s"] = row.nbytes / found["ours_ms"] / 1e6
    return found


def main(about: str, name: str, sizes: dict[str, list], rows: Callable[..., list[Row]]) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--repeats", type=int, help="of each call")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no CUDA device", file=sys.stderr)
        return 2
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    repeats = arguments.repeats or (3 if arguments.toy else 30 if device == "cuda" else 9)
    torch.manual_seed(0)
    print(f"{machine_lines(device)}\ndtype      {dtype}, median of {repeats} calls{'; toy sizes' if arguments.toy else ''}\n")
    head = f"{'kernel':16} {'size':34} {'ours ms':>9} {'GB/s':>7} {'eager ms':>9} {'ratio':>6}"
    print(head + (f" {'twin ms':>9}" if device == "cuda" else "") + f" {'error':>9} {'eager':>9}")
    results = []
    for size in sizes["toy" if arguments.toy else device]:
        for row in rows(size, getattr(torch, dtype), device):
            found = measure(row, device, repeats)
            results.append(found)
            line = f"{found['kernel']:16} {found['size']:34} {found['ours_ms']:9.3f} {found['gb_per_s']:7.1f} {found['eager_ms']:9.3f}"
            line += f" {found['eager_ms'] / found['ours_ms']:5.1f}x" + (f" {found['twin_ms']:9.3f}" if device == "cuda" else "")
            other = "-" if found["eager_error"] is None else f"{found['eager_error']:.1e}"
            print(f"{line} {found['error']:9.1e} {other:>9}", flush=True)
    kernels = "triton" if device == "cuda" or os.environ.get("LETHE_KERNELS") == "triton" else "torch"
    finish({"benchmark": name, "device": device, "dtype": dtype, "kernels": kernels, "toy": arguments.toy, "rows": results}, arguments.out)
    return 0
