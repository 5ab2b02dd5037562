"""Models spread over ranks by FSDP2: two gloo ranks against one process, in losses, weights and checkpoints.

Run as a script, this file is one of the ranks.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import random_examples, raw_config, write_folder

from data.batching import collate
from lora.resume import Learner
from masking.score import micro_nll
from model import load_model
from model.checkpoint import write_tensors
from model.sharding import check_optimizers, gathered, idle_pass, is_sharded, load_sharded, place, read_shards, rows_of, shard, write_shard
from model.snapshot import TENSORS
from optim.masters import collect_gradients, write_back
from optim.parallel import Ranks, start
from study.errors import LetheError

EXAMPLES = random_examples(11)
WEIGHTS = np.random.default_rng(0).choice([0.0, 0.5, 1.0], int(EXAMPLES.completion_offsets[-1])).astype(np.float32)
WHO = [list(range(11)), [1, 2, 3], [7], list(range(4, 11))]  # the examples of each step; 7 alone leaves a rank without any
KINDS = {
    "tied": {},  # 97 rows of vocabulary do not halve
    "untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "hidden_size": 40, "intermediate_size": 51},
}


def learner_of(model) -> Learner:
    return Learner(model, list(model.parameters()), lambda masters: [torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.01)])


def whole(folder: Path, dtype=torch.float32):
    return load_model(folder, dtype).requires_grad_(True)


def train(model, learner: Learner, ranks: Ranks, steps: range) -> list[list[float]]:
    """Clipped steps of full fine-tuning; (loss, gradient norm) of each."""
    model.train()
    sharded, readings = is_sharded(model), []
    for number in steps:
        mine = ranks.share(WHO[number], EXAMPLES.lengths)
        micros = [m for m in (collate(EXAMPLES, mine, 40, WEIGHTS) if mine else []) if len(m.rows)]
        loss, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
        idle = int(ranks.most(len(micros))) - len(micros)  # asked before the first pass: in a pass the ranks wait for each other
        for micro in micros:
            nll = micro_nll(model, micro)
            (nll * micro.weights).sum().backward()
            loss += (nll.detach() * micro.weights).sum(dtype=torch.float64)
            weight_sum += micro.weight_sum
        for _ in range(idle):
            idle_pass(model)
        (weight_sum,) = ranks.totals(weight_sum)
        collect_gradients(learner.parameters, learner.masters)
        ranks.sum_([] if sharded else learner.masters, loss)
        for master in learner.masters:
            master.grad.div_(weight_sum)
        norm = ranks.clip_(learner.masters, 0.5) if sharded else torch.nn.utils.clip_grad_norm_(learner.masters, 0.5)
        for optimizer in learner.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        write_back(learner.parameters, learner.masters)
        readings.append([float(loss) / weight_sum, float(norm)])
    return readings


def scores(model) -> list[float]:
    """Losses of the first examples, as masks ask for them."""
    model.eval()
    with torch.inference_mode():
        return micro_nll(model, collate(EXAMPLES, [0, 1], 100, None)[0]).tolist()


def rank_main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = start("cpu")
    told, tensors = {}, {}

    def keep(name, model):
        full = gathered(model, ranks)
        assert (full is None) == (ranks.rank > 0)
        if full is not None:
            tensors.update({f"{name}/{key}": value for key, value in full.state_dict().items()})

    for kind in KINDS:
        model = load_sharded(folder / kind, ranks, torch.float32)
        told[f"rows {kind}"] = [len(p.to_local()) for p in (model.model.embed_tokens.weight, model.model.layers[0].mlp.down_proj.weight)]
        told["fingerprint"] = model.fingerprint
        model.gradient_checkpointing = kind == "untied"
        learner = learner_of(model)
        told[f"scores {kind}"] = scores(model)
        told[f"losses {kind}"] = train(model, learner, ranks, range(2))
        if kind == "tied":
            write_shard(folder / "of_two", learner.state()[0], ranks)
            told["scores in between"] = scores(model)
        told[f"losses {kind}"] += train(model, learner, ranks, range(2, 4))
        keep(kind, model)

    state = json.loads((folder / "of_one" / "state.json").read_text())
    for source in ("of_two", "of_one"):
        model = load_sharded(folder / "tied", ranks, torch.float32)
        learner = learner_of(model)
        learner.restore(read_shards(folder / source, ranks), state)
        told[f"losses {source}"] = train(model, learner, ranks, range(2, 4))
        keep(source, model)

    model = load_sharded(folder / "tied", ranks, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    learner = learner_of(model)
    told["losses bfloat16"] = train(model, learner, ranks, range(4))
    for other, dtype in ((load_model(folder / "tied"), torch.float16), (whole(folder / "tied"), torch.float32)):
        try:
            if dtype == torch.float32:
                other.adapter = torch.nn.Identity()
            shard(other, ranks, dtype)
        except LetheError as error:
            told.setdefault("refused", []).append(str(error))
    if ranks.main:
        save_file(tensors, folder / "weights.safetensors")
        print(json.dumps(told))
    ranks.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: the folder, losses and weights of each kind, and a checkpoint of "tied" after two steps."""
    folder = tmp_path_factory.mktemp("sharding")
    losses, weights = {}, {}
    for kind, changes in KINDS.items():
        write_folder(folder / kind, raw_config(**changes))
        model = whole(folder / kind)
        learner = learner_of(model)
        losses[kind] = train(model, learner, Ranks(), range(2))
        if kind == "tied":
            tensors, state = learner.state()
            write_tensors(folder / "of_one" / TENSORS, tensors)
            (folder / "of_one" / "state.json").write_text(json.dumps(state))
        losses[kind] += train(model, learner, Ranks(), range(2, 4))
        weights[kind] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return folder, losses, weights


