"""study/logging.py: one TensorBoard run per training run, metrics.jsonl, quiet progress, tables."""

import io

import pytest
from matplotlib.figure import Figure

from study.folder import read_jsonl
from study.logging import RunLog, format_table, memory_gib, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_one_run_holds_everything(tmp_path):
    with RunLog(tmp_path, "mask/highest/a_to_b") as log:
        log.scalars({"train/loss": 1.5, "train/none": None}, 1, arm="highest")
        log.text("config", "| a | b |", 0)
        log.histogram("ppl", [1.0, 2.0, 3.0], 1)
        log.histogram("empty", [], 1)
        figure = Figure(figsize=(1, 1))
        figure.add_subplot().plot([1, 2])
        figure.savefig(tmp_path / "heat.png")
        log.picture("heat", tmp_path / "heat.png", 1)
        log.hparams({"lr": 0.1, "arm": "highest", "off": None, "targets": ["q"]}, {"eval/em": 0.5}, 2)
    runs = [p.parent for p in (tmp_path / "tensorboard").rglob("*tfevents*")]
    assert runs == [tmp_path / "tensorboard" / "mask__highest__a_to_b"]
    found = events(runs[0])
    assert set(found.Tags()["scalars"]) == {"train/loss", "eval/em"} and found.Tags()["images"] == ["heat"]
    assert (
        found.Tags()["histograms"] == ["ppl"]
        and any("hparams" in name for name in found.summary_metadata)
        or "_hparams_/session_start_info" in found.summary_metadata
    )
    rows = read_jsonl(tmp_path / "mask/highest/a_to_b/metrics.jsonl")
    assert [(r["step"], r["train/loss"], r["arm"]) for r in rows] == [(1, 1.5, "highest")] and "train/none" not in rows[
        0
    ]


def test_resume_leaves_no_fold_and_restart_starts_clean(tmp_path):
    def train(begin, end, value):
        log = RunLog(tmp_path, "lora_base/a", step=begin)
        for step in range(begin + 1, end + 1):
            log.scalars({"loss": value}, step)
        log.close()

    def seen():
        rows = [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "lora_base/a/metrics.jsonl")]
        board = [(e.step, e.value) for e in events(tmp_path / "tensorboard/lora_base__a").Scalars("loss")]
        assert board == rows
        return rows

    train(0, 5, 1.0)
    train(3, 4, 2.0)
    assert seen() == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    train(0, 2, 3.0)
    assert seen() == [(1, 3.0), (2, 3.0)]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, "lora_base/a", enabled=False)
    log.scalars({"loss": 1.0}, 1)
    log.text("a", "b")
    log.hparams({}, {})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_quiet_off_a_terminal():
    stream = io.StringIO()
    assert list(progress([1, 2, 3], "x", stream=stream)) == [1, 2, 3] and stream.getvalue() == ""
    with progress(10, "train a", "steps", summary=True, start=4, stream=stream) as bar:
        for _ in range(6):
            bar.update(loss=1.23456, tok_s=8100.0)
    bar.close()
    assert stream.getvalue().startswith("train a: 10 steps in ") and stream.getvalue().count("\n") == 1
    assert "loss 1.235 | tok_s 8100" in stream.getvalue()
    screen = Terminal()
    for _ in progress(range(3), "bar", stream=screen):
        pass
    assert "bar" in screen.getvalue()
    off = Terminal()
    assert list(progress([1], enabled=False, summary=True, stream=off)) == [1] and off.getvalue() == ""
    with pytest.raises(KeyError):
        for _ in progress([1], "x", stream=stream):
            raise KeyError


def test_tables_and_memory():
    text = format_table([["a", 1.0, None], ["long name", 12345.6, "50 ±2"]], ["name", "score", "x"])
    assert text.splitlines() == [
        "name       score      x",
        "---------  -----  -----",
        "a          1.000      -",
        "long name  12346  50 ±2",
    ]
    assert format_table([], ["a", "b"]).splitlines() == ["a  b", "-  -"]
    assert 0.01 < memory_gib() < 1000
