"""Muon against its algorithm written out in float64 and against torch.optim.Muon, on random and on a LoRA's gradients; the partition."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_examples, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.batching import collate
from lora import add_lora
from lora.layers import lora_parameters
from masking.score import micro_nll
from optim import muon
from optim.muon import COEFFICIENTS, Muon, form_of, gram_form, ordinary_form
from optim.partition import optimizers_of, partition_lines

EPS = 1e-7
STEPS, LR, DECAY = 50, 3e-3, 0.01


def newton_schulz(X, steps=5):
    """One matrix, in float64, as the algorithm is written down."""
    a, b, c = COEFFICIENTS
    X = X / max(float(X.norm()), EPS)
    for _ in range(steps):
        G = X @ X.T
        X = a * X + (b * G + c * G @ G) @ X
    return X


def in_float64(start, gradients, scale="match_rms_adamw", nesterov=True, rates=None):
    """The parameters after every step; start: matrices or stacks, gradients: of each step."""
    weights = [w.double().clone() for w in start]
    momenta = [torch.zeros_like(w) for w in weights]
    trajectory = []
    for step, found in enumerate(gradients):
        lr = rates[step] if rates else LR
        for w, m, g in zip(weights, momenta, found, strict=True):
            m.lerp_(g.double(), 0.05)
            update = g.double().lerp(m, 0.95) if nesterov else m
            rows, cols = w.shape[-2:]
            factor = 0.2 * math.sqrt(max(rows, cols)) if scale == "match_rms_adamw" else math.sqrt(max(1, rows / cols))
            orthogonal = torch.stack([newton_schulz(u) for u in update.reshape(-1, rows, cols)]).view_as(w)
            w.mul_(1 - lr * DECAY).sub_(lr * factor * orthogonal)
        trajectory.append([w.clone() for w in weights])
    return trajectory


def steps_of(make, start, gradients, rates=None):
    """The parameters after every step of an optimizer; make(parameters) builds it."""
    weights = [nn.Parameter(w.clone()) for w in start]
    optimizer = make(weights)
    trajectory = []
    for step, found in enumerate(gradients):
        for w, g in zip(weights, found, strict=True):
            w.grad = g.clone()
        for group in optimizer.param_groups:
            group["lr"] = rates[step] if rates else LR
        optimizer.step()
        trajectory.append([w.detach().clone() for w in weights])
    return trajectory


def apart(stacks):
    return [matrix for stack in stacks for matrix in (stack if stack.ndim == 3 else stack[None])]


def joined(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def distances(trajectory, reference, start):
    """Frobenius norms over all parameters, after every step: of the difference over that of the parameters, and over that of the way
    gone since the start."""
    origin = joined(start)
    of_weights, of_way = [], []
    for found, exact in zip(trajectory, reference, strict=True):
        exact = joined(exact)
        off = (joined(found) - exact).norm()
        of_weights.append(float(off / exact.norm()))
        of_way.append(float(off / (exact - origin).norm()))
    return of_weights, of_way


def random_case():
    """The kinds of shapes there are: stacks of LoRA factors, wide and tall; single matrices, square, nearly so, and a wide one."""
    shapes = [(3, 8, 64), (2, 64, 8), (2, 8, 24), (48, 48), (40, 24), (24, 40), (8, 96)]
    return [torch.randn(s) * 0.1 for s in shapes], [[torch.randn(s) for s in shapes] for _ in range(STEPS)]


@pytest.fixture(scope="module")
def lora_case(tmp_path_factory):
    """Gradients of a toy model's LoRA as it trains, from B = 0 on, where A has none. One example a step, with fewer tokens than the rank
    now and then: gradients without full rank, which Newton-Schulz amplifies most."""
    model, examples = tiny_model(tmp_path_factory.mktemp("model")), random_examples(STEPS, longest=16)
    add_lora(model, 12, 24.0, generator=torch.Generator().manual_seed(0))
    parameters = lora_parameters(model)
    start = [p.detach().clone() for p in parameters]
    optimizer, gradients = torch.optim.AdamW(parameters, lr=LR), []
    for step in range(STEPS):
        (micro,) = collate(examples, [step], 10_000, None)
        micro_nll(model, micro).mean().backward()
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.step()
        optimizer.zero_grad()
    names = list(model.adapter.stacks)
    assert all(not g.any() for name, g in zip(names, gradients[0], strict=True) if name.startswith("A_"))
    assert {form_of(*sorted(p.shape[1:]), False) for p in parameters} == {"gram"}
    return start, gradients


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", muon.SCALES)
def test_it_is_its_algorithm_on_random_gradients(scale, nesterov):
    start, gradients = random_case()
    found = steps_of(lambda p: Muon(p, LR, DECAY, nesterov=nesterov, scale=scale), start, gradients)
    of_weights, of_way = distances(found, in_float64(start, gradients, scale, nesterov), start)
    assert max(of_weights) < 2e-6 and max(of_way) < 1e-5
    assert joined(found[-1]).sub(joined(start)).norm() > 0.1 * joined(start).norm()  # it has gone far enough to be wrong


def test_it_is_its_algorithm_on_real_gradients(lora_case):
    start, gradients = lora_case
    found = steps_of(lambda p: Muon(p, LR, DECAY), start, gradients)
    of_weights, of_way = distances(found, in_float64(start, gradients), start)
    assert max(of_weights) < 2e-6 and max(of_way) < 1e-5


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("scale", muon.SCALES)
def test_it_is_torch_muon_as_far_as_bfloat16_goes(lora_case, kind, scale):
    """torch.optim.Muon iterates in bfloat16. All along, the parameters agree to 1e-2 of their norm, and so does the way gone since the
    start after 50 steps. Its first updates are off by more: 1.5 % of random ones, and 15 % of the real ones, whose gradients lack full
    rank: bfloat16's rounding fills the empty directions, and Newton-Schulz brings it up. (Ours are those of float64, see above.)"""
    start, gradients = random_case() if kind == "random" else lora_case
    ours = steps_of(lambda p: Muon(p, LR, DECAY, scale=scale), start, gradients)
    theirs = steps_of(lambda p: torch.optim.Muon(p, LR, DECAY, adjust_lr_fn=scale), apart(start), [apart(found) for found in gradients])
    of_weights, of_way = distances(theirs, ours, start)
    assert max(of_weights) < 1e-2 and of_way[-1] < 1e-2
    assert of_way[0] < (0.03 if kind == "random" else 0.3)


