"""Quantised bases against bitsandbytes' own numbers, a brute-force NF4, and transformers' 4-bit model."""

import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny import raw_config, train_some, write_folder

from kernels.dropout import Span
from kernels.linear import Addition, Joined, linear, norm_linear, swiglu_linear
from lora import add_lora, load_adapter, merge_adapter, save_adapter
from lora.layers import lora_parameters, merged
from model import generate, load_model
from model.checkpoint import read_json, save_weights
from model.quantized import Packed, Rows, base_size, pack
from study.errors import LetheError

functional = pytest.importorskip("bitsandbytes.functional")
KINDS = ["nf4", "int8"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
# arXiv 2305.14314, appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def own_dense(weight, kind):
    """The library's own way there and back."""
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight)
        return functional.int8_vectorwise_dequant(values, scales)
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (300, 128)])
def test_dense_is_what_the_library_makes(shape, dtype):
    weight = matrix(*shape)
    assert torch.equal(pack(weight, "nf4", torch.float32).dense(), own_dense(weight, "nf4"))
    assert torch.equal(pack(weight.bfloat16(), "nf4", dtype).dense(), own_dense(weight.bfloat16().float(), "nf4").to(dtype))
    packed = pack(weight, "int8", dtype)
    assert torch.equal(packed.tensors[0], functional.int8_vectorwise_quant(weight)[0])
    torch.testing.assert_close(packed.dense(), own_dense(weight, "int8").to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_nf4_is_the_nearest_of_sixteen_levels():
    weight = matrix(32, 256)
    packed = pack(weight, "nf4", torch.float32)
    blocks = weight.view(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / most)[..., None] - torch.tensor(NF4)).abs().argmin(-1).flatten()
    codes = packed.tensors[0].flatten().int()
    found = torch.stack([codes >> 4, codes & 15], 1).flatten()
    assert (found == nearest).float().mean() > 0.999  # what lies halfway may fall to either side
    scales = packed.dense().view(-1, 64).abs().amax(1, keepdim=True)  # of a level of ±1: every block has one
    torch.testing.assert_close(scales, most, rtol=0.03, atol=0)  # the scales are in 8 bits
    torch.testing.assert_close(packed.dense().view(-1, 64), torch.tensor(NF4)[found].view(-1, 64) * scales, rtol=1e-6, atol=0)


def test_bits_per_weight():
    bits = {kind: 8 * sum(t.nbytes for t in pack(matrix(1024, 1024), kind, torch.bfloat16).tensors) / 2**20 for kind in KINDS}
    assert bits["nf4"] < 4.14 and bits["int8"] < 8.04


