"""study/folder.py: atomic writes, identity, what is done."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import study.folder as folder
from study.config import parse
from study.errors import LetheError
from study.folder import (
    append_jsonl,
    expand_out,
    in_use,
    is_done,
    newest_study,
    open_study,
    read_json,
    read_jsonl,
    replacing,
    seed_folders,
    write_json,
    write_text,
)
from study.identity import circumstances, differences, identity_of


def test_writes_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": float("nan"), "b": numpy.float32(0.5), "c": [1, "ü"], "d": path, 3: numpy.int64(2)})
    assert read_json(path) == {"a": None, "b": 0.5, "c": [1, "ü"], "d": str(path), "3": 2}
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path)["b"] == 0.5 and [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "no space left"), (errno.EROFS, "--out")])
def test_a_disk_that_refuses_names_path_and_mend(tmp_path, monkeypatch, code, words):
    write_text(tmp_path / "x", "old")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder.os, "replace", refuse)
    with pytest.raises(LetheError, match=words) as error:
        write_text(tmp_path / "x", "new")
    assert str(tmp_path / "x") in str(error.value) and (tmp_path / "x").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(LetheError, match="cannot write"):
        write_text(tmp_path / "f" / "x", "new")
    with pytest.raises(LetheError, match="is a file"):
        open_study(tmp_path / "f", parse([]), {})


def test_damaged_and_missing_json(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n "b')
    with pytest.raises(LetheError, match=r"x\.json:2: not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(LetheError, match="no file"):
        read_json(tmp_path / "y.json")
    assert read_json(tmp_path / "y.json", default=None) is None


def test_jsonl_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"a": 1}, {"a": 2})
    with open(path, "a") as file:
        file.write('{"a": 3, "b"')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    append_jsonl(path, {"a": 4})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 4}] and read_jsonl(tmp_path / "none") == []
    path.write_text('{"a\n{"a": 1}\n')
    with pytest.raises(LetheError, match="m.jsonl:1"):
        read_jsonl(path)


def test_is_done(tmp_path):
    assert not is_done(tmp_path)
    write_json(tmp_path / "run.json", {"status": "running"})
    assert not is_done(tmp_path)
    write_json(tmp_path / "run.json", {"status": "done"})
    assert is_done(tmp_path)


def identity(*argv, model="m1", data=None, seed=None):
    return identity_of(parse(list(argv)), model, data or {"a": "1"}, seed)


def test_identity_ignores_what_only_selects():
    same = identity(
        "--stage",
        "2",
        "--mask",
        "none",
        "--pairs",
        "a:b",
        "--datasets",
        "a",
        "--tasks",
        "a",
        "--out",
        "x",
        "--device",
        "cpu",
        "--log_steps",
        "3",
        "--data_root",
        "z",
        "--evaluation.batch_size",
        "2",
    )
    assert differences(identity(), same) == []
    for argv in (
        ["--threshold", "3"],
        ["--stage1.epochs", "9"],
        ["--lora_rank", "3"],
        ["--seed", "1"],
        ["--max_train", "7"],
    ):
        assert len(differences(identity(), identity(*argv))) == 1
    assert differences(identity(), identity(seed=4)) == ["seed: 0 in the folder, 4 asked"]
    assert differences(identity("--lr", "1e-3"), identity("--lr", "3e-3")) == [
        "learning_rate: 0.001 in the folder, 0.003 asked"
    ]
    assert differences(identity("--epochs", "3"), identity("--epochs", "3", "--stage2.epochs", "4")) == [
        "stage2.epochs: 3.0 in the folder, 4.0 asked"
    ]


def test_opening_continuing_and_refusing(tmp_path):
    path = tmp_path / "s"
    extra = {"template": "plain", "tasks": {"a": 1}}
    study = open_study(path, parse([]), identity(), extra, ["train.py", "--seed", "0"])
    record = read_json(path / "study.json")
    assert record == study.record and record["command"] == "python train.py --seed 0" and record["template"] == "plain"
    assert {"identity", "versions", "commit", "hardware", "started"} <= set(record)
    assert parse(["--config", str(path / "config.yaml")]).training == parse([]).training
    assert study.dir("lora_base/a") == path / "lora_base" / "a"
    again = open_study(path, parse([]), identity(data={"b": "2"}), {"tasks": {"b": 2}})
    assert again.record["tasks"] == {"a": 1, "b": 2}
    assert again.record["identity"]["data"] == {"a": "1", "b": "2"} and len(again.record["continued"]) == 1
    assert again.record["started"] == record["started"]
    before = (path / "study.json").read_bytes()
    with pytest.raises(LetheError) as error:
        open_study(path, parse([]), identity("--lr", "0.5", model="m2", data={"a": "9"}))
    for words in ("model fingerprint: m1", "data of a: 1 in the folder, 9 asked", "learning_rate: ", "--out"):
        assert words in str(error.value)
    assert (path / "study.json").read_bytes() == before
    infinite = tmp_path / "i"
    for _ in range(2):
        open_study(infinite, parse(["--threshold", ".inf"]), identity("--threshold", ".inf"))


def test_out_and_newest(tmp_path):
    assert str(expand_out("out/{model}", "meta-llama/Llama-3.2-1B-Instruct")) == "out/Llama-3.2-1B-Instruct"
    assert expand_out("o/{timestamp}_{model}", "/models/tiny/").name.endswith("_tiny")
    with pytest.raises(LetheError, match="did you mean 'model'"):
        expand_out("o/{modell}", "x")
    with pytest.raises(LetheError, match="no study under"):
        newest_study(tmp_path)
    for k, name in enumerate(("one", "two/deep", "many/seed0", "many/seed10", "many/seed2")):
        write_json(tmp_path / name / "study.json", {})
        os.utime(tmp_path / name / "study.json", (k, k))
    assert newest_study(tmp_path) == tmp_path / "many" and newest_study(tmp_path / "two") == tmp_path / "two" / "deep"
    assert newest_study(tmp_path / "one") == tmp_path / "one"
    assert [p.name for p in seed_folders(tmp_path / "many")] == ["seed0", "seed2", "seed10"]
    assert seed_folders(tmp_path / "one") == [tmp_path / "one"]


def test_circumstances_are_plain_json():
    found = json.loads(json.dumps(circumstances(["train.py", "--out", "a b"])))
    assert (
        found["command"] == "python train.py --out 'a b'" and found["versions"]["torch"] and found["hardware"]["cores"]
    )


def test_how_a_step_is_split_is_no_part_of_a_study():
    def identity(*flags):
        return identity_of(parse(["--model", "m", *flags]), "f", {"a": "1"})

    whole = identity("--batch_size", "64", "--gradient_accumulation", "1")
    assert differences(whole, identity("--batch_size", "8", "--gradient_accumulation", "8")) == []
    halved = identity("--batch_size", "8", "--gradient_accumulation", "4")
    assert differences(whole, halved) == ["examples_per_step: 64 in the folder, 32 asked"]


def test_a_folder_in_use_is_told_and_free_again_after_a_kill(tmp_path):
    with in_use(tmp_path):
        holder = subprocess.run(
            [sys.executable, "-c", f"from study.folder import in_use\nwith in_use({str(tmp_path)!r}): pass"],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert holder.returncode == 1 and f"in use by another command (process {os.getpid()} on" in holder.stderr
    code = f"import os\nfrom study.folder import in_use\nwith in_use({str(tmp_path)!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == -9
    with in_use(tmp_path), in_use(tmp_path / "not there"):  # what cannot be locked is not
        pass
