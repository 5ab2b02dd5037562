"""L2 and EWC: the anchor's gradient against autograd, the Fisher information against brute force, and training under both, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import random_examples, tiny_model, train_some

import lora.fisher
import train
from data.batching import collate
from lora import add_lora, load_adapter, save_adapter
from lora.fisher import FILE, diagonal_fisher, fisher_of
from lora.resume import Learner, resume, save_checkpoint
from optim.anchor import Anchor
from optim.parallel import ALONE, Ranks
from study.errors import LetheError

EXAMPLES, OTHERS = random_examples(12), random_examples(10, seed=1)
KINDS = ["lora", "full"]


def subject(folder, kind="lora", dtype=torch.float32, dropout=0.0, **changes):
    """(model, what it trains): a LoRA, or all weights."""
    model = tiny_model(folder, dtype, **changes)
    if kind == "full":
        model.requires_grad_(True)
        return model, list(model.parameters())
    add_lora(model, 4, 8.0, dropout, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model, list(model.adapter.parameters())


def random_fisher(parameters):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(p.shape, generator=generator) * 2 for p in parameters]


def nll_of(model, examples, i):
    """(n,) losses of an example's completion, by its whole logits."""
    ids, start = torch.from_numpy(examples.ids(i).astype(np.int64)), int(examples.starts[i])
    return -model(ids[None])[0].log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]


class Twins(Ranks):
    """Two ranks with the same share of a step: every sum is twice what one has."""

    def _reduce(self, tensor, how=dist.ReduceOp.SUM):
        if how == dist.ReduceOp.SUM:
            tensor.mul_(2)


TWINS = Twins(0, 2, torch.device("cpu"))


# The penalty


@pytest.mark.parametrize("weighed", [False, True])
def test_gradient_and_reading_equal_autograd_of_the_penalty(weighed):
    masters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4, 5), (7, 2), (6,))]
    fisher = random_fisher(masters) if weighed else None
    start = [master.detach().double() for master in masters]
    anchor = Anchor(0.3, masters, fisher)
    assert anchor.penalty(masters) == 0.0
    with torch.no_grad():
        for master in masters:
            master.add_(torch.randn(master.shape))
    given = [torch.randn(master.shape) for master in masters]
    masters[0].grad, masters[1].grad = given[0].clone(), given[1].clone()  # the data's loss does not reach the third
    given[2].zero_()
    anchor.add_(masters)

    exact = [master.detach().double().requires_grad_() for master in masters]
    weights = [f.double() for f in fisher] if weighed else [1.0] * 3
    penalty = 0.3 / 2 * sum((w * (x - s).square()).sum() for w, x, s in zip(weights, exact, start, strict=True))
    for master, before, pull in zip(masters, given, torch.autograd.grad(penalty, exact), strict=True):
        torch.testing.assert_close(master.grad.double(), before.double() + pull, rtol=1e-5, atol=1e-6)
    assert anchor.penalty(masters) == pytest.approx(penalty.item(), rel=1e-6) and penalty > 1
    assert anchor.penalty(masters, TWINS) == pytest.approx(2 * penalty.item(), rel=1e-6)  # cut over ranks: the sum of their rows


def test_by_hand():
    master = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    anchor = Anchor(0.5, [master], [torch.tensor([4.0, 0.0])])
    with torch.no_grad():
        master.copy_(torch.tensor([4.0, -6.0]))
    master.grad = torch.tensor([1.0, 1.0])
    anchor.add_([master])
    assert master.grad.tolist() == [1 + 0.5 * 4 * 3, 1.0] and anchor.penalty([master]) == 0.5 / 2 * 4 * 9


def test_what_cannot_be_is_refused():
    master = torch.nn.Parameter(torch.ones(2, 3))
    for coefficient in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="a number of at least 0, not"):
            Anchor(coefficient, [master])
    for fisher in ([torch.ones(3, 2)], [], [torch.ones(2, 3)] * 2):
        with pytest.raises(ValueError, match="numbers or shapes differ"):
            Anchor(0.1, [master], fisher)


