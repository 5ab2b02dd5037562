"""model/snapshot.py and study/signals.py: checkpoints that are whole or absent, state that comes back bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model import snapshot
from model.snapshot import (
    checkpoint_name,
    newest_checkpoint,
    pack,
    prune,
    read_checkpoint,
    restore_rng,
    rng_state,
    unpack,
    write_checkpoint,
)
from study.errors import LetheError
from study.signals import Interrupted, stop_on_signal

STATE = {"step": 2, "loss": 0.1 + 0.2, "kept": [1.0, 1 / 3], "none": None, "nested": {"text": "ü"}}


def write(parent: Path, step: int, tensors: dict | None = None, state: dict | None = None) -> Path:
    folder = parent / checkpoint_name(1, 1, step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights of step %d" % step)
    write_checkpoint(folder, tensors or {"0.exp_avg.0": torch.arange(6.0).view(2, 3)}, {**(state or STATE), "step": step})
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_what_is_written_comes_back(tmp_path):
    assert checkpoint_name(1, 2, 500) == "stage1_checkpoint_epoch_2_step_500"
    wanted = {"a": torch.randn(3, 4), "b": torch.tensor(7, dtype=torch.int64), "c": torch.randn(5).to(torch.bfloat16), "d": torch.zeros(0)}
    folder = write(tmp_path, 2, wanted)
    tensors, state = read_checkpoint(str(folder))
    assert state == STATE and set(tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "training_state.safetensors", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_model.safetensors", "training_state.safetensors"}
    assert manifest["files"]["adapter_model.safetensors"]["bytes"] == len(b"weights of step 2")
    assert newest_checkpoint(tmp_path) == folder


def test_odd_states_come_back(tmp_path):
    """A loss that was never read is NaN; keys that are numbers become text, as JSON has it, and are no damage."""
    write_checkpoint(tmp_path / "x", {}, {"loss": float("nan"), 3: 1, 20: 2, 1e-7: 3})
    tensors, state = read_checkpoint(tmp_path / "x")
    assert tensors == {} and state["loss"] != state["loss"] and state["3"] == 1 and state["20"] == 2


def test_the_newest_counts_by_its_step(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None and newest_checkpoint(tmp_path) is None
    folders = {step: write(tmp_path, step) for step in (1000, 90, 200)}
    assert newest_checkpoint(tmp_path) == folders[1000]


def test_an_unfinished_one_does_not_exist(tmp_path, capsys):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path) == first and capsys.readouterr().err == ""
    with pytest.raises(LetheError, match="was never finished.*give another"):
        read_checkpoint(second)
    with pytest.raises(LetheError, match="is not there"):
        read_checkpoint(tmp_path / "nowhere")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lie(file: Path) -> None:
    """JSON as before, but for the step that the run would go on from."""
    manifest = json.loads(file.read_text())
    manifest["state"]["step"] += 1
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "harm, name, told",
    [
        (cut, "adapter_model.safetensors", "has 16 bytes instead of 17"),
        (flip, "adapter_model.safetensors", "is not as it was written"),
        (cut, "training_state.safetensors", "bytes instead of"),
        (flip, "training_state.safetensors", "is not as it was written"),
        (Path.unlink, "training_state.safetensors", "No such file"),
        (lie, "manifest.json", "is not as it was written"),
        (lambda file: file.write_text(file.read_text()[:40]), "manifest.json", "not valid JSON"),
        (lambda file: file.write_text("[]"), "manifest.json", "is not as it was written"),
        (lambda file: file.write_text('{"state": {}}'), "manifest.json", "is not as it was written"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "manifest.json", "cannot be read"),
        (lambda file: file.write_bytes(b""), "manifest.json", "not valid JSON"),
    ],
)
def test_a_damaged_newest_one_is_told_once_and_passed_over(tmp_path, capsys, harm, name, told):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    harm(second / name)
    with pytest.raises(LetheError, match="is damaged") as error:
        read_checkpoint(second)
    assert str(second / name) in str(error.value) and told in str(error.value) and "earlier one" in str(error.value)
    assert newest_checkpoint(tmp_path) == first
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"checkpoint {second} is damaged" in err and told in err and f"going on from {first.name}" in err
    assert newest_checkpoint(tmp_path) == first and capsys.readouterr().err == ""
    assert read_checkpoint(first)[1]["step"] == 1
    write(tmp_path, 2)  # the run has come there again
    assert newest_checkpoint(tmp_path) == second and read_checkpoint(second)[1]["step"] == 2


def test_every_byte_counts(tmp_path):
    """Whichever byte of a checkpoint turns, it no longer counts as undamaged."""
    folder = write(tmp_path, 1)
    generator = random.Random(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for at in {0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(25))}:
            file.write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
            with pytest.raises(LetheError):
                read_checkpoint(folder)
        file.write_bytes(content)
    assert read_checkpoint(folder)[1]["step"] == 1


def test_all_damaged_is_the_beginning(tmp_path, capsys):
    for step in (1, 2):
        cut(write(tmp_path, step) / "adapter_model.safetensors")
    assert newest_checkpoint(tmp_path) is None
    assert capsys.readouterr().err.count("going on from the beginning") == 2


def test_foreign_things_are_let_be(tmp_path):
    """Files beside the checkpoints, folders of other names, a file that someone put into a checkpoint."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    (tmp_path / "stage1_checkpoint_epoch_1_step_9").write_text("a file of such a name")
    folder = write(tmp_path, 3)
    (folder / "README").write_text("mine too")
    assert newest_checkpoint(tmp_path) == folder
    prune(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "best", "stage1_checkpoint_epoch_1_step_9"}


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    folder = tmp_path / checkpoint_name(1, 1, 5)
    folder.mkdir()
    (folder / ".training_state.safetensors.4711.tmp").write_bytes(b"half")
    write(tmp_path, 5)
    assert not list(folder.glob(".*")) and read_checkpoint(folder)


