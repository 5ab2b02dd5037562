"""Data parallel training: two ranks, as processes of their own over gloo, against one process that holds everything.

Run as a script, this file is one of the ranks; it does everything in one go, since a start costs seconds.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import random_examples, tiny_model, train_some

from data.batching import collate
from lora.layers import add_lora, dropout_keys, lora_parameters
from masking.score import micro_nll
from model.attention import Pack
from optim import parallel
from optim.parallel import RankLost, Ranks, device_of, environment, start

EXAMPLES = random_examples(11)
INDICES = list(range(11))


def masks() -> dict[str, np.ndarray]:
    """Loss weights: of all kinds; and such that rank 1 of 2 has nothing to train on."""
    offsets = EXAMPLES.completion_offsets
    ragged = np.random.default_rng(0).choice([0.0, 0.5, 1.0], int(offsets[-1])).astype(np.float32)
    one_sided = ragged.copy()
    for i in Ranks(1, 2).share(INDICES, EXAMPLES.lengths):
        one_sided[offsets[i] : offsets[i + 1]] = 0
    return {"ragged": ragged, "one_sided": one_sided}


def subject(folder: Path):
    model = tiny_model(folder)
    add_lora(model, 4, 8.0, dropout=0.1, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model.train()


def step(model, ranks: Ranks, weights: np.ndarray, indices: list[int], number: int = 0) -> list[float]:
    """One step's gradients, divided by the weights of all ranks. Returns loss, weights, kept tokens and tokens of all of them."""
    mine = ranks.share(indices, EXAMPLES.lengths)
    loss = torch.zeros((), dtype=torch.float64)
    weight_sum, kept, tokens = 0.0, 0, 0
    for micro in collate(EXAMPLES, mine, 60, weights) if mine else []:
        tokens += micro.tokens
        if len(micro.rows):
            sight = Pack(micro.lengths, model.config)
            nll = micro_nll(model, micro, sight, dropout_keys(0, number, micro.examples, sight.positions))
            (nll * micro.weights).sum().backward()
            loss += (nll.detach() * micro.weights).sum(dtype=torch.float64)
            weight_sum, kept = weight_sum + micro.weight_sum, kept + len(micro.weights)
    ranks.sum_(lora_parameters(model), loss)
    weight_sum, kept, tokens = ranks.totals(weight_sum, kept, tokens)
    for parameter in lora_parameters(model):
        parameter.grad.div_(weight_sum)
    return [float(loss) / weight_sum, weight_sum, kept, tokens]


def taken(model) -> dict[str, torch.Tensor]:
    """The gradients, which are removed."""
    found = {name: p.grad.clone() for name, p in model.adapter.stacks.items()}
    model.zero_grad(set_to_none=True)
    return found


