"""lora/drift.py: against dense singular values, and against the definition of the KL on whole logits."""

import numpy as np
import pytest
import torch
from tiny import random_examples, raw_config, tiny_model, train_some, write_folder

from lora.drift import drift, drift_record, full_drift, kl_to_base, spectral_norm
from lora.layers import add_lora, lora_layers, merge_adapter
from model import load_model
from study.errors import LetheError


def adapted(tmp_path, **changes):
    model = tiny_model(tmp_path / "m")
    add_lora(model, **{"rank": 4, "alpha": 6.0, "dropout": 0.3, **changes}, generator=torch.Generator().manual_seed(1))
    train_some(model)
    return model


@pytest.mark.parametrize("changes", [{}, {"rank": 100, "alpha": 50.0}, {"rslora": True, "targets": "q_proj,down_proj"}])
def test_drift_against_dense_svd(tmp_path, changes):
    model = adapted(tmp_path, **changes)
    found = drift(model)
    dense = {name: torch.linalg.svdvals(layer.delta().detach().double()) for name, layer in lora_layers(model).items()}
    weights = {name: layer.linear.weight.double().norm() for name, layer in lora_layers(model).items()}

    def expected(names):
        size = sum(dense[name].square().sum() for name in names).sqrt()
        ranks = [float(dense[name].square().sum() / dense[name][0] ** 2) for name in names]
        share = float(size / sum(weights[name] ** 2 for name in names).sqrt())
        return {"frobenius": float(size), "spectral": float(max(dense[name][0] for name in names)), "matrices": len(names),
                "relative_frobenius": share, "stable_rank": np.mean(ranks)}  # fmt: skip

    kinds = found.pop("kinds")
    assert found == pytest.approx(expected(list(dense)), rel=1e-5)
    assert set(kinds) == {name.rsplit(".", 1)[1] for name in dense}
    for kind, values in kinds.items():
        assert values == pytest.approx(expected([name for name in dense if name.endswith(kind)]), rel=1e-5)


def test_a_quantised_base_has_its_own_size(tmp_path):
    plain, small = adapted(tmp_path), load_model(tmp_path / "m", quantize="int8")
    add_lora(small, 4, 6.0)
    for name, stack in plain.adapter.stacks.items():
        small.adapter.stacks[name].data.copy_(stack.data)
    ours, theirs = drift(small), drift(plain)
    assert ours["frobenius"] == theirs["frobenius"] and ours["relative_frobenius"] == pytest.approx(theirs["relative_frobenius"], rel=1e-3)
    assert ours["kinds"]["k_proj"]["relative_frobenius"] == pytest.approx(theirs["kinds"]["k_proj"]["relative_frobenius"], rel=2e-3)


def test_a_fresh_adapter_has_not_moved(tmp_path):
    model = tiny_model(tmp_path / "m")
    with pytest.raises(ValueError, match="no adapter"):
        drift(model)
    add_lora(model, 4)
    found = drift(model)
    assert (found["frobenius"], found["spectral"], found["relative_frobenius"], found["stable_rank"]) == (0, 0, 0, 0)


def test_full_drift_is_the_merged_adapters(tmp_path):
    """Merging turns an adapter's change into one of whole weights: both ways must measure the same."""
    model = adapted(tmp_path)
    by_factors = drift(model)
    merge_adapter(model)
    whole = full_drift(model, tmp_path / "m")
    assert whole["frobenius"] == pytest.approx(by_factors["frobenius"], rel=1e-5)
    assert whole["spectral"] == pytest.approx(by_factors["spectral"], rel=1e-5)
    assert whole["kinds"]["o_proj"]["relative_frobenius"] == pytest.approx(by_factors["kinds"]["o_proj"]["relative_frobenius"], rel=1e-5)
    assert whole["kinds"]["embed_tokens"]["frobenius"] == 0 and whole["kinds"]["norm"]["spectral"] == 0
    assert whole["stable_rank"] == pytest.approx(by_factors["stable_rank"], rel=1e-4)  # what has not moved has none