@pytest.fixture(scope="module")
def two(alone):
    """What two ranks told, and the whole weights that they ended with."""
    done = run_ranks(__file__, str(alone[0]))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    return json.loads(done[0].stdout), load_file(alone[0] / "weights.safetensors")


def close(theirs, ours) -> None:
    for one, other in zip(theirs, ours, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def distance(tensors, name, weights) -> float:
    """Relative, of all weights as one vector."""
    mine = {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
    assert set(mine) == set(weights)
    one, other = (torch.cat([group[key].flatten().double() for key in sorted(group)]) for group in (mine, weights))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_like_one_process(two, alone, kind):
    """Over ragged steps, one of which leaves a rank without an example; with biases, recomputed layers and a head of its own."""
    folder, losses, weights = alone
    close(two[0][f"losses {kind}"], losses[kind])
    assert distance(two[1], kind, weights[kind]) < 1e-5
    untrained = load_model(folder / kind).state_dict()
    assert distance(two[1], kind, untrained) > 1e-2
    assert two[0]["rows tied"] == [49, 32] and two[0]["fingerprint"] == load_model(folder / "untied").fingerprint


def test_bfloat16_with_float32_shards(two, alone):
    model = whole(alone[0] / "tied", torch.bfloat16)
    expected = train(model, learner_of(model), Ranks(), range(4))
    for one, other in zip(two[0]["losses bfloat16"], expected, strict=True):
        assert one == pytest.approx(other, rel=0.02)
    assert two[0]["losses bfloat16"][0][0] != pytest.approx(alone[1]["tied"][0][0], rel=1e-5)  # it is not float32 that was computed


def test_scoring_between_steps(two, alone):
    told = two[0]
    for kind in KINDS:
        assert told[f"scores {kind}"] == pytest.approx(scores(load_model(alone[0] / kind)), rel=1e-5)
    assert told["scores in between"] != pytest.approx(told["scores tied"], rel=1e-2)


def test_a_checkpoint_of_two_ranks_goes_on_with_the_same_bits(two):
    told, tensors = two
    assert told["losses of_two"] == told["losses tied"][2:]
    mine = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith("of_two/")}
    assert mine and all(torch.equal(tensor, tensors[f"tied/{name}"]) for name, tensor in mine.items())


def test_a_checkpoint_of_one_process_goes_on_with_two_ranks(two, alone):
    close(two[0]["losses of_one"], alone[1]["tied"][2:])
    assert distance(two[1], "of_one", alone[2]["tied"]) < 1e-5


def test_a_checkpoint_of_two_ranks_goes_on_with_one_process(two, alone):
    folder, losses, weights = alone
    model = whole(folder / "tied")
    learner = learner_of(model)
    learner.restore(read_shards(folder / "of_two", Ranks()), json.loads((folder / "of_one" / "state.json").read_text()))
    close(train(model, learner, Ranks(), range(2, 4)), losses["tied"][2:])
    assert distance({f"x/{name}": tensor for name, tensor in model.state_dict().items()}, "x", weights["tied"]) < 1e-5


def test_what_cannot_be_sharded(two):
    assert "give --dtype bfloat16" in two[0]["refused"][0] and "give --full" in two[0]["refused"][1]


def test_one_rank_and_muon_are_refused(alone):
    check_optimizers(["adamw"])
    with pytest.raises(LetheError, match="muon needs whole matrices"):
        check_optimizers(["adamw", "muon"])
    with pytest.raises(LetheError, match="torchrun --nproc-per-node N"):
        load_sharded(alone[0] / "tied", Ranks())


# Rows, without processes


@pytest.mark.parametrize("count", [0, 1, 5, 8, 97])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_those_of_chunk(count, world):
    rows = torch.arange(count)
    parts = [rows[rows_of(count, rank, world)] for rank in range(world)]
    assert torch.equal(torch.cat(parts), rows)
    for part, expected in zip(parts, rows.chunk(world) if count else [], strict=False):
        assert torch.equal(part, expected)


class Quiet(Ranks):
    """A rank whose others are not there: what it writes is what one of several would."""

    def barrier(self) -> None:
        pass


def states() -> dict[str, torch.Tensor]:
    return {"0.step.0": torch.tensor(3.0), "master.0": torch.randn(7, 3), "master.1": torch.randn(2), "rng.torch": torch.arange(5)}


def write_as(folder: Path, world: int, tensors: dict[str, torch.Tensor]) -> None:
    for rank in range(world):
        mine = {name: t[rows_of(len(t), rank, world)].clone() if t.dim() else t for name, t in tensors.items()}
        write_shard(folder, mine, Quiet(rank, world))


@pytest.mark.parametrize("wrote", [1, 2, 3, 5])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, wrote, reads):
    tensors = states()
    write_as(tmp_path, wrote, tensors)
    parts = [read_shards(tmp_path, Ranks(rank, reads)) for rank in range(reads)]
    for name in ("master.0", "master.1"):
        assert torch.equal(torch.cat([part[name] for part in parts]), tensors[name])
        assert [len(part[name]) for part in parts] == [len(tensors[name][rows_of(len(tensors[name]), r, reads)]) for r in range(reads)]
    assert all(torch.equal(part["0.step.0"], torch.tensor(3.0)) and "rng.torch" not in part for part in parts)


def test_a_missing_or_cut_file_is_an_error(tmp_path):
    write_as(tmp_path, 3, states())
    second = tmp_path / "training_state_1_of_3.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(LetheError, match="misses the files of some ranks .*training_state_0_of_3.safetensors, training_state_2_of_3"):
        read_shards(tmp_path, Ranks())
    second.write_bytes(content[:-4])
    with pytest.raises(LetheError, match="training_state_1_of_3.safetensors is cut"):
        read_shards(tmp_path, Ranks())
    write_tensors(second, {"master.1": torch.zeros(1)})
    with pytest.raises(LetheError, match="do not belong together"):
        read_shards(tmp_path, Ranks())


def test_place_on_a_plain_parameter():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    place(parameter, torch.ones(3, 2))
    assert parameter.tolist() == [[1, 1]] * 3


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