def test_int8_keeps_a_row_of_zeros():
    weight = matrix(4, 32)
    weight[2] = 0
    dense = pack(weight, "int8", torch.float32).dense()
    assert not dense[2].any() and torch.isfinite(dense).all()
    assert ((dense - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()


# In a linear


@pytest.mark.parametrize("before", ["plain", "norm", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_a_plain_graph_over_the_librarys_weights(kind, before):
    """Forward, and the gradients of the input, the residual and the factors, of three linears multiplied as one."""
    weights = [matrix(size, 64, seed=size) * 10 for size in (64, 32, 48)]
    joined = Joined(Rows(tuple(pack(weight, kind, torch.float32) for weight in weights)), (), None)
    dense = torch.cat([own_dense(weight, kind) for weight in weights])
    scale, columns, salts = 0.5, [(0, 64), (96, 144)], [(0, 4, 1), (4, 8, 2)]
    shapes = [(4, 64), (64, 4), (4, 64), (48, 4)]

    def leaves():
        generator = torch.Generator().manual_seed(1)
        width = 128 if before == "swiglu" else 64
        made = [torch.randn(shape, generator=generator) for shape in [(10, width), (10, width), *shapes]]
        return [tensor.requires_grad_() for tensor in made]

    x, residual, *factors = leaves()
    addition = Addition(tuple(factors), [Span(*salt) for salt in salts], columns, [scale, scale], 0.0)
    gain = 1 + matrix(64)
    if before == "norm":
        y, total = norm_linear(x, residual, gain, 1e-5, joined, addition)
    else:
        y = (linear if before == "plain" else swiglu_linear)(x, joined, addition)
    (y.square().sum() + (total.sum() if before == "norm" else 0)).backward()

    x2, residual2, *factors2 = leaves()
    if before == "norm":
        total2 = x2 + residual2
        f = F.rms_norm(total2, (64,), gain, 1e-5)
    else:
        f = x2 if before == "plain" else F.silu(x2[:, :64]) * x2[:, 64:]
    y2 = F.linear(f, dense)
    for (a, b), A, B in zip(columns, factors2[::2], factors2[1::2], strict=True):
        y2 = y2 + F.pad(scale * f @ A.T @ B.T, (a, 144 - b))
    (y2.square().sum() + (total2.sum() if before == "norm" else 0)).backward()
    torch.testing.assert_close(y, y2, rtol=1e-4, atol=1e-4)
    pairs = [(x, x2), *zip(factors, factors2, strict=True), *([(residual, residual2)] if before == "norm" else [])]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


# In a model


def folder_of(tmp_path, **changes):
    return write_folder(tmp_path / "base", raw_config(**changes))


def dequantised(folder, out, kind):
    """A plain folder whose decoder linears are the library's own dense weights."""
    model = load_model(folder)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in weights:
        if "_proj.weight" in name:
            weights[name] = own_dense(weights[name], kind)
    return write_folder(out, read_json(folder / "config.json"), weights=weights)


def adapted(model):
    add_lora(model, 4, 8.0, dropout=0.1, generator=torch.Generator().manual_seed(0))
    train_some(model)
    return model


IDS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_plain_one_with_rounded_weights(tmp_path, kind, biases):
    folder = folder_of(tmp_path, attention_bias=biases, mlp_bias=biases)
    plain, ours = load_model(dequantised(folder, tmp_path / "plain", kind)), load_model(folder, quantize=kind)
    tolerance = {"rtol": 0, "atol": 0} if kind == "nf4" else {"rtol": 1e-4, "atol": 1e-4}
    assert ours.quantized == kind and not plain.quantized
    torch.testing.assert_close(ours(IDS), plain(IDS), **tolerance)
    assert (ours(IDS) - load_model(folder)(IDS)).abs().max() > 0.01  # it was rounded
    for model in (ours, plain):
        adapted(model)
        model(IDS).log_softmax(-1)[..., 3].sum().backward()
    for mine, other in zip(lora_parameters(ours), lora_parameters(plain), strict=True):
        assert other.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(ours, prompts, 8, []) == generate(plain, prompts, 8, [])


def test_nf4_equals_transformers(tmp_path):
    import transformers
    from bitsandbytes.nn import Linear4bit

    folder = folder_of(tmp_path, num_hidden_layers=1)
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=wanted, device_map="cpu")
    ours = load_model(folder, quantize="nf4")
    found = {name: m for name, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    assert len(found) == 7
    for block, group in ours.model.layers[0].groups():
        for module, part in zip(block._groups[group], block.elsewhere[group].parts, strict=True):
            name = next(name for name, m in ours.named_modules() if m is module)
            weight = found[name].weight
            assert torch.equal(part.dense(), functional.dequantize_4bit(weight.data, weight.quant_state)), name


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_are_made_twice_and_never_kept(tmp_path, kind, monkeypatch):
    model = adapted(load_model(folder_of(tmp_path), quantize=kind)).train()
    made, dense = [], Rows.dense

    def watched(self):
        whole = dense(self)
        made.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(Rows, "dense", watched)
    loss = model(IDS).square().mean()
    gc.collect()
    assert len(made) == 8 and not any(ref() is not None for ref in made)  # 2 layers of 4 products, while the graph waits
    loss.backward()
    assert len(made) == 8 + 7 and not any(ref() is not None for ref in made)  # the first needs no gradient of its input


@pytest.mark.parametrize("kind", KINDS)
def test_loading_holds_one_dense_weight_at_a_time(tmp_path, kind, monkeypatch):
    import model.checkpoint as checkpoint

    seen, most = [], []

    def watched(weight, *rest):
        seen.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in seen))
        return pack(weight, *rest)

    monkeypatch.setattr(checkpoint, "pack", watched)
    model = load_model(folder_of(tmp_path), quantize=kind)
    assert len(most) == 14 and max(most) == 1
    count, size = base_size(model)
    plain_count, plain_size = base_size(load_model(tmp_path / "base"))
    dense = 2 * 4 * (64 * 64 * 2 + 32 * 64 * 2 + 64 * 96 * 3)  # bytes of the linears of two layers
    assert count == plain_count and plain_size == 4 * count
    assert size - (plain_size - dense) < dense * (0.32 if kind == "int8" else 0.40)  # toy matrices: each has a table of 1 KiB


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_leaves_the_base_alone(tmp_path, kind):
    model = load_model(folder_of(tmp_path), quantize=kind)
    before = [t.clone() for layer in model.model.layers for block, group in layer.groups() for t in block.elsewhere[group].tensors]
    add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(lora_parameters(model), 1e-2), []
    for _ in range(30):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = [t for layer in model.model.layers for block, group in layer.groups() for t in block.elsewhere[group].tensors]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_and_what_is_refused(tmp_path, kind):
    folder = folder_of(tmp_path)
    plain, model = load_model(folder), adapted(load_model(folder, quantize=kind))
    assert model.fingerprint == f"{plain.fingerprint}:{kind}"
    expected = model.eval()(IDS)
    with pytest.raises(LetheError, match=f"cannot be merged into a base in {kind}.*swallow"):
        merge_adapter(model)
    with pytest.raises(LetheError, match="cannot be merged"), merged(model):
        pass
    with pytest.raises(LetheError, match="cannot be written"):
        save_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model(IDS), expected)  # the adapter is still on
    save_adapter(model, tmp_path / "adapter")
    again = load_model(folder, quantize=kind)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS), expected)