def train(model, ranks: Ranks) -> list[list[float]]:
    """Four clipped steps of AdamW; the last sees a single example."""
    optimizer, readings = torch.optim.AdamW(lora_parameters(model), lr=1e-2), []
    for number in range(4):
        readings.append(step(model, ranks, masks()["ragged"], INDICES[number : 8 + number] if number < 3 else [5], number))
        torch.nn.utils.clip_grad_norm_(lora_parameters(model), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return readings


def rank_main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = start("cpu")
    model = subject(folder / "model" / str(ranks.rank))
    told, tensors = {"world": ranks.world, "main": ranks.main}, {}
    for name, weights in masks().items():
        told[name] = step(model, ranks, weights, INDICES)
        tensors |= {f"{name}/{stack}": gradient for stack, gradient in taken(model).items()}
    parallel.BUCKET = 1000  # several sums instead of one, and stacks that are larger than that
    step(model, ranks, masks()["ragged"], INDICES)
    tensors |= {f"in_buckets/{stack}": gradient for stack, gradient in taken(model).items()}
    parallel.BUCKET = 64 << 20

    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    if ranks.main:
        one.grad = torch.tensor([1.0, float("inf"), 2.0])
    sums = torch.tensor([2.0**53, 1.0], dtype=torch.float64) if ranks.main else torch.tensor([-(2.0**53) + 1, 1e-15], dtype=torch.float64)
    ranks.sum_([one, two], sums)
    tensors |= {"infinite": one.grad, "missing": two.grad, "sums": sums}

    told["totals"] = ranks.totals(2**51 + ranks.rank, 0.5)
    told["most"] = [ranks.most(ranks.rank), ranks.most(-ranks.rank)]
    with ranks.main_first():
        if ranks.main:
            (folder / "made").write_text("by the main rank")
        told["found"] = (folder / "made").read_text()
    told["training"] = train(model, ranks)
    tensors |= {f"trained/{name}": p.detach() for name, p in model.adapter.stacks.items()}
    save_file(tensors, folder / f"{ranks.rank}.safetensors")
    ranks.barrier()
    if not ranks.main:
        os._exit(7)
    try:
        for _ in range(3):
            ranks.totals(1)
    except RankLost as error:
        told["lost"] = str(error)
    print(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # the group cannot be left any more


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(what each rank told, the tensors of each)"""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(__file__, str(folder))
    assert [rank.returncode for rank in done] == [0, 7], done[0].stderr + done[1].stderr
    return json.loads(done[0].stdout), [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Of all tensors as one vector, relative to the second."""
    assert set(one) == set(two)
    flat = [torch.cat([tensors[name].flatten().double() for name in sorted(tensors)]) for tensors in (one, two)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def part(tensors, name):
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", ["ragged", "one_sided"])
def test_gradients_are_those_of_one_process(two, tmp_path, name):
    told, tensors = two
    model = subject(tmp_path)
    expected = step(model, Ranks(), masks()[name], INDICES)
    gradients = taken(model)
    for rank in range(2):
        assert distance(part(tensors[rank], name), gradients) < 1e-6
    assert told[name] == pytest.approx(expected, rel=1e-6) and told[name][1:] == expected[1:]
    mine = Ranks(1, 2).share(INDICES, EXAMPLES.lengths)
    assert 0 < len(mine) < 11 and (name == "ragged") == any(len(m.rows) for m in collate(EXAMPLES, mine, 60, masks()[name]))


def test_both_ranks_get_the_same_bits(two):
    _, (first, second) = two
    assert set(first) == set(second) and len(part(first, "trained")) > 3
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_buckets_change_nothing(two):
    """Not even the order of a sum of two."""
    tensors = two[1][0]
    whole, bucketed = part(tensors, "ragged"), part(tensors, "in_buckets")
    assert max(t.numel() for t in whole.values()) > 1000 and all(torch.equal(whole[name], bucketed[name]) for name in whole)


def test_training_equals_one_process(two, tmp_path):
    told, tensors = two
    model = subject(tmp_path)
    for theirs, ours in zip(told["training"], train(model, Ranks()), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    # AdamW divides by the root of a square: where a gradient is next to nothing its rounding shows.
    assert distance(part(tensors[0], "trained"), {name: p.detach() for name, p in model.adapter.stacks.items()}) < 1e-4


def test_sums(two):
    told, tensors = two
    for own in tensors:
        assert own["infinite"].tolist() == [1.0, float("inf"), 2.0] and own["missing"].tolist() == [0.0] * 3
        assert own["sums"].tolist() == [1.0, 1.0 + 1e-15]  # float32 would give 0
    assert told["totals"] == [2**52 + 1, 1.0] and told["most"] == [1, 0]
    assert told["found"] == "by the main rank" and told["world"] == 2 and told["main"]


def test_a_lost_rank_is_told(two):
    assert "rank 0 of 2: another rank has ended or cannot be reached" in two[0]["lost"]
    assert "its own output says why" in two[0]["lost"]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_example_is_someones(world):
    for indices in ([4], [], [3, 1, 2], INDICES):
        parts = [Ranks(rank, world).share(indices, EXAMPLES.lengths) for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(indices)
        assert parts == [Ranks(rank, world).share(indices[:], EXAMPLES.lengths) for rank in range(world)]
    tokens = [sum(EXAMPLES.lengths[i] for i in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(EXAMPLES.lengths)


def test_a_process_alone():
    alone, parameter = Ranks(), torch.nn.Parameter(torch.zeros(2))
    alone.sum_([parameter], torch.ones(1))
    assert parameter.grad is None and alone.main and alone.totals(1, 2.5) == [1, 2.5] and alone.most(3) == 3
    with alone.main_first():
        pass
    assert alone.share([3, 1], [0, 0, 0, 0]) == [3, 1]
    alone.stop()


def test_start_alone_joins_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert start("cpu") == Ranks(device=torch.device("cpu")) and not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    assert start("cpu") == Ranks(device=torch.device("cpu")) and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT not set"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, values, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        environment()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto", 2, 1) == device_of("cpu", 2, 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device; use --device cpu"):
        device_of("cuda", 1, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto", 2, 1) == torch.device("cuda:1") and device_of("cuda:1", 1, 0) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="2 ranks on one GPU"):
        device_of("cuda:0", 2, 1)
    with pytest.raises(ValueError, match="there are 2; lower --nproc-per-node"):
        device_of("cuda", 4, 2)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