def test_in_bfloat16_the_ordinary_form_is_that_of_torch():
    """The one that large matrices take on CUDA: against float64 its error is that of torch's own."""
    for shape in ((64, 64), (64, 96)):
        X = torch.randn(4, *shape)
        exact = torch.stack([newton_schulz(x) for x in X.double()])
        ours = torch.cat([o for _, o in ordinary_form([X[:1], X[1:]], COEFFICIENTS, 5, EPS, torch.bfloat16)]).double()
        theirs = torch.stack([torch.optim._muon._zeropower_via_newtonschulz(x, COEFFICIENTS, 5, EPS) for x in X]).double()
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() < 0.1 * exact.norm()


# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


def gram(updates, steps=5):
    return [Q @ X for Q, X in gram_form(updates, COEFFICIENTS, steps, EPS)]


def ordinary(updates, steps=5):
    return [found for _, found in ordinary_form(updates, COEFFICIENTS, steps, EPS)]


@pytest.mark.parametrize("form", [gram, ordinary])
def test_singular_values_follow_the_scalar_map(form):
    """Golden values: 1 -> .69644, .001 -> .4705, 1e-4 -> .0485; [.01, 1] -> [.6818, 1.1344], and at most 1.2024 from .003 on."""

    def mapped(values):
        """What becomes of the singular value s of [[√(1 - s²), 0], [0, s]], whose Frobenius norm is 1."""
        s = torch.tensor(values, dtype=torch.float64)
        X = torch.zeros(len(s), 2, 8, dtype=torch.float64)
        X[:, 0, 0], X[:, 1, 1] = (1 - s * s).sqrt(), s
        (found,) = form([X])
        return found[:, 1, 1]

    torch.testing.assert_close(mapped([1e-3, 1e-4, 0.0]), torch.tensor([0.4705, 0.0485, 0.0], dtype=torch.float64), atol=5e-5, rtol=0)
    (one,) = form([torch.tensor([[[3.0, 0, 0, 0]]], dtype=torch.float64)])
    assert float(one[0, 0, 0]) == pytest.approx(0.69644, abs=5e-6)
    upper = mapped(torch.linspace(0.01, 1, 20001).tolist())
    assert float(upper.min()) == pytest.approx(0.6818, abs=1e-4) and float(upper.max()) == pytest.approx(1.1344, abs=1e-4)
    assert float(mapped(torch.linspace(0.003, 1, 20001).tolist()).max()) == pytest.approx(1.2024, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7])