def test_prune_keeps_the_latest_whole_ones(tmp_path):
    folders = {step: write(tmp_path, step) for step in (10, 2, 30, 4)}
    (folders[30] / "manifest.json").unlink()
    prune(tmp_path, 5)
    assert set(tmp_path.iterdir()) == {folders[2], folders[4], folders[10]}
    prune(tmp_path, 2)
    assert set(tmp_path.iterdir()) == {folders[4], folders[10]}
    prune(tmp_path / "none", 2)


def test_a_kill_while_pruning_leaves_no_false_checkpoint(tmp_path, monkeypatch):
    folders = {step: write(tmp_path, step) for step in (1, 2)}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert not (folders[1] / "manifest.json").exists() and newest_checkpoint(tmp_path) == folders[2]


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_kill_while_saving_leaves_the_one_before(tmp_path, monkeypatch, stop_at):
    """Stopped at each file operation of a save in turn: what is found afterwards is the old checkpoint or the whole new one."""
    import study.folder as folder

    first, count = write(tmp_path, 1), [0]

    def counted(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == stop_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "chmod"):
            patch.setattr(folder.os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    found = newest_checkpoint(tmp_path)
    assert read_checkpoint(found)[1]["step"] == (2 if stop_at == 8 else 1), "the eighth is the sync of the folder, after the rename"
    assert found == (tmp_path / checkpoint_name(1, 1, 2) if stop_at == 8 else first)
    write(tmp_path, 2)
    assert read_checkpoint(newest_checkpoint(tmp_path))[1]["step"] == 2


def as_child(work) -> int:
    """Runs work() in a forked child -> its exit status (-n: ended by signal n). Limits and kills stay in the child."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", [100, 1000, 5000])
def test_a_full_disk_keeps_the_one_before(tmp_path, limit):
    """A limit on the size of files stands for the disk: the weights, the tensors or the manifest no longer fit."""
    first = write(tmp_path, 1)

    def work() -> int:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        many = {f"a.very.long.name.to.fill.the.manifest.{i}": "x" * 50 for i in range(200)} if limit == 5000 else STATE
        try:
            write(tmp_path, 2, {"0.exp_avg.0": torch.zeros(4 if limit == 5000 else 1000)}, many)
        except LetheError as error:
            return 7 if "File too large" in str(error) and str(tmp_path) in str(error) else 8
        return 0

    assert as_child(work) == 7
    assert newest_checkpoint(tmp_path) == first and not list(tmp_path.rglob(".*.tmp"))
    assert read_checkpoint(write(tmp_path, 2))[1]["step"] == 2  # there is room again


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    first = write(small_disk, 1)
    with pytest.raises(LetheError, match="no space left .*free some, then run the same command again"):
        write(small_disk, 2, {"0.exp_avg.0": torch.zeros(20_000)})
    assert newest_checkpoint(small_disk) == first


@pytest.fixture
def open_folder():
    """A folder that other users can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_read_only_folder(open_folder):
    tmp_path = open_folder
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    flip(second / "adapter_model.safetensors")
    third = tmp_path / checkpoint_name(1, 1, 3)
    third.mkdir()
    for folder in (third, second, tmp_path):
        folder.chmod(0o555)

    def work() -> int:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            write_checkpoint(third, {}, STATE)
        except LetheError as error:
            if not ("cannot write" in str(error) and "--out" in str(error)):
                return 1
        else:
            return 2
        if newest_checkpoint(tmp_path) != first:  # the damaged one is told and passed over though it cannot be set aside
            return 3
        try:
            prune(tmp_path, 0)
        except LetheError as error:
            return 7 if "cannot write" in str(error) else 4
        return 5

    try:
        assert as_child(work) == 7
    finally:
        for folder in (tmp_path, second, third):
            folder.chmod(0o755)


# ----------------------------------------------------------------------------------------------------------------------
# State


class Momentum(torch.optim.Optimizer):
    """A second kind of optimizer: one buffer, and a counter that is a plain number."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                state = self.state[p]
                state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                state["count"] = state.get("count", 0) + 1
                p.sub_(state["momentum_buffer"], alpha=group["lr"] / state["count"])


def make(lr: float = 0.01):
    """Two optimizers over five parameters of which one never sees a gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 4, 2), (5,), (4, 4), (2, 6), (7,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:3], "lr": 2 * lr}]
    return parameters, [torch.optim.AdamW(groups, lr=lr, weight_decay=0.1), Momentum(parameters[3:], lr)]


