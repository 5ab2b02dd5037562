"""What the benchmarks share: shapes, models and examples made from a seed, clocks, memory, matmul rates, and the last line.

Every benchmark prints tables for people and ends with one line of JSON for machines (finish). Medians stand with their smallest
and largest value. tokens means useful tokens: prompts included, padding not.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # the benchmarks run as scripts, from anywhere

from benchmarks.make_random_llama import make  # noqa: E402
from data.batching import Examples, tokenize  # noqa: E402
from data.folder import find_task  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402
from study.folder import write_json  # noqa: E402
from study.identity import circumstances  # noqa: E402

LENGTHS = Path(__file__).with_name("gsm8k_lengths.json")
ROPE_1B = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}

# ----------------------------------------------------------------------------------------------------------------------
# Shapes and models


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings, no biases."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope: dict | None = None

    def raw(self) -> dict:
        """config.json in the spelling of the released Llama 3 files."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "rope_scaling": self.rope, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's seven linears."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden), "k_proj": (key, self.hidden), "v_proj": (key, self.hidden), "o_proj": (self.hidden, query),
            "gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden), "down_proj": (self.hidden, self.inner),
        }  # fmt: skip


SHAPES = {
    "cpu": Shape(256, 1024, 4, 8, 2, 32, 128256),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, ROPE_1B),
    "toy": Shape(64, 128, 2, 4, 2, 16, 1024),
}


def write_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder of this shape with seeded random weights, which bfloat16 holds exactly."""
    write_json(folder / "source" / "config.json", shape.raw())
    make(folder / "source", folder / "model", seed)
    return folder / "model"


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def random_examples(count: int, vocabulary: int, seed: int = 0, shrink: int = 1) -> Examples:
    """Examples of random tokens with the lengths of GSM8K's rows (gsm8k_lengths.json), drawn without replacement as far as they go.

    shrink: lengths are divided by it, for toys.
    """
    table = np.array(json.loads(LENGTHS.read_text())["lengths"])  # (bins, 3): prompt tokens, answer tokens, rows
    rows = np.repeat(table[:, :2], table[:, 2], axis=0)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(len(rows)) for _ in range(-(-count // len(rows)))])[:count]
    lengths = np.maximum(rows[order] // shrink, 1).tolist()
    return Examples.from_pairs([tuple(generator.integers(0, vocabulary, n).tolist() for n in pair) for pair in lengths])


def real_examples(data: str, tokenizer: str, max_length: int, cache: Path) -> Examples:
    """GSM8K's training rows as python -m data.prepare makes them. data: the folder gsm8k/ or its parent; tokenizer: a model folder."""
    root = Path(data).parent if Path(data).name == "gsm8k" else Path(data)
    task = find_task("gsm8k", root)
    return tokenize(task.train(), load_tokenizer(tokenizer), max_length, task.fingerprint, cache)


# ----------------------------------------------------------------------------------------------------------------------
# Clocks and memory


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: str, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Memory:
    """Peak memory above what is held when it is made: allocated CUDA memory, else this process's resident set."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
            self.before = _resident("VmRSS")

    def extra_gib(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        return (peak - self.before) / 2**30

    def extra_mib(self) -> float:
        return self.extra_gib() * 1024


def _resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rates(shape: Shape, dtype: torch.dtype, device: str, rows: int) -> dict[str, float]:
    """FLOP/s of this machine, each GEMM with its output preallocated; both directions of a frozen linear count.

    head: (n, H) x (H, V) and (n, V) x (V, H), best n; body: a layer's frozen linears (q, k, v and gate, up as one each) at
    `rows` rows.
    """
    H, V = shape.hidden, shape.vocabulary

    def pair(n: int, out: int, inn: int, repeats: int) -> float:
        """Seconds of x W^T and g W."""
        x, W = torch.randn(n, inn, dtype=dtype, device=device), torch.randn(out, inn, dtype=dtype, device=device)
        y, g = torch.randn(n, out, dtype=dtype, device=device), torch.empty(n, inn, dtype=dtype, device=device)
        forward = seconds_of(lambda: torch.mm(x, W.T, out=y), device, repeats)
        return forward + seconds_of(lambda: torch.mm(y, W, out=g), device, repeats)

    repeats = 10 if device == "cuda" else 3
    sizes = (2048, 4096, 8192) if device == "cuda" else (128, 256, 512)
    head = max(4 * n * H * V / pair(n, V, H, repeats) for n in sizes)
    found = shape.linears
    q, k, v, o, gate, up, down = found.values()
    fused = ((q[0] + k[0] + v[0], q[1]), o, (gate[0] + up[0], gate[1]), down)
    body = sum(4 * rows * out * inn for out, inn in fused) / sum(pair(rows, out, inn, repeats) for out, inn in fused)
    return {"head": head, "body": body}


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: list[float], form: str = ".0f") -> str:
    """ "1234 (1200 to 1250)" """
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def machine_lines(device: str) -> str:
    about = circumstances()
    hardware, commit = about["hardware"], about["commit"] or {"hash": "unknown", "dirty": False}
    where = hardware["gpus"][0] if device == "cuda" else hardware["cpu"]
    versions = " ".join(f"{name} {version}" for name, version in about["versions"].items() if name in ("python", "torch", "triton"))
    return (
        f"machine    {where}, {hardware['cores']} cores, {hardware['threads']} threads, {hardware['memory_gib']} GiB; {versions}\n"
        f"commit     {commit['hash'][:7]}{' with changes' if commit['dirty'] else ''}"
    )


def finish(result: dict, out: str | None = None) -> None:
    """Prints the result as the last line, one JSON object, with command, commit, hardware and date; writes it to out too."""
    result = {**result, **circumstances()}
    if out:
        write_json(out, result)
    print(json.dumps(result, ensure_ascii=False), flush=True)