def test_both_forms_agree(steps):
    updates = [torch.randn(3, 6, 40, dtype=torch.float64), torch.randn(2, 40, 6, dtype=torch.float64).mT]
    exact = torch.stack([newton_schulz(x, steps) for x in torch.cat(updates)])
    for form in (gram, ordinary):
        torch.testing.assert_close(torch.cat(form(updates, steps)), exact, rtol=1e-10, atol=1e-10)


def test_the_gram_form_forms_its_matrix_anew(monkeypatch):
    """Where singular values span three decades, float32 is as exact as in the ordinary form; on one Gram matrix it would not be."""
    U, V = torch.linalg.qr(torch.randn(8, 16, 16))[0], torch.linalg.qr(torch.randn(8, 512, 16))[0]
    X = (U * torch.logspace(0, -3, 16)) @ V.mT
    exact = torch.stack([newton_schulz(x) for x in X.double()])

    def error(form):
        return float((form([X])[0].double() - exact).norm() / exact.norm())

    assert error(gram) < 3 * error(ordinary) < 3e-5
    monkeypatch.setattr(muon, "RESTART", 5)
    assert error(gram) > 5e-5


def test_the_form_is_chosen_by_shape():
    assert form_of(16, 2048, True) == form_of(256, 8192, True) == form_of(512, 2048, False) == "gram"
    assert form_of(2048, 8192, True) == form_of(2048, 2048, False) == form_of(16, 32, False) == "ordinary"


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer


def one_step(weights, gradients, **settings):
    return steps_of(lambda p: Muon(p, **settings), weights, [gradients])[0]


def test_a_stack_is_its_matrices(monkeypatch):
    """However the work is cut: the batches of a CPU are made so small here that stacks are taken apart."""
    start, gradients = random_case()
    whole = steps_of(Muon, start, gradients[:3])[-1]
    single = steps_of(Muon, apart(start), [apart(found) for found in gradients[:3]])[-1]
    monkeypatch.setattr(muon, "BATCH_CPU", 1100)
    parts = [(form, [part for _, part in batch]) for form, batch in muon.batches([nn.Parameter(w) for w in start])]
    assert ("gram", [slice(0, 2)]) in parts and len(parts) == 8
    small = steps_of(Muon, start, gradients[:3])[-1]
    for a, b, c in zip(apart(whole), single, apart(small), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-6)


def test_matrices_of_a_shape_meet_in_one_batch():
    start, _ = random_case()
    assert [(form, len(batch)) for form, batch in muon.batches([nn.Parameter(w) for w in start])] == [
        ("gram", 4), ("ordinary", 1), ("ordinary", 2)
    ]  # fmt: skip