def test_without_bitsandbytes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LetheError, match="needs bitsandbytes.*pip install.*int8"):
        load_model(folder, quantize="nf4")
    assert load_model(folder, quantize="int8")(IDS).isfinite().all()
    with pytest.raises(LetheError, match="'fp4' is unknown; known: none, nf4, int8"):
        load_model(folder, quantize="fp4")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_compute_dtype_is_the_models(tmp_path, kind, device):
    model = adapted(load_model(folder_of(tmp_path), torch.bfloat16, device, quantize=kind))
    loss = model(IDS.to(device)).float().square().mean()
    loss.backward()
    assert model.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in lora_parameters(model))
    exact = adapted(load_model(folder_of(tmp_path), torch.float32, quantize=kind))
    torch.testing.assert_close(loss.cpu(), exact(IDS).square().mean(), rtol=0.1, atol=0)
    rows = model.model.layers[0].self_attn.elsewhere["qkv"]
    assert isinstance(rows.parts[0], Packed) and rows.dense().dtype == torch.bfloat16


@pytest.mark.parametrize(("trained", "used"), [("none", "int8"), ("int8", "none"), ("int8", "nf4")])
def test_an_adapter_crosses_between_forms_of_its_base_and_says_so(tmp_path, capfd, trained, used):
    folder = write_folder(tmp_path / "model")
    first = load_model(folder, quantize=trained)
    add_lora(first, 4, 8.0)
    train_some(first)
    save_adapter(first, tmp_path / "adapter")
    load_adapter(load_model(folder, quantize=trained), tmp_path / "adapter")
    assert "trained on this base" not in capfd.readouterr().err
    load_adapter(load_model(folder, quantize=used), tmp_path / "adapter")
    told = {"none": "full"}
    said = f"was trained on this base in {told.get(trained, trained)}; here it is in {told.get(used, used)}"
    assert said in capfd.readouterr().err.replace("\n", " ")
    with pytest.raises(LetheError, match="another base"):
        load_adapter(load_model(write_folder(tmp_path / "other", seed=1), quantize=used), tmp_path / "adapter")