def advance(parameters, optimizers, begin: int, end: int) -> None:
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * parameter.detach()
        for optimizer in optimizers:
            optimizer.step()


def through_disk(folder: Path, tensors: dict, state: dict) -> tuple[dict, dict]:
    write_checkpoint(folder, tensors, state)
    return read_checkpoint(folder)


def test_optimizers_go_on_with_the_same_bits(tmp_path):
    whole, optimizers = make()
    advance(whole, optimizers, 0, 9)
    parameters, optimizers = make()
    advance(parameters, optimizers, 0, 4)
    tensors, state = pack(optimizers)
    assert {"0.exp_avg.0", "0.step.2", "1.momentum_buffer.0"} <= set(tensors) and state["optimizers"][1]["plain"] == {"count.0": 4}
    tensors, state = through_disk(tmp_path, tensors, state)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    values = [parameter.detach().clone() for parameter in parameters]

    fresh, others = make()
    for parameter, value in zip(fresh, values, strict=True):
        parameter.data.copy_(value)
    unpack(others, tensors, state)
    again, state_again = pack(others)
    assert state_again == state and set(again) == set(tensors)
    assert all(torch.equal(again[name], before[name]) and again[name].dtype == before[name].dtype for name in before)
    advance(fresh, others, 4, 9)
    assert all(torch.equal(a, b) for a, b in zip(fresh, whole, strict=True))
    assert all(torch.equal(tensors[name], before[name]) for name in before), "what was read is not trained upon"


def test_settings_come_from_the_configuration_and_not_from_the_checkpoint():
    parameters, optimizers = make(lr=0.01)
    advance(parameters, optimizers, 0, 2)
    kept = pack(optimizers)
    _, others = make(lr=0.5)
    unpack(others, *kept)
    assert [group["lr"] for optimizer in others for group in optimizer.param_groups] == [0.5, 1.0, 0.5]


def test_an_optimizer_that_has_not_stepped(tmp_path):
    _, optimizers = make()
    tensors, state = through_disk(tmp_path, *pack(optimizers))
    unpack(make()[1], tensors, state)
    assert tensors == {}


