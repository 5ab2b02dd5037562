"""Streamed layers against the same model held whole: bit for bit, in order, within the memory they were given."""

import contextlib
import importlib.util

import pytest
import torch
from tiny import random_examples, raw_config, train_some, write_folder

from data.batching import collate
from lora import add_lora, merge_adapter
from lora.layers import dropout_keys, lora_layers, lora_parameters, merged
from masking.score import micro_nll
from model import generate, load_model
from model.checkpoint import save_weights
from model.offload import Layout, Slot, Stream, parse_memory, stream_layers
from model.quantized import base_size
from study.errors import LetheError

IDS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(3))
NO_NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
KINDS = ["none", "int8", pytest.param("nf4", marks=NO_NF4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def room_for(model, resident: int) -> int:
    """Bytes with which so many layers stay."""
    layout = Layout.of(model.model.layers[0])
    layers = model.config.num_hidden_layers
    linears = sum(t.nbytes for layer in model.model.layers for t in tensors_of(layer))
    return base_size(model)[1] - linears + min(layers, resident + 2) * layout.size


def tensors_of(layer):
    for block, group in layer.groups():
        rows = block.elsewhere.get(group)
        yield from rows.tensors if rows is not None else [block.joined(group).whole]


def pair(tmp_path, resident=2, quantize="none", device="cpu", layers=6, dropout=0.1, **changes):
    """(the model held whole, the same one streamed), both with the same trained adapter."""
    folder = write_folder(tmp_path / "base", raw_config(num_hidden_layers=layers, **changes))
    whole, streamed = load_model(folder, device=device, quantize=quantize), load_model(folder, quantize=quantize)
    stream_layers(streamed, device, room_for(streamed, resident))
    for model in (whole, streamed):
        add_lora(model, 4, 8.0, dropout, generator=torch.Generator().manual_seed(0))
        train_some(model)
    return whole, streamed


def step(model, count=6):
    """One training pass over ragged examples, with dropout; returns its losses."""
    micro = collate(random_examples(count), list(range(count)), 4096, None)[0].to(model.device)
    keys = dropout_keys(0, 1, torch.zeros_like(micro.input_ids), torch.arange(len(micro.input_ids), device=model.device))
    nll = micro_nll(model.train(), micro, row_keys=keys)
    nll.sum().backward()
    return nll


def same(found, expected) -> bool:
    """Bit for bit; on CUDA, where some sums have no fixed order, nearly."""
    return torch.equal(found, expected) or found.is_cuda and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def gradients(model):
    found = [p.grad for p in lora_parameters(model)]
    assert all(gradient.any() for gradient in found)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_held_whole(tmp_path, kind, resident, device):
    whole, streamed = pair(tmp_path, resident, kind, device, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert len(streamed.stream.order) == 6 - resident and whole.stream is None
    with torch.inference_mode():
        for _ in range(2):
            assert same(streamed.eval()(IDS.to(device)), whole.eval()(IDS.to(device)))
    for _ in range(2):  # the second pass finds the slots as the backward pass left them
        assert same(step(streamed), step(whole))
    assert all(same(mine, other) for mine, other in zip(gradients(streamed), gradients(whole), strict=True))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    assert generate(streamed, prompts, 10, [], batch_size=2) == generate(whole, prompts, 10, [], batch_size=2)


def logged(monkeypatch) -> list[int]:
    """Which layers are copied, in order."""
    copies, copy = [], Stream._copy
    monkeypatch.setattr(Stream, "_copy", lambda self, layer, slot: (copies.append(layer), copy(self, layer, slot)))
    return copies


def test_order_of_copies(tmp_path, monkeypatch):
    """Up through the layers and down again; what still lies in a slot at a turn is not copied again."""
    copies = logged(monkeypatch)
    _, model = pair(tmp_path, resident=1, layers=7)
    order = list(model.stream.order)
    assert order == [1, 2, 3, 4, 5, 6] and not copies
    with torch.no_grad():
        model(IDS)
        assert copies == order
        copies.clear()
        model(IDS)
        assert copies == order
    for expected in (order + order[-3::-1], order[2:] + order[-3::-1]):
        copies.clear()
        step(model)
        assert copies == expected


def test_the_next_layer_sets_out_before_this_one_computes(tmp_path, monkeypatch):
    events, copy, whole = [], Stream._copy, Stream.whole
    monkeypatch.setattr(Stream, "_copy", lambda self, layer, slot: (events.append(("copy", layer)), copy(self, layer, slot)))

    def used(self, layer, group):
        found = whole(self, layer, group)
        events.append(("use", layer))
        return found

    monkeypatch.setattr(Stream, "whole", used)
    _, model = pair(tmp_path, resident=0)
    step(model)
    # Products in the forward pass, in its repetition and in the backward pass; the first product has no gradient to hand on.
    assert [events.count(("use", layer)) for layer in range(6)] == [11, 12, 12, 12, 12, 12]
    copied = [at for at, (what, _) in enumerate(events) if what == "copy"]
    assert len(copied) == 6 + 4 and events[:2] == [("copy", 0), ("copy", 1)]
    for at in copied[1:]:
        other = next(layer for what, layer in events[at:] if what == "use")
        assert abs(other - events[at][1]) == 1  # a neighbour, not the layer that is on its way


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_the_device(tmp_path, kind, resident):
    """What is not in the blocks of host memory is on the device: within the given bytes, and near them."""
    folder = write_folder(tmp_path, raw_config(num_hidden_layers=6))
    model = load_model(folder, quantize=kind)
    size, room = base_size(model), room_for(model, resident)
    said = stream_layers(model, "cpu", room)
    assert f"{6 - resident} of 6 layers" in said and base_size(model) == size
    stream = model.stream
    host = {block.untyped_storage().data_ptr() for block in stream.host.values()}
    slots = [slot.memory for slot in stream.slots]
    assert len(host) == 6 - resident and len(slots) == 2
    layers = model.model.layers
    held = [t for i, layer in enumerate(layers) if i not in stream.order for t in tensors_of(layer)]
    held += [p for p in model.parameters() if p.untyped_storage().data_ptr() not in host] + slots
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert room - 256 * 40 <= sum(storages.values()) <= room


def test_all_fits(tmp_path):
    whole, model = pair(tmp_path, resident=6)
    assert model.stream is None and torch.equal(model.eval()(IDS), whole.eval()(IDS))


@pytest.mark.parametrize("layers", [1, 3])
def test_too_small_names_the_least_that_works(tmp_path, layers):
    folder = write_folder(tmp_path, raw_config(num_hidden_layers=layers))
    with pytest.raises(
        LetheError, match=r"0\.1 MiB is too small.*two layers.*the least is [\d.]+MiB, or less with --quantize nf4"
    ) as error:
        stream_layers(load_model(folder), "cpu", parse_memory("100KB"))
    least = parse_memory(str(error.value).split("the least is ")[1].split(",")[0])
    model = load_model(folder)
    stream_layers(model, "cpu", least)
    torch.testing.assert_close(model(IDS), load_model(folder)(IDS), rtol=0, atol=0)
    with pytest.raises(LetheError, match="too small"):
        stream_layers(load_model(folder), "cpu", int(least - 0.2 * 2**20))


def test_trained_weights_are_refused(tmp_path):
    model = load_model(write_folder(tmp_path)).requires_grad_(True)
    with pytest.raises(LetheError, match="frozen base.*leave out --full, or --max_memory"):
        stream_layers(model, "cpu", 2**30)


def test_an_adapter_put_on_before(tmp_path):
    whole, _ = pair(tmp_path)
    model = load_model(tmp_path / "base")
    add_lora(model, 4, 8.0, 0.1, generator=torch.Generator().manual_seed(0))
    train_some(model)
    stream_layers(model, "cpu", room_for(model, 1))
    assert torch.equal(step(model), step(whole))
    assert all(torch.equal(mine, other) for mine, other in zip(gradients(model), gradients(whole), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_merging_writes_host_memory(tmp_path, device):
    whole, streamed = pair(tmp_path, device=device)
    ids = IDS.to(device)
    expected = whole.eval()(ids)
    with torch.no_grad():
        assert same(streamed.eval()(ids), expected)  # fills the slots with the weights as they were
    for _ in range(2):
        step(streamed)  # the slots hold what the next pass begins with
        with torch.no_grad(), merged(streamed), merged(whole):
            assert same(streamed.eval()(ids), whole(ids)) and not same(streamed(ids), expected)
            streamed.stream.begin()  # and now merged ones, which must not be served afterwards
            streamed.stream.whole(list(streamed.stream.order)[0], "qkv")
    with torch.no_grad():
        assert same(streamed(ids), expected) and len(lora_layers(streamed)) == 42
        merge_adapter(streamed), merge_adapter(whole)
        assert same(streamed(ids), whole(ids)) and streamed.fingerprint == whole.fingerprint
    for name, model in (("whole", whole), ("streamed", streamed)):
        save_weights(model, tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "streamed").read_bytes()


class Queues:
    """Stands in for CUDA's streams and events, and notes what is enqueued where."""

    def __init__(self):
        self.log = []

    def stream(self, name):
        queues = self

        class Queue:
            def wait_event(self, event):
                queues.log.append((name, "wait", event))

            def synchronize(self):
                queues.log.append(("main", "join", None))

        queue = Queue()
        queue.name = name
        return queue

    def event(self):
        queues = self

        class Event:
            def record(self, stream):
                queues.log.append((stream.name, "record", self))

        return Event()


def test_streams_wait_for_each_other(tmp_path, monkeypatch):
    """On CUDA: a copy into a slot waits for the last use of it, and a use for the last copy, whatever the order of passes."""
    _, model = pair(tmp_path, resident=1)
    queues, stream = Queues(), model.stream
    main, stream.side = queues.stream("main"), queues.stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    for slot in stream.slots:
        slot.used, slot.ready = queues.event(), queues.event()
        slot.used.record(main)
    copy_, whole = torch.Tensor.copy_, Stream.whole
    memories = {slot.memory.data_ptr(): slot for slot in stream.slots}
    hosts = {memory.data_ptr() for memory in stream.host.values()}

    def copied(self, source, non_blocking=False):
        if self.dtype == torch.uint8 and self.data_ptr() in memories:
            queues.log.append(("side", "write", memories[self.data_ptr()]))
        elif self.untyped_storage().data_ptr() in hosts:
            queues.log.append(("host", "write", None))
        return copy_(self, source)

    def used(self, layer, group):
        found = whole(self, layer, group)
        queues.log.append(("main", "read", self.current))
        assert self.current.layer == layer
        return found

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(Stream, "whole", used)
    for _ in range(2):
        with torch.no_grad():
            model(IDS)
        step(model)
        with torch.no_grad(), merged(model):
            model(IDS)
    ordered_before = {"main": {}, "side": {}}  # per queue, per event: how far the other queue had come when it was recorded
    recorded, reads, writes, checked, joined = {}, {}, {}, 0, -1
    for at, (queue, what, it) in enumerate(queues.log):
        if what == "record":
            recorded[it] = at
        elif what == "wait":
            ordered_before[queue][it] = recorded[it]
        elif queue == "host":
            assert joined > max(writes.values())
            checked += 1
        elif what == "join":
            joined = at
        elif what == "write":
            assert ordered_before["side"].get(it.used, -1) > reads.get(it, -2)
            writes[it], checked = at, checked + 1
        elif what == "read":
            assert ordered_before["main"][it.ready] > writes[it]
            reads[it], checked = at, checked + 1
    assert checked > 100 and len(writes) == 2 and isinstance(next(iter(writes)), Slot)


def test_amounts_of_memory():
    amounts = {"6GiB": 6 * 2**30, "500MB": 500_000_000, "6": 6 * 2**30, 1.5: 3 * 2**29, "0.5 gib": 2**29, "100 KiB": 102400, "7B": 7}
    assert {text: parse_memory(text) for text in amounts} == amounts
    for wrong in ("", "GiB", "six", "-1", "0", "6 GiBs", "1e3", "nan", "6Gi"):
        with pytest.raises(LetheError, match="no amount of memory; write it as 6GiB"):
            parse_memory(wrong)
