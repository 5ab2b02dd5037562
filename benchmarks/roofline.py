"""What a model needs to be trained, in memory and time, by arithmetic: for planning, where nothing was measured yet.

With N weights in the linears, P in all, V vocabulary, H hidden, T tokens in a pass of one GPU, weights of 2 bytes:

    FLOPs a token    LoRA: 4 N - 2 N_qkv of one layer + 6 N_lora + 4 V H f;  full: 6 N + 6 V H f;  and attention
                     3.5 * 2 S heads D layers. f: share of tokens that carry loss, S: mean length of an example
    seconds a pass   max(FLOPs / (rate * share), 2 * 2 P / bandwidth, bytes sent / link), weights being read forward and back,
                     + full: 30 P / GPUs / bandwidth for the step (AdamW: 4 floats read, 3 written, weights rounded)
                     + NF4: 2 * 2.516 N / bandwidth to write bf16 weights, forward and back
    memory           LoRA: 2 P + 18 N_lora (factors, their copies in bf16, gradients, two moments);  NF4: 0.516 N + 2 (P - N)
                     + 18 N_lora + the largest linear in bf16;  full: 18 P (bf16; float32 masters, gradients, two moments)
                     + a pass: T layers (4 H + 4 q + 4 kv + 4 I), the inputs that backward needs (q, kv: widths; I: inner), or
                     with gradient checkpointing, for another 2 N FLOPs, 2 T layers H and one layer's; + 0.5 GiB of logits
    over G GPUs      LoRA in parallel on data: the same memory, sends its gradients, 2 * 4 N_lora (G - 1) / G bytes
                     full by FSDP2: 18 P / G, and whole for a while two layers and the embeddings; sends 3 * 2 P (G - 1) / G: weights
                     forward, weights back, gradients

NF4 (arXiv:2305.14314): 4 bits and a scale in 8 bits for each 64 weights, whose own scale is a float32 for each 256 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import ROPE_1B, SHAPES, Shape

MODELS = {  # shape, whether embedding and head are one
    "1B": (SHAPES["1b"], True),
    "3B": (Shape(3072, 8192, 28, 24, 8, 128, 128256, ROPE_1B), True),
    "8B": (Shape(4096, 14336, 32, 32, 8, 128, 128256, ROPE_1B), False),
    "70B": (Shape(8192, 28672, 80, 64, 8, 128, 128256, ROPE_1B), False),
}
METHODS = ("LoRA", "LoRA NF4", "full")
NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes a weight
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    flops: float  # a second, of 16-bit matmuls
    share: float  # of it that a step reaches
    bandwidth: float  # bytes/s of memory
    memory: float  # bytes a GPU
    link: float  # bytes/s that a GPU sends to the others of its machine
    network: float  # and to those of other machines
    gpus: int = 8  # in a machine


@dataclass(frozen=True)
class Work:
    tokens: int  # in a pass of one GPU
    length: float  # mean, of an example
    loss_share: float
    rank: int


def weights_of(shape: Shape, tied: bool) -> tuple[int, int]:
    """(weights of all linears, of the whole model)"""
    linears = shape.layers * sum(out * inn for out, inn in shape.linears.values())
    return linears, linears + shape.vocabulary * shape.hidden * (1 if tied else 2) + shape.hidden * (2 * shape.layers + 1)


def needs(shape: Shape, tied: bool, method: str, gpus: int, checkpointing: bool, work: Work, machine: Machine) -> dict[str, float]:
    """memory (bytes of a GPU; its state and activations too) and tokens_per_s (of all GPUs); see the head of this file."""
    N, P = weights_of(shape, tied)
    T, sizes, full = work.tokens, shape.linears, method == "full"
    qkv = sum(out * inn for name, (out, inn) in sizes.items() if name in ("q_proj", "k_proj", "v_proj"))
    lora = shape.layers * work.rank * sum(out + inn for out, inn in sizes.values())
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    per_layer = T * (4 * shape.hidden + 4 * query + 4 * key + 4 * shape.inner)
    activations = 2 * T * shape.layers * shape.hidden + per_layer if checkpointing else shape.layers * per_layer
    if full:
        state = 18 * P / gpus + (2 * (2 * N / shape.layers + P - N) if gpus > 1 else 0)
    elif method == "LoRA NF4":
        state = NF4 * N + 2 * (P - N) + 18 * lora + 2 * max(out * inn for out, inn in sizes.values())
    else:
        state = 2 * P + 18 * lora

    head = shape.vocabulary * shape.hidden * work.loss_share
    flops = 6 * N + 6 * head if full else 4 * N - 2 * qkv + 6 * lora + 4 * head
    flops += 3.5 * 2 * work.length * query * shape.layers + (2 * N if checkpointing else 0)
    sent = (3 * 2 * P if full else 2 * 4 * lora) * (gpus - 1) / gpus
    link = machine.link if gpus <= machine.gpus else machine.network
    seconds = max(T * flops / (machine.flops * machine.share), 2 * 2 * P / machine.bandwidth, sent / link)
    seconds += {"full": 30 * P / gpus, "LoRA NF4": 2 * (NF4 + 2) * N}.get(method, 0) / machine.bandwidth
    return {"memory": state + activations + GIB / 2, "state": state, "activations": activations, "tokens_per_s": gpus * T / seconds}


def plan_table(counts: list[int], work: Work, machine: Machine) -> tuple[list[list[str]], list[dict]]:
    """Rows of text and of numbers: each model and method on each number of GPUs, gradient checkpointing where it fits with that alone."""
    rows, found = [], []
    for model, (shape, tied) in MODELS.items():
        for method in METHODS:
            row = [model, method]
            for gpus in counts:
                plain, small = (needs(shape, tied, method, gpus, checkpointing, work, machine) for checkpointing in (False, True))
                chosen = plain if plain["memory"] <= machine.memory else small
                fits, star = chosen["memory"] <= machine.memory, "*" if chosen is small else ""
                found.append({"model": model, "method": method, "gpus": gpus, "fits": fits, "checkpointing": bool(star), **chosen})
                size = f"{chosen['memory'] / GIB:.0f}{star} GiB"
                row.append(f"{size}, {chosen['tokens_per_s'] / 1e3:.1f} k/s" if fits else f"needs {size}")
            rows.append(row)
    return rows, found
