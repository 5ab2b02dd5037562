"""kernels/divergence.py against the definition in float64."""

import pytest
import torch

from kernels import divergence
from kernels.divergence import linear_kl


def reference(hidden, other, weight, other_weight=None):
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    log_p0 = (other.double() @ (weight if other_weight is None else other_weight).double().T).log_softmax(-1)
    return (log_p0.exp() * (log_p0 - log_p)).sum(-1)


def states(rows, vocabulary, seed=0, width=24, apart=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * 2
    return hidden, hidden + apart * torch.randn(rows, width, generator=generator), torch.randn(vocabulary, width, generator=generator)


@pytest.mark.parametrize("rows,vocabulary,tile,chunk", [(37, 501, 64, 4096), (3, 7, 64, 4096), (40, 512, 512, 1 << 30), (1, 1, 4, 1)])
def test_against_float64(rows, vocabulary, tile, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "TILE", tile)
    monkeypatch.setattr(divergence, "CHUNK_BYTES", chunk)
    hidden, other, weight = states(rows, vocabulary)
    found = linear_kl(hidden, other, weight)
    assert found.dtype == torch.float32 and found.shape == (rows,)
    torch.testing.assert_close(found.double(), reference(hidden, other, weight), rtol=2e-5, atol=5e-6)


def test_two_heads_and_the_direction():
    hidden, other, weight = states(20, 300)
    weight0 = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        linear_kl(hidden, other, weight, weight0).double(), reference(hidden, other, weight, weight0), rtol=2e-5, atol=1e-5
    )
    there, back = linear_kl(hidden, other, weight), linear_kl(other, hidden, weight)
    assert (there - back).abs().max() > 0.01  # it is no distance: which one is the reference matters


def test_extremes():
    hidden, _, weight = states(16, 400)
    same = linear_kl(hidden, hidden, weight)
    assert (same >= 0).all() and same.max() < 1e-5
    sure = linear_kl(hidden * 200, -hidden * 200, weight)  # logits of thousands: nothing overflows
    torch.testing.assert_close(sure.double(), reference(hidden * 200, -hidden * 200, weight), rtol=1e-3, atol=0.0)
    assert linear_kl(hidden[:0], hidden[:0], weight).shape == (0,)
    with pytest.raises(ValueError, match="do not fit"):
        linear_kl(hidden, hidden[:3], weight)
    with pytest.raises(ValueError, match="do not fit"):
        linear_kl(hidden, hidden, weight[:, :5])


def test_16_bit_states_are_computed_in_float32():
    """In bfloat16 logits the rounding alone would be a divergence of the size of those that are measured."""
    hidden, _, weight = (x.bfloat16() for x in states(32, 1000, width=64))
    other = (hidden.float() * 1.01).bfloat16()
    exact = reference(hidden, other, weight)
    torch.testing.assert_close(linear_kl(hidden, other, weight).double(), exact, rtol=1e-4, atol=1e-5)
    rounded = (
        (other @ weight.T).float().softmax(-1) * ((other @ weight.T).float().log_softmax(-1) - (hidden @ weight.T).float().log_softmax(-1))
    ).sum(-1)
    assert (rounded - exact).abs().max() > 10 * (linear_kl(hidden, other, weight) - exact).abs().max()