def test_full_drift_sees_every_tensor_and_no_rounding(tmp_path):
    model = load_model(write_folder(tmp_path / "m", raw_config()), torch.bfloat16)
    assert full_drift(model, tmp_path / "m")["frobenius"] == 0  # the files are float32: rounding them is no training
    model.model.norm.weight.data += 1.0
    model.model.embed_tokens.weight.data[3] += 2.0
    moved = full_drift(model, tmp_path / "m")
    assert moved["kinds"]["norm"]["frobenius"] == pytest.approx(8.0, rel=1e-2) == moved["kinds"]["norm"]["spectral"]
    assert moved["kinds"]["embed_tokens"]["spectral"] == pytest.approx(16.0, rel=1e-2)
    with pytest.raises(LetheError, match="is not its base"):
        full_drift(model, write_folder(tmp_path / "other", raw_config(intermediate_size=80)))
    with pytest.raises(LetheError, match="misses tensors"):
        full_drift(tiny_model(tmp_path / "three", num_hidden_layers=3), tmp_path / "m")


def test_spectral_norm_of_large_matrices():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(700, 600, generator=generator)  # the hardest case: neighbouring singular values are close
    falling = torch.randn(900, 20, generator=generator) @ torch.randn(20, 600, generator=generator) + 0.01 * torch.randn(900, 600)
    for matrix, close in ((flat, 2e-2), (falling, 1e-5), (falling.T, 1e-5), (falling[:, :40], 1e-5), (falling[0], 1e-5)):
        exact = float(torch.linalg.svdvals(matrix)[0] if matrix.dim() == 2 else matrix.norm())
        assert exact * (1 - close) <= spectral_norm(matrix) <= exact * (1 + 1e-5)


def slow_kl(model, base, examples):
    """The definition, one example at a time, on whole logits in float64."""
    found = []
    for i in range(len(examples)):
        ids, start = torch.from_numpy(examples.ids(i).astype(np.int64)), int(examples.starts[i])
        log_p, log_p0 = (m(ids[None])[0, start - 1 : -1].double().log_softmax(-1) for m in (model, base))
        found.append(float((log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()))
    return found


@torch.no_grad()
def test_kl_to_base(tmp_path):
    model, base, examples = adapted(tmp_path), tiny_model(tmp_path / "m"), random_examples(30)
    adapter = model.adapter
    model.train()
    found = kl_to_base(model, examples)
    assert model.adapter is adapter and model.training and adapter.training
    model.eval()
    expected = slow_kl(model, base, examples)
    assert min(expected) > 1e-3 and found == pytest.approx(expected, rel=2e-4, abs=1e-6)
    assert kl_to_base(model, examples, micro_tokens=20) == pytest.approx(found, rel=1e-4, abs=1e-6)  # dropout is off, packing is nothing
    assert kl_to_base(model, examples, base) == pytest.approx(found, rel=1e-5, abs=1e-7)
    record = drift_record(model, {"toy": examples})
    assert record["frobenius"] == drift(model)["frobenius"] and record["kl"]["toy"]["n"] == 30
    told = record["kl"]["toy"]
    assert told["low"] < told["mean"] < told["high"] and told["mean"] == pytest.approx(found.mean())
    merge_adapter(model)
    with pytest.raises(ValueError, match="no adapter"):
        kl_to_base(model, examples)
    assert kl_to_base(model, examples, base) == pytest.approx(expected, rel=1e-3, abs=1e-5)  # full fine-tuning: two models
    assert drift_record(model, {}, tmp_path / "m")["frobenius"] == pytest.approx(record["frobenius"], rel=1e-5)


def test_a_kl_that_is_not_finite_is_told_and_the_adapter_stays(tmp_path):
    model = adapted(tmp_path)
    adapter = model.adapter
    next(iter(model.adapter.stacks.values())).data.fill_(float("nan"))
    with pytest.raises(LetheError, match="not finite"):
        kl_to_base(model, random_examples(4))
    assert model.adapter is adapter