# Training under it


def adamw(masters):
    return [torch.optim.AdamW(masters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)]


def steps_of(model, learner, anchor, total=4, start=0, ranks=ALONE, seed=0):
    """fit on EXAMPLES, in passes of at most 100 tokens, three of them a step."""
    ones = np.ones(int(EXAMPLES.completion_offsets[-1]), dtype=np.float32)
    return train.fit(
        model, learner, lambda step, tokens: collate(EXAMPLES, list(range(12)), tokens, ones), total, start=start,
        micro_tokens=100, schedule="constant", max_grad_norm=0.5, anchor=anchor, ranks=ranks, seed=seed,
    )  # fmt: skip


def trained(folder, kind, make_anchor, ranks=ALONE, dtype=torch.float32):
    """(steps, values, distance from the start) after four steps; make_anchor(masters) -> Anchor or None."""
    model, parameters = subject(folder, kind, dtype)
    learner = Learner(model, parameters, adamw)
    start = [master.detach().clone() for master in learner.masters]
    steps = list(steps_of(model, learner, make_anchor(learner.masters), ranks=ranks))
    after = [master.detach().clone() for master in learner.masters]
    return steps, after, math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, start, strict=True)))


def loop_in_float64(folder, kind, coefficient, fisher):
    """The same four steps with the penalty in the loss, by plain autograd and AdamW written out; the data's losses, norms, values."""
    model, parameters = subject(folder, kind)
    model.double().eval()
    start = [p.detach().clone() for p in parameters]
    weights = [1.0] * len(start) if fisher is None else [f.double() for f in fisher]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, norms = [], []
    for step in range(1, 5):
        loss = torch.cat([nll_of(model, EXAMPLES, i) for i in range(12)]).mean()
        penalty = coefficient / 2 * sum((w * (p - s).square()).sum() for w, p, s in zip(weights, parameters, start, strict=True))
        gradients = torch.autograd.grad(loss + penalty, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        losses.append(loss.item())
        norms.append(norm)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(1.0, 0.5 / norm)
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p.mul_(1 - 1e-2 * 0.01)
                p.sub_(1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return losses, norms, [p.detach() for p in parameters]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighed", [False, True])
def test_training_equals_a_loop_in_float64(tmp_path, kind, weighed):
    fisher = random_fisher(subject(tmp_path, kind)[1]) if weighed else None
    steps, values, distance = trained(tmp_path, kind, lambda masters: Anchor(2.0, masters, fisher))
    losses, norms, expected = loop_in_float64(tmp_path, kind, 2.0, fisher)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-4)
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=1e-3) and min(norms) > 0.5  # so clipping is in it
    for one, other in zip(values, expected, strict=True):
        assert (one.double() - other).norm() < 1e-3 * distance  # AdamW makes much of the last bits of a gradient near 0
    assert distance < 0.95 * trained(tmp_path, kind, lambda masters: None)[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_coefficient_of_zero_is_no_anchor(tmp_path, kind):
    plain, without, _ = trained(tmp_path, kind, lambda masters: None)
    zero, same, _ = trained(tmp_path, kind, lambda masters: Anchor(0.0, masters, random_fisher(masters)))
    assert all(torch.equal(a, b) for a, b in zip(without, same, strict=True))
    assert [step.readings.tolist() for step in plain] == [step.readings.tolist() for step in zero]
    bare = torch.nn.Parameter(torch.ones(2))
    Anchor(0.0, [bare]).add_([bare])
    assert bare.grad is None  # a gradient of zeros would have AdamW decay it


def test_ranks_do_not_multiply_the_pull(tmp_path):
    alone, values, _ = trained(tmp_path, "lora", lambda masters: Anchor(2.0, masters))
    both, same, _ = trained(tmp_path, "lora", lambda masters: Anchor(2.0, masters), TWINS)
    assert all(torch.equal(a, b) for a, b in zip(values, same, strict=True))
    assert both[3].tokens == 2 * alone[3].tokens and both[3].grad_norm == alone[3].grad_norm


def test_low_precision_trains_as_float32(tmp_path):
    """bfloat16 weights have float32 masters, and these are what is pulled; float16 gradients are unscaled before."""
    for kind, dtype in (("full", torch.bfloat16), ("lora", torch.bfloat16), ("lora", torch.float16)):
        norms = {}
        for kept in (torch.float32, dtype):
            steps = trained(tmp_path, kind, lambda masters: Anchor(50.0, masters), dtype=kept)[0]
            norms[kept] = [step.grad_norm for step in steps if step.outcome == "stepped"]
        assert norms[torch.float32][3] > 2 * norms[torch.float32][0]  # the pull is most of it
        assert norms[dtype] == pytest.approx(norms[torch.float32], rel=0.1)


def begin(parent):
    """What a stage begins from: the adapter that the one before left, with dropout, and its anchor by EWC."""
    model = tiny_model(parent.parent / "model")
    load_adapter(model, parent, dropout=0.2)
    names, parameters = zip(*model.adapter.stacks.items(), strict=True)
    fisher = fisher_of(model, list(names), list(parameters), OTHERS, parent, samples=6)
    learner = Learner(model, list(parameters), adamw)
    return model, learner, Anchor(2.0, learner.masters, fisher)


def test_a_run_that_was_cut_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    model, _ = subject(tmp_path / "model")
    parent, run = tmp_path / "1_a", tmp_path / "2_b"
    save_adapter(model, parent)
    model, learner, anchor = begin(parent)
    losses = [step.loss for step in steps_of(model, learner, anchor)]
    whole = [master.detach().clone() for master in learner.masters]

    model, learner, anchor = begin(parent)
    list(steps_of(model, learner, anchor, total=2))
    save_checkpoint(run, 2, 0, 2, learner, {"same": {}}, 1, "toy")
    monkeypatch.setattr(lora.fisher, "diagonal_fisher", None)  # what it was is read, not computed
    model, learner, anchor = begin(parent)
    assert anchor.penalty(learner.masters) == 0.0
    assert resume(run, learner, {}, None, 1)["step"] == 2
    assert anchor.penalty(learner.masters) > 0
    assert [step.loss for step in steps_of(model, learner, anchor, start=2)] == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole, learner.masters, strict=True))