def test_work_is_launched_for_batches_and_not_for_matrices(monkeypatch):
    """The five stacks of a Llama's factors, however many layers there are: as many kernels as torch's loop needs for three matrices."""
    shapes = {"A": (24, 4, 64), "wide A": (4, 4, 96), "k B": (8, 32, 4), "q B": (12, 64, 4), "up B": (8, 96, 4)}

    class Count(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.kernels += function.namespace == "aten" and not function.is_view and "view" not in function.name()
            return function(*args, **(kwargs or {}))

    def kernels_of(layers):
        parameters = [nn.Parameter(torch.zeros(n * layers, rows, cols)) for n, rows, cols in shapes.values()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = Muon(parameters)
        optimizer.step()
        with Count() as count:
            optimizer.step()
        return count.kernels

    monkeypatch.setattr(muon, "BATCH_CPU", muon.BATCH_CUDA)
    assert kernels_of(1) == kernels_of(4) < 60


@pytest.mark.parametrize("scale", muon.SCALES)
def test_scale_and_transposition(scale):
    for shape in ((2, 8, 40), (2, 8, 12)):
        w, g = torch.zeros(shape), torch.randn(shape)
        (found,) = one_step([w], [g], scale=scale)
        (larger,) = one_step([w], [1000 * g], scale=scale)
        torch.testing.assert_close(larger, found, rtol=1e-4, atol=1e-7)
        (turned,) = one_step([w.mT.contiguous()], [g.mT.contiguous()], scale=scale)
        ratio = 1 if scale == "match_rms_adamw" else math.sqrt(shape[2] / shape[1])  # the only place where up and down differ
        torch.testing.assert_close(turned.mT / ratio, found, rtol=1e-4, atol=1e-7)


def test_a_step_is_as_large_as_one_of_adamw():
    for shape in ((16, 2048), (512, 16), (96, 96)):
        (found,) = one_step([torch.zeros(shape)], [torch.randn(shape)])
        assert 0.13 < float(found.square().mean().sqrt()) / LR < 0.24


def test_nothing_to_learn_is_no_step():
    """Zero matrices in a stack, beside one that has a gradient; and one without any gradient, which even decay passes by."""
    start = [torch.randn(3, 4, 32), torch.randn(3, 6, 6), torch.randn(4, 16), torch.randn(5, 5)]
    gradients = [torch.zeros_like(w) for w in start[:3]]
    gradients[0][1], gradients[1][2] = torch.randn(4, 32), torch.randn(6, 6)
    weights = [nn.Parameter(w.clone()) for w in start]
    for w, g in zip(weights, gradients, strict=False):
        w.grad = g
    optimizer = Muon(weights)
    for _ in range(2):
        optimizer.step()
    assert all(torch.isfinite(w).all() for w in weights)
    assert torch.equal(weights[0][::2], start[0][::2]) and not torch.equal(weights[0][1], start[0][1])
    assert torch.equal(weights[1][:2], start[1][:2]) and not torch.equal(weights[1][2], start[1][2])
    assert torch.equal(weights[2], start[2]) and torch.equal(weights[3], start[3]) and not optimizer.state[weights[3]]


def test_tiny_gradients_are_treated_as_torch_treats_them():
    """Below eps a gradient is divided by eps and not by its norm, so noise at that height is no full step."""
    for shape in ((4, 32), (6, 6)):
        g = torch.randn(shape)
        for size in (1e-5, 1e-8, 1e-12, 1e-30):
            (ours,) = one_step([torch.zeros(shape)], [g * size])
            (theirs,) = steps_of(lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw"), [torch.zeros(shape)], [[g * size]])[0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * float(theirs.abs().max()) + 1e-30)


def test_one_bad_matrix_spoils_no_other():
    g = torch.randn(3, 4, 32)
    g[1] = float("nan")
    (found,) = one_step([torch.zeros(3, 4, 32)], [g])
    assert torch.isfinite(found[::2]).all() and found[1].isnan().all()


def test_it_goes_on_from_its_state(tmp_path):
    """Saved as tensors after 20 of 40 steps and loaded into a fresh optimizer, under a changing rate: bit for bit the same."""
    start, gradients = random_case()
    rates = [LR * (1 - step / 40) for step in range(40)]
    whole = steps_of(lambda p: Muon(p, weight_decay=DECAY), start, gradients[:40], rates)
    exact = in_float64(start, gradients[:40], rates=rates)
    assert max(distances(whole, exact, start)[1]) < 1e-5

    made = []
    steps_of(lambda p: made.append(Muon(p, weight_decay=DECAY)) or made[0], start, gradients[:20], rates)
    state = made[0].state_dict()
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())
    save_file({str(i): entry["momentum_buffer"] for i, entry in state["state"].items()}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")

    def resumed(parameters):
        optimizer = Muon(parameters, weight_decay=DECAY)
        entries = {i: {"momentum_buffer": loaded[str(i)]} for i in range(len(parameters))}
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        return optimizer

    rest = steps_of(resumed, whole[19], gradients[20:40], rates[20:])
    for found, expected in zip(rest, whole[20:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_it_cannot_do_is_said():
    for bad in (torch.zeros(4), torch.zeros(2, 2, 2, 2), torch.zeros(4, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="float32 matrices and stacks of them"):
            Muon([nn.Parameter(bad)])
    with pytest.raises(ValueError, match="scale 'rms' is unknown; known: match_rms_adamw, original"):
        Muon([nn.Parameter(torch.zeros(4, 4))], scale="rms")
    for settings in ({"lr": -1}, {"lr": math.nan}, {"momentum": 1.0}, {"ns_steps": 0}, {"eps": 0}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="Muon needs lr"):
            Muon([nn.Parameter(torch.zeros(4, 4))], **settings)


# ----------------------------------------------------------------------------------------------------------------------
# The partition

SETTINGS = {"learning_rate": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-9, "momentum": 0.9, "nesterov": False,
            "ns_steps": 4, "muon_scale": "original"}  # fmt: skip


def named(shapes):
    return list(shapes), [nn.Parameter(torch.zeros(shape)) for shape in shapes.values()]


LORA = {"stacks.A_4x64": (6, 4, 64), "stacks.B_32x4": (4, 32, 4), "stacks.A_4x96": (2, 4, 96)}
WHOLE = {
    "model.embed_tokens.weight": (97, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.input_layernorm.weight": (64,), "model.layers.1.self_attn.q_proj.weight": (64, 64), "model.norm.weight": (64,),
    "lm_head.weight": (97, 64),
}  # fmt: skip


def split(shapes, name="muon", factors="both"):
    """{optimizer class: names of its parameters}"""
    names, parameters = named(shapes)
    by_id = {id(p): n.split(".", 1)[1] for n, p in zip(names, parameters, strict=True)}
    found = optimizers_of(names, parameters, name=name, muon_factors=factors, **SETTINGS)
    return {type(o): [by_id[id(p)] for group in o.param_groups for p in group["params"]] for o in found}


def test_the_partition():
    assert split(LORA) == {Muon: ["A_4x64", "B_32x4", "A_4x96"]}
    assert split(LORA, factors="B") == {Muon: ["B_32x4"], torch.optim.AdamW: ["A_4x64", "A_4x96"]}
    assert split(LORA, factors="A") == {Muon: ["A_4x64", "A_4x96"], torch.optim.AdamW: ["B_32x4"]}
    assert split(LORA, "adamw", "A") == {torch.optim.AdamW: ["A_4x64", "B_32x4", "A_4x96"]}
    assert split(WHOLE) == {
        Muon: ["layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_proj.weight"],
        torch.optim.AdamW: ["embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight", "weight"],
    }


def test_the_settings_arrive():
    names, parameters = named(WHOLE)
    first, second = optimizers_of(names, parameters, name="muon", muon_factors="both", **SETTINGS)
    expected = {"lr": 2e-3, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False, "ns_steps": 4, "scale": "original"}
    assert {key: first.param_groups[0][key] for key in expected} == expected
    expected = {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-9}
    assert {key: second.param_groups[0][key] for key in expected} == expected


def test_a_model_of_this_house_is_partitioned(tmp_path):
    model = tiny_model(tmp_path, tie_word_embeddings=False)
    names, parameters = zip(*model.named_parameters(), strict=True)
    first, second = optimizers_of(list(names), list(parameters), name="muon", muon_factors="both", **SETTINGS)
    assert sum(len(g["params"]) for g in first.param_groups) == 2 * 7
    assert sum(len(g["params"]) for g in second.param_groups) == len(names) - 14


def test_the_lines():
    names, parameters = named({"A_16x2048": (96, 16, 2048), "B_512x16": (32, 512, 16)})
    asked = {"name": "muon", "muon_scale": "match_rms_adamw", "muon_factors": "both"}
    assert partition_lines(names, parameters, **asked) == [
        "muon   A_16x2048    96 matrices 16 x 2048  lr x 0.2·√2048 = 9.051",
        "muon   B_512x16     32 matrices 512 x 16  lr x 0.2·√512 = 4.525",
    ]
    assert partition_lines(names, parameters, name="muon", muon_scale="original", muon_factors="B") == [
        "muon   B_512x16     32 matrices 512 x 16  lr x √(512/16) = 5.657",
        "adamw  A_16x2048    96 matrices 16 x 2048",
    ]
    assert partition_lines(*named(WHOLE), **asked) == [
        "muon   q_proj.weight              2 matrices 64 x 64  lr x 0.2·√64 = 1.6",
        "muon   up_proj.weight             1 matrix 96 x 64  lr x 0.2·√96 = 1.96",
        "adamw  embed_tokens.weight        1 matrix 97 x 64",
        "adamw  input_layernorm.weight     1 tensor 64",
        "adamw  norm.weight                1 tensor 64",
        "adamw  lm_head.weight             1 matrix 97 x 64",
    ]


def test_unknown_words_are_refused():
    names, parameters = named(LORA)
    for words, message in (
        ({"name": "adam"}, "optimizer 'adam' is unknown; known: adamw, muon"),
        ({"muon_factors": "C"}, "muon_factors 'C' is unknown; known: both, A, B"),
        ({"muon_scale": "rms"}, "scale 'rms' is unknown"),
    ):
        asked = {"name": "muon", "muon_factors": "both", **SETTINGS, **words}
        with pytest.raises(ValueError, match=message):
            optimizers_of(names, parameters, **asked)
    with pytest.raises(ValueError, match="no matrix to step on among model.norm.weight"):
        optimizers_of(*named({"model.norm.weight": (64,)}), name="muon", muon_factors="both", **SETTINGS)
