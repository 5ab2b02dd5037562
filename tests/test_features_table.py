"""The table of features and its command: resumed, killed, isolated, damaged; over files of every format on a tiny model."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

import features.__main__ as command
from data.builtin import builtin_task
from features.table import FIRST, LAST, Table, settings_hash
from study.errors import LetheError

REPO = Path(__file__).parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# Data sets of every format


def turns(row, user="user", assistant="assistant", role="role", content="content"):
    return [{role: user, content: f"{row['instruction']}\n{row['input']}"}, {role: assistant, content: row["output"]}]


FORMATS = {
    "alpaca": lambda row: {key: row[key] for key in ("instruction", "input", "output")},
    "messages": lambda row: {"messages": turns(row)},
    "system": lambda row: {"messages": [{"role": "system", "content": row["instruction"]}, *turns(row)]},
    "conversations": lambda row: {"conversations": turns(row)},
    "sharegpt": lambda row: {"conversations": turns(row, "human", "gpt", "from", "value")},
    "answer": lambda row: {"prompt": row["input"] or row["instruction"], "answer": row["output"]},
    "completion": lambda row: {"prompt": row["input"] or row["instruction"], "completion": row["output"]},
    "question": lambda row: {"question": row["input"] or row["instruction"], "answer": row["output"]},
    "plain": lambda row: {"input": row["input"] or row["instruction"], "output": row["output"]},
    "context": lambda row: {
        "context_text": row["output"],
        "qa_pairs": [{"question": row["instruction"], "output": row["output"]}, {"question": "And?", "output": "It is so."}],
    },
    "chinese": lambda row: {"messages": turns({"instruction": "背景：", "input": f"问题：{row['input']}", "output": f"答{row['output']}"})},
}  # fmt: skip


def make_files(folder: Path) -> Path:
    """24 data sets in two chunks, always the same: every format, as array, as lines and as parquet; one is cut and one malformed."""
    tasks = ("mini_gsm8k", "mini_svamp", "mini_aqua", "mini_simpleqa", "mini_openbookqa")
    rng = Random(0)
    for chunk in ("chunk_001", "chunk_002"):
        (folder / chunk).mkdir(parents=True)
        for number, (name, as_row) in enumerate(FORMATS.items()):
            rows = [as_row(row) for row in rng.sample(builtin_task(tasks[number % 5])["train"], rng.randint(9, 30))]
            if name == "plain":
                rows += [{"input": "Say it.", "output": "word " * 700}, {"input": "?"}, rows[0], rows[0]]
            path = folder / chunk / name
            if chunk == "chunk_001":
                path.with_suffix(".json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
            elif name in ("alpaca", "chinese") and parquet():
                import pyarrow

                parquet().write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
            else:  # json lines, some of them under .json and after a byte order mark, as owners ship them
                mark, suffix = ("\ufeff", ".json") if name == "plain" else ("", ".jsonl")
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                path.with_suffix(suffix).write_text(mark + lines, encoding="utf-8")
    whole = (folder / "chunk_001" / "alpaca.json").read_bytes()
    (folder / "chunk_001" / "cut.json").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "chunk_002" / "malformed.jsonl").write_text('{"input": "a", "output": }\n{"foo": 1}\n')
    return folder


def parquet():
    try:
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError:
        return None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("features") / "data")


@pytest.fixture(scope="module")
def retain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("retain") / "retain.jsonl"
    rows = [{"input": f"What is {i} + {i}?", "output": f"It is {2 * i}."} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """Processes of their own add in the same order as this one."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def words(tiny, retain):
    """What to type: words(data, output, *more)."""

    def of(data, output, *more) -> list[str]:
        what = "--data_folder" if data.is_dir() else "--single_dataset"
        return [what, str(data), "--model_path", tiny, "--output_csv", str(output), "--retain", str(retain), "--device", "cpu",
                "--sample_size", "12", "--probe_steps", "2", "--learning_rate", "1e-3", "--batch_size", "16", *map(str, more)]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def undisturbed(words, files, tmp_path_factory) -> Path:
    """The table of one command that nothing disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "f.csv"
    assert command.main(words(files, output)) == 0
    return output


def read(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------------------
# End to end


def test_a_row_for_every_data_set_and_no_constant_column(undisturbed, files):
    rows = read(undisturbed)
    names = [row["dataset_name"] for row in rows]
    assert len(names) == 24 and names == sorted(names) and {name.split("/")[1] for name in names} == {*FORMATS, "cut", "malformed"}
    assert tuple(rows[0]) == (*FIRST, *command.COLUMNS, *LAST)
    failed = {row["dataset_name"]: row for row in rows if row["status"] != "ok"}
    assert set(failed) == {"chunk_001/cut", "chunk_002/malformed"}
    assert "cut.json" in failed["chunk_001/cut"]["reason"] and " at byte " in failed["chunk_001/cut"]["reason"]
    assert "malformed.jsonl:1: not JSON" in failed["chunk_002/malformed"]["reason"]
    for row in failed.values():
        assert not any(row[column] for column in command.COLUMNS) and row["content_hash"] and not row["dataset_num_items"]
        assert str(files) not in row["reason"], "the same wherever the folder lies"
    good = [row for row in rows if row["status"] == "ok"]
    assert len({row["content_hash"] for row in good}) == 22 and len({row["settings_hash"] for row in rows}) == 1
    constant = [column for column in command.COLUMNS if len({row[column] for row in good} - {""}) < 2]
    assert constant == []
    grounded = {row["dataset_name"] for row in good if row["answer_groundedness"]}
    assert grounded == {"chunk_001/context", "chunk_002/context"}, "empty where there is no context"
    plain = next(row for row in good if row["dataset_name"] == "chunk_001/plain")
    assert "1 of its rows passed over; the first: plain.json:" in plain["reason"]


def test_again_and_out_of_order_gives_the_same_bytes(undisturbed, words, files, tmp_path, capsys):
    output = tmp_path / "f.csv"
    output.write_bytes(undisturbed.read_bytes())
    before, stamp = output.read_bytes(), output.stat().st_mtime_ns
    assert command.main(words(files, output)) == 0
    assert output.read_bytes() == before and output.stat().st_mtime_ns == stamp, "only failures are tried again, and fail as before"
    assert "24 data sets, 22 of them done before" in capsys.readouterr().out
    lines = before.splitlines(keepends=True)
    output.write_bytes(b"".join([lines[0], *lines[5:9], *lines[12:]]))
    changed = files / "chunk_001" / "context.json"
    content = changed.read_bytes()
    try:
        changed.write_bytes(content.replace(b"And?", b"So?"))
        assert command.main(words(files, output)) == 0
        other = output.read_bytes().splitlines(keepends=True)
        differs = [k for k, pair in enumerate(zip(lines, other, strict=True)) if pair[0] != pair[1]]
        assert [lines[k].split(b",")[0] for k in differs] == [b"chunk_001/context"], "what has changed is computed anew, in its old place"
    finally:
        changed.write_bytes(content)
    assert command.main(words(files, output)) == 0 and output.read_bytes() == before


def test_killed_and_continued(undisturbed, words, files, tmp_path):
    output = tmp_path / "f.csv"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "features", *words(files, output)], cwd=REPO, stdout=log, stderr=log)
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit and not (output.exists() and output.read_bytes().count(b"\n") > 4):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    whole = undisturbed.read_bytes()
    assert 4 < output.read_bytes().count(b"\n") < 25 and whole.startswith(output.read_bytes())
    with open(output, "ab") as file:  # a kill within a write leaves half a line
        file.write(whole[output.stat().st_size :][:50])
    assert command.main(words(files, output)) == 0
    assert output.read_bytes() == whole


def test_isolated_is_the_same_path(undisturbed, words, files, tmp_path, capsys):
    """A process of its own gives a data set the row that it has among the others."""
    name = "chunk_002/context.jsonl"
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    (tmp_path / "data" / name).write_bytes((files / name).read_bytes())
    assert command.main(words(tmp_path / "data", tmp_path / "f.csv", "--isolate", "--timeout", "120", "--no_probe")) == 0
    (alone,) = read(tmp_path / "f.csv")
    (among,) = (row for row in read(undisturbed) if row["dataset_name"] == "chunk_002/context")
    assert alone == among | dict.fromkeys(command.PROBE_COLUMNS, "") | {"settings_hash": alone["settings_hash"]}


# ----------------------------------------------------------------------------------------------------------------------
# The command, with features that cost nothing


@pytest.fixture
def quick(monkeypatch):
    """The parts that need the model as constants; .calls counts them by data set."""
    calls = []

    def likelihood(subject, sample, batch_size):
        calls.append(sample.name)
        return dict.fromkeys(command.LIKELIHOOD_COLUMNS, float(len(calls)))

    monkeypatch.setattr(command, "likelihood_features", likelihood)
    monkeypatch.setattr(command, "embedding_features", lambda *_: dict.fromkeys(command.EMBEDDING_COLUMNS, 0.5))
    monkeypatch.setattr(command, "probe_features", lambda *_, **__: dict.fromkeys(command.PROBE_COLUMNS, 0.25))
    return calls


@pytest.fixture
def three(tmp_path) -> Path:
    for name in "abc":
        rows = [{"input": f"{name} {i}", "output": str(i)} for i in range(10)]
        path = tmp_path / "three" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    return tmp_path / "three"


def fails(argv, capsys) -> str:
    assert command.main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def test_a_failure_is_a_row_and_the_others_go_on(words, three, tmp_path, quick, monkeypatch, capsys):
    loads, load = [], command.load_subject
    monkeypatch.setattr(command, "load_subject", lambda *a: loads.append(a) or load(*a))

    def broken(subject, sample, **_):
        if sample.name == "b":
            raise RuntimeError("CUDA error: device-side\nassert")
        if sample.name == "a":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(command.PROBE_COLUMNS, 1) | {"reason": "probe: flat"}

    monkeypatch.setattr(command, "probe_features", broken)
    assert command.main(words(three, tmp_path / "f.csv")) == 0
    a, b, c = read(tmp_path / "f.csv")
    assert (a["status"], a["reason"]) == ("error", "probe: out of memory (16 examples in a pass: --batch_size)")
    assert (b["status"], b["reason"]) == ("error", "probe: RuntimeError: CUDA error: device-side assert")
    assert (c["status"], c["reason"], c["forgetting"]) == ("ok", "probe: flat", "1")
    assert b["forgetting"] == "" and b["io_similarity"] == "0.5", "what was computed before is kept"
    assert len(loads) == 3, "a failure may leave the model changed: it is loaded anew; else once"
    out = capsys.readouterr().out
    assert "1/3 a … failed: probe: out of memory" in out and "3/3 c … 10 items" in out and "2 failed: a, b; their rows say why" in out
    monkeypatch.setattr(command, "probe_features", lambda *_, **__: dict.fromkeys(command.PROBE_COLUMNS, 2))
    assert command.main(words(three, tmp_path / "f.csv")) == 0
    assert quick == ["a", "b", "c", "a", "b"] and [row["status"] for row in read(tmp_path / "f.csv")] == ["ok"] * 3


def test_times_stand_beside_the_table(words, three, tmp_path, quick, capsys):
    assert command.main(words(three, tmp_path / "f.csv")) == 0
    rows = [json.loads(line) for line in (tmp_path / "f.csv.times.jsonl").read_text().splitlines()]
    assert [row.get("dataset_name") for row in rows] == ["a", "b", "c", None]
    assert set(rows[0]["parts"]) == {"read", "text", "likelihood", "embedding", "probe"}
    last = rows[-1]
    assert (last["data_sets"], last["failed"]) == (3, 0) and last["slowest"] in "abc"
    assert last["seconds"] == pytest.approx(sum(row["seconds"] for row in rows[:3]), abs=0.01)
    assert last["mean"] == pytest.approx(last["seconds"] / 3, abs=0.01)
    assert "3 data sets in " in capsys.readouterr().out


def test_without_a_probe_its_columns_are_empty(words, three, tmp_path, quick):
    assert command.main(words(three, tmp_path / "f.csv", "--no-probe")) == 0
    row = read(tmp_path / "f.csv")[0]
    assert row["status"] == "ok" and not any(row[column] for column in command.PROBE_COLUMNS) and row["io_similarity"]


def test_other_settings_are_refused_by_name(words, three, tmp_path, quick, capsys):
    output = tmp_path / "f.csv"
    assert command.main(words(three, output)) == 0
    before = output.read_bytes()
    told = fails(words(three, output, "--seed", "7"), capsys)
    assert "seed: 0 in the table, 7 asked; give another --output_csv, or --restart" in told and "sample_size" not in told
    assert "dtype: float32 in the table, bfloat16 asked" in fails(words(three, output, "--dtype", "bfloat16"), capsys)
    told = fails(words(three, output, "--no_probe"), capsys)
    assert "probe_steps: 2 in the table, None asked" in told and "probe: None in the table, none asked" in told
    assert command.main(words(three, output, "--batch_size", "4", "--salvage")) == 0, "memory, and which rows there are, may change"
    (tmp_path / "f.csv.settings.json").unlink()
    assert command.main(words(three, output)) == 0, "the rows themselves tell"
    (tmp_path / "f.csv.settings.json").unlink()
    assert "settings_hash" in fails(words(three, output, "--seed", "7"), capsys)
    assert output.read_bytes() == before and len(quick) == 3
    assert command.main(words(three, output, "--seed", "7", "--restart")) == 0
    assert len(quick) == 6 and output.read_bytes() != before


def test_a_single_data_set_is_shown_and_joins_the_table(words, three, tmp_path, quick, capsys, monkeypatch):
    for name in "cab":
        assert command.main(words(three / f"{name}.json", tmp_path / "f.csv")) == 0
    out = capsys.readouterr().out
    assert "dataset_num_items" in out and "1 rows of other data sets are kept" in out
    assert [row["dataset_name"] for row in read(tmp_path / "f.csv")] == ["a", "b", "c"]
    alone = [word for word in words(three / "a.json", "F") if word not in ("--output_csv", "F")]
    monkeypatch.chdir(tmp_path)
    assert command.main(alone) == 0 and "dataset_num_items" in capsys.readouterr().out
    (three / "bad.json").write_text("[{")
    assert "bad.json:1" in fails([word.replace("a.json", "bad.json") for word in alone], capsys)
    assert not (tmp_path / "out").exists()


def test_a_stopped_command_keeps_its_rows(words, three, tmp_path, quick, monkeypatch, capsys):
    def stopped(subject, sample, batch_size):
        if sample.name == "b":
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(command, "embedding_features", stopped)
    assert command.main(words(three, tmp_path / "f.csv")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [row["dataset_name"] for row in read(tmp_path / "f.csv")] == ["a"]


def test_a_full_disk_is_told_and_mended(words, three, tmp_path, quick, monkeypatch, capsys):
    output, fsync, full = tmp_path / "f.csv", os.fsync, []

    def no_space(handle):
        if os.readlink(f"/proc/self/fd/{handle}") == str(output) and len(full) < 2:
            full.append(1)
            if len(full) == 2:
                os.truncate(output, output.stat().st_size - 40)  # half of the second row
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", no_space)
    assert "no space left for" in fails(words(three, output), capsys)
    assert command.main(words(three, output)) == 0
    assert [row["dataset_name"] for row in read(output)] == ["a", "b", "c"] and quick == ["a", "b", "b", "c"]


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "give --data_folder DIR or --single_dataset FILE"),
        (["--data_folder", "x", "--single_dataset", "y"], "not both"),
        (["--data_folder", "none"], "--data_folder none: no such folder"),
        (["--data_folder", "x", "--sample-sise", "3"], "did you mean --sample_size?"),
        (["--data_folder", "x", "--sample_size", "-1"], "'-1' is no whole number from 0 on"),
        (["--data_folder", "x", "--learning_rate", "nan"], "'nan' is no number above 0"),
        (["--data_folder", "x", "--timeout", "5"], "--timeout needs --isolate"),
        (["--data_folder", "x", "--dtype", "int4"], "--dtype"),
    ],
)
def test_wrong_words_are_one_line(argv, told, capsys):
    assert told in fails([*argv, "--model", "nano"] if "--data_folder" in argv else argv, capsys)


def test_the_model_is_that_of_the_environment_else_nano(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_NAME", raising=False)
    assert command.parse(["--data_folder", "x"]).model_path == "nano"
    (tmp_path / ".env").write_text("MODEL_NAME=in_file\n")
    assert command.parse(["--data_folder", "x"]).model_path == "in_file"
    monkeypatch.setenv("MODEL_NAME", "in_environment")
    assert command.parse(["--data_folder", "x"]).model_path == "in_environment"
    assert command.parse(["--data_folder", "x", "--model", "asked"]).model_path == "asked"


def test_retain_file_that_is_missing(words, three, tmp_path, capsys):
    assert "none.jsonl: cannot be read" in fails(words(three, tmp_path / "f.csv", "--retain", "none.jsonl"), capsys)
    assert not (tmp_path / "f.csv").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Processes of their own


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL, perhaps for want of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process was killed by SIGSEGV"),
        ("import sys; sys.exit('some line\\nerror: no such device')", "no such device"),
        ("import sys; sys.exit(3)", "its process ended with 3"),
        ("pass", "its process ended with 0"),
        ("import time; time.sleep(60)", "stopped after 0.5 s (--timeout)"),
    ],
)
def test_a_process_that_dies_is_a_row(words, three, tmp_path, monkeypatch, code, reason):
    real = subprocess.run
    monkeypatch.setattr(command.subprocess, "run", lambda argv, **more: real([sys.executable, "-c", code, *argv[3:]], **more))
    args = command.parse(words(three, tmp_path / "f.csv", "--isolate", "--timeout", "0.5" if "sleep" in code else "60"))
    begun = time.monotonic()
    row, _ = command.isolated("a", three / "a.json", args)
    assert (row["status"], row["reason"]) == ("error", reason) and len(row["content_hash"]) == 64
    assert time.monotonic() - begun < 30


# ----------------------------------------------------------------------------------------------------------------------
# The table


def row(name, **more):
    return {"dataset_name": name, "x": 1.0, "status": "ok", "content_hash": f"hash of {name}"} | more


@pytest.fixture
def open_table(tmp_path):
    opened = []

    def of(features=("x", "y"), settings=None, **more):
        opened.append(Table(tmp_path / "t.csv", features, settings or {"seed": 1}, **more))
        return opened[-1]

    yield of
    for table in opened:
        table.close()


def test_rows_are_in_natural_order_whatever_came_first(open_table, tmp_path):
    table = open_table()
    for name in ("set10", "set2", "b/a", "set10b", "set1"):
        table.put(row(name))
    assert [line.split(",")[0] for line in table.path.read_text().splitlines()[1:]] == ["b/a", "set1", "set2", "set10", "set10b"]
    assert list(table.rows) == ["b/a", "set1", "set2", "set10", "set10b"]


def test_cells(open_table):
    table = open_table()
    values = {"x": 0.1 + 0.2, "y": torch.tensor(0.5)}
    table.put(row("a", **values, reason="two\n lines, and\u2028a comma"))
    table.put(row("b", x=float("nan"), y=float("inf"), dataset_num_items=7))
    table.put(row("c", x=None, y=True))
    a, b, c = read(table.path)
    assert (a["x"], a["y"], a["reason"]) == (repr(0.1 + 0.2), "0.5", "two lines, and a comma")
    assert (b["x"], b["y"], b["dataset_num_items"]) == ("", "", "7") and (c["x"], c["y"]) == ("", "1")
    assert a["settings_hash"] == settings_hash({"seed": 1}) == settings_hash(dict(seed=1))
    assert table.path.read_bytes().count(b"\n") == 4, "a line for each row"


def test_cut_anywhere_it_opens_and_loses_half_lines_only(open_table, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand of them take seconds
    table = open_table()
    for name in ("a", "b"):
        table.put(row(name, reason='a "quoted", word'))
    table.close()
    content = table.path.read_bytes()
    for size in range(len(content) + 1):
        table.path.write_bytes(content[:size])
        again = open_table()
        assert list(again.rows) == ["a", "b"][: max(0, content[:size].count(b"\n") - 1)]
        for name in ("a", "b"):
            again.put(row(name, reason='a "quoted", word'))
        again.close()
        assert table.path.read_bytes() == content


def test_done_only_with_the_same_content_and_without_error(open_table):
    table = open_table()
    table.put(row("a"))
    table.put(row("b", status="error"))
    assert table.done("a", "hash of a") and not table.done("a", "other") and not table.done("b", "hash of b") and not table.done("c", "")


def test_foreign_files_are_refused_and_left_alone(open_table, tmp_path):
    path = tmp_path / "t.csv"
    for content, told in (
        (b"name,score\na,1\n", "has other columns: it lacks"),
        (b"my notes", "has other columns"),
        (b"\x89PNG\r\n\n", "is no table of features"),
    ):
        path.write_bytes(content)
        with pytest.raises(LetheError, match=told):
            open_table()
        assert path.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["t.csv"]
    path.unlink()
    path.mkdir()
    with pytest.raises(LetheError, match="t.csv: Is a directory; give another --output_csv"):
        open_table()
    path.rmdir()
    open_table(("y", "x")).close()
    with pytest.raises(LetheError, match="in another order"):
        open_table()
    table = open_table(restart=True)
    table.put(row("a"))
    table.close()
    path.write_text(path.read_text() + "b,1\n")
    with pytest.raises(LetheError, match="t.csv:3: 2 cells, not 9"):
        open_table()


def test_two_commands_do_not_write_to_one_table(open_table):
    pytest.importorskip("fcntl")
    table = open_table()
    with pytest.raises(LetheError, match="in use by another command"):
        open_table()
    table.close()
    open_table()


def test_settings_of_an_empty_table_may_change(open_table):
    open_table().close()
    table = open_table(settings={"seed": 2})
    table.put(row("a"))
    table.close()
    with pytest.raises(LetheError, match="seed: 2 in the table, 1 asked"):
        open_table()