# The Fisher information


def by_brute_force(model, parameters, examples, chosen):
    """F in float64: whole logits, one example after another."""
    model.double().eval()
    total = [torch.zeros_like(p) for p in parameters]
    for i in chosen:
        for sum_, gradient in zip(total, torch.autograd.grad(nll_of(model, examples, i).mean(), parameters), strict=True):
            sum_ += gradient.square()
    return [sum_.detach() / len(chosen) for sum_ in total]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_fisher_equals_brute_force(tmp_path, kind, changes):
    model, parameters = subject(tmp_path, kind, dropout=0.2, **changes)
    model.train()
    found = diagonal_fisher(model, parameters, OTHERS)
    assert model.training and all(p.grad is None for p in parameters)
    expected = by_brute_force(*subject(tmp_path, kind, dropout=0.2, **changes), OTHERS, range(10))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and not one.requires_grad
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=1e-5 * float(other.max()))
    assert max(float(f.max()) for f in found) > 1e-4


def test_samples_are_drawn_by_the_seed(tmp_path):
    model, parameters = subject(tmp_path)
    drawn = {seed: diagonal_fisher(model, parameters, OTHERS, 3, seed) for seed in (0, 1)}
    again = diagonal_fisher(model, parameters, OTHERS, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], again, strict=True))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    # Three different examples of the ten: only one choice of them gives this mean.
    single = torch.stack([by_brute_force(*subject(tmp_path), OTHERS, [i])[0].flatten() for i in range(10)])
    for found in drawn.values():
        shares = torch.linalg.lstsq(single.T, found[0].double().flatten()[:, None]).solution[:, 0]
        assert sorted(shares.tolist()) == pytest.approx([0.0] * 7 + [1 / 3] * 3, abs=1e-2)
    everything = diagonal_fisher(model, parameters, OTHERS, 10, 5)
    assert all(torch.equal(a, b) for a, b in zip(everything, diagonal_fisher(model, parameters, OTHERS, 200, 6), strict=True))