def test_views_are_stored_apart(tmp_path):
    """State that lies in one block of memory, as stacked matrices may have it."""
    parameters, optimizers = make()
    block = torch.randn(2, 2, 6)
    optimizers[1].state[parameters[3]]["momentum_buffer"] = block[0]
    optimizers[1].state[parameters[3]]["other"] = block[1].t().contiguous().t()
    tensors, state = through_disk(tmp_path, *pack(optimizers))
    assert torch.equal(tensors["1.momentum_buffer.0"], block[0]) and torch.equal(tensors["1.other.0"], block[1])


@pytest.mark.parametrize("harm", ["shape", "count", "kind", "number", "index"])
def test_a_misfit_is_refused(harm):
    parameters, optimizers = make()
    advance(parameters, optimizers, 0, 1)
    tensors, state = pack(optimizers)
    others = make()[1]
    if harm == "shape":
        tensors["0.exp_avg.1"], tensors["0.exp_avg.2"] = tensors["0.exp_avg.2"], tensors["0.exp_avg.1"]
    if harm == "count":
        others[1] = Momentum(parameters[2:])
    if harm == "kind":
        others.reverse()
    if harm == "number":
        others.pop()
    if harm == "index":
        tensors["0.exp_avg.17"] = tensors["0.exp_avg.1"]
    told = {"shape": r"0\.exp_avg\.\d has shape", "index": r"0\.exp_avg\.17 has shape", "count": "Momentum on 2 parameters, this run",
            "kind": "AdamW on 3 parameters and Momentum", "number": "this run has AdamW on 3 parameters;"}[harm]  # fmt: skip
    with pytest.raises(LetheError, match=told):
        unpack(others, tensors, state)


def test_the_loss_scale_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, growth_interval=3)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    for value in (1.0, float("inf"), 1.0):  # halves once, then grows by one towards the next doubling
        optimizer.zero_grad()
        scaler.scale((parameter * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    tensors, state = through_disk(tmp_path, *pack([optimizer], scaler))
    other = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    fresh = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    unpack([fresh], tensors, state, other)
    assert other.get_scale() == scaler.get_scale() == 2.0**10 and other.state_dict() == scaler.state_dict()
    assert other.state_dict()["_growth_tracker"] == 1
    off = torch.amp.GradScaler("cpu", enabled=False)
    unpack([fresh], tensors, state, off)
    with pytest.raises(LetheError, match="float16"):
        unpack([fresh], *pack([optimizer], off), other)


def test_generators_come_back(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.randn(), torch.rand(3).tolist(), torch.randn(5).tolist()]

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    draw()  # an odd number of normal draws: half a pair is in store
    tensors, state = through_disk(tmp_path, *rng_state())
    assert state["python"][1] is not None and state["numpy"][2] == 1
    wanted = draw()
    torch.manual_seed(6), np.random.seed(6), random.seed(6)
    restore_rng(tensors, state)
    assert draw() == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_the_loop_decides(number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    done = []
    with pytest.raises(Interrupted), stop_on_signal() as stop:
        for step in range(5):
            if step == 2:
                os.kill(os.getpid(), number)
            done.append(step)
            if stop.asked:
                raise Interrupted
    assert done == [0, 1, 2] and issubclass(Interrupted, KeyboardInterrupt)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_one_interrupts_at_once(monkeypatch):
    monkeypatch.setattr("study.signals.GRACE", 0.05)
    with pytest.raises(KeyboardInterrupt) as error, stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a parent process
        assert stop.asked
        time.sleep(0.06)
        os.kill(os.getpid(), signal.SIGTERM)  # asks once more
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("not interrupted")
    assert error.type is KeyboardInterrupt


def test_no_signal_is_lost():
    """A block that has not looked, since the run was done: what is asked holds for what comes after it."""
    with pytest.raises(Interrupted), stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    with stop_on_signal() as stop:
        pass
    assert not stop.asked


def test_ignored_signals_and_other_threads():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.asked and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def work():
        with stop_on_signal() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_word_to_the_user_is_said_in_the_middle_of_a_line():
    code = (
        "import os, signal, sys; from study.signals import stop_on_signal\n"
        "with stop_on_signal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    assert stop.asked\n    os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "saved; Ctrl-C once more stops at once" in done.stderr