def test_bfloat16_gradients_are_summed_in_float32(tmp_path):
    model, parameters = subject(tmp_path, "full", torch.bfloat16)
    found = diagonal_fisher(model, parameters, OTHERS)
    expected = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for i in range(10):
        (micro,) = collate(OTHERS, [i], 1000, None)
        model.nll(micro.input_ids, train.Pack(micro.lengths, model.config, model.device), micro.rows, micro.targets).mean().backward()
        for total, p in zip(expected, parameters, strict=True):
            total += p.grad.double().square() / 10
            p.grad = None
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-30)  # in bfloat16 it would be 1e-2


@pytest.mark.parametrize(("kind", "dtype"), [("lora", torch.bfloat16), ("full", torch.bfloat16), ("lora", torch.float16)])
def test_low_precision_gives_much_the_same_fisher(tmp_path, kind, dtype):
    model, parameters = subject(tmp_path, kind, dtype)
    found = diagonal_fisher(model, parameters, OTHERS)
    expected = by_brute_force(*subject(tmp_path, kind), OTHERS, range(10))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one.double() - other).norm() < 0.1 * other.norm()


def test_the_loss_scale_of_float16_finds_its_size(tmp_path):
    """Where 2^16 is too much it is halved until gradients are finite, and the result does not show it."""
    plain, scaled = (subject(tmp_path, "lora", torch.float16) for _ in range(2))
    seen, nll = [], scaled[0].nll

    def steep(*arguments):
        seen.append(0)
        return nll(*arguments) * 64.0

    scaled[0].nll = steep
    usual, steeper = diagonal_fisher(*plain, OTHERS), diagonal_fisher(*scaled, OTHERS)
    assert len(seen) > 10
    for one, other in zip(usual, steeper, strict=True):
        assert (one - other / 64**2).norm() < 0.05 * one.norm()


def test_what_has_no_fisher_is_said(tmp_path):
    model, parameters = subject(tmp_path)
    with pytest.raises(ValueError, match="at least 1 example, not 0"):
        diagonal_fisher(model, parameters, OTHERS, 0)
    for dtype in (torch.float32, torch.float16):
        broken, its = subject(tmp_path, "lora", dtype)
        its[0].data[0, 0, 0] = math.nan
        with pytest.raises(LetheError, match="not finite: a gradient of the task before"):
            diagonal_fisher(broken, its, OTHERS)
    model.unshard = None  # what tells a model that is spread over ranks
    with pytest.raises(LetheError, match="--shard model has no gradient of a single example"):
        diagonal_fisher(model, parameters, OTHERS)


def test_the_file_is_made_once_and_says_of_what(tmp_path, monkeypatch):
    model, parameters = subject(tmp_path / "model")
    names, folder = list(model.adapter.stacks), tmp_path / "1_a"
    save_adapter(model, folder)
    made, compute = [], diagonal_fisher
    monkeypatch.setattr(lora.fisher, "diagonal_fisher", lambda *a: made.append(a) or compute(*a))
    first = fisher_of(model, names, parameters, OTHERS, folder, 5)
    content = (folder / FILE).read_bytes()
    second = fisher_of(model, names, parameters, OTHERS, folder, 5)
    assert len(made) == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for examples, samples, seed in ((EXAMPLES, 5, 0), (OTHERS, 4, 0), (OTHERS, 4, 1)):
        fisher_of(model, names, parameters, examples, folder, samples, seed)
    train_some(model, seed=7)
    save_adapter(model, folder)  # trained anew
    fisher_of(model, names, parameters, OTHERS, folder, 4, 1)
    assert len(made) == 5 and sorted(p.name for p in folder.iterdir() if p.name.startswith(("fisher", "."))) == [FILE]
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(LetheError, match=r"fisher.safetensors is cut .*; delete it and run again"):
        fisher_of(model, names, parameters, OTHERS, folder, 4, 1)
