"""A batch of data sets, from end to end: fine-tuning on each file of a folder, and general ability before and after."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import adapters, one_line, times

import eval as evaluation
import train
from metrics.statistics import compare_items
from model import load_model
from optim.parallel import Ranks
from study.batch import choose_chunk
from study.batch_result import BatchResult, change, scores
from study.folder import in_use, read_json, read_jsonl, write_json
from study.queue import Workers

SETTINGS = ["--mmlu", "mini_mmlu", "--max_samples", "30", "--epochs", "1", "--batch_size", "8", "--gradient_accumulation", "1",
            "--max_length", "256", "--learning_rate", "1e-2", "--device", "cpu"]  # fmt: skip
PAIRS = [(f"What follows {n}?", f"It is {n + 1}") for n in range(24)]


def lay(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n" if file.suffix == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")


def chat(key: str, question: str, answer: str, role: str = "role", text: str = "content", names=("user", "assistant")) -> dict:
    return {key: [{role: names[0], text: question}, {role: names[1], text: answer}]}


def write_chunk(folder: Path) -> Path:
    """The formats that there are, and files that are cut, broken, and in Chinese."""
    lay(folder / "alpaca.json", [{"input": question, "output": answer} for question, answer in PAIRS])
    lay(folder / "context.json", [{"context_text": "Numbers.", "qa_pairs": [{"question": q, "output": a} for q, a in PAIRS[n : n + 3]]}
                                  for n in range(0, 24, 3)])  # fmt: skip
    lay(folder / "conversations.json", [chat("conversations", *pair, "from", "value", ("human", "gpt")) for pair in PAIRS])
    lay(folder / "messages.jsonl", [chat("messages", *pair) for pair in PAIRS[:20]])
    lay(folder / "数据.json", [chat("messages", f"背景：计数。\n问题：{question}", f"答案是{answer}") for question, answer in PAIRS[:16]])
    whole = (folder / "alpaca.json").read_text()
    (folder / "cut.json").write_text(whole[: len(whole) // 2])
    (folder / "broken.json").write_text("no JSON at all")
    return folder


def batch(model, folder, out, *more) -> list[str]:
    """Of train.py."""
    return ["--datasets_folder", str(folder), "--model", str(model), *SETTINGS, "--out", str(out), *map(str, more)]


def result(out) -> dict:
    (file,) = (Path(out) / "result").glob("batch_mmlu_results_*.json")
    return read_json(file)


def rows_of(out) -> dict[str, dict]:
    return {row["file_name"]: row for row in result(out)["results"]}


def lasting(row: dict) -> dict:
    """A row without what another run of the same command may change: times, memory, and the folder that it went to."""
    row = json.loads(json.dumps(row))
    for key in ("seconds", "memory_gib"):
        del row[key]
    del row["training_info"]["training_metrics"]["train_runtime"], row["training_info"]["adapter"]
    return row


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in another order have other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("study.report.draw_general", lambda scored, column, folder: folder / "none.png")
    monkeypatch.setattr("study.batch_result._save", lambda figure, path: path)


@pytest.fixture(scope="module")
def chunk(tmp_path_factory) -> Path:
    """To be read, not written to."""
    return write_chunk(tmp_path_factory.mktemp("data") / "chunk_001")


@pytest.fixture(scope="module")
def finished(tiny, chunk, tmp_path_factory) -> Path:
    """The whole batch in one go, pictures and all; to be looked at, not written to."""
    out, load = tmp_path_factory.mktemp("batch"), train.load_subject
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_subject", lambda *args: SUBJECTS.append(load(*args)) or SUBJECTS[-1])
        assert train.main(batch(tiny, chunk.parent, out, "--chunk", "1")) == 0  # although two of its files cannot be read
    return out


SUBJECTS = []  # the one that it was made with


@pytest.fixture
def mine(chunk, tmp_path) -> Path:
    """A folder of two files, to be changed."""
    return copied(chunk, tmp_path / "mine", "alpaca.json", "messages.jsonl")


def copied(chunk: Path, folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(chunk / name, folder / name)
    return folder


def made(out) -> dict[str, bytes]:
    """Adapters by the names of their data sets."""
    return {Path(name).name: content for name, content in adapters(out).items()}


# ----------------------------------------------------------------------------------------------------------------------
# What a batch leaves behind


def test_a_row_for_every_file(finished, chunk):
    told = result(finished)
    names = ["alpaca.json", "broken.json", "context.json", "conversations.json", "cut.json", "messages.jsonl", "数据.json"]
    assert [row["file_name"] for row in told["results"]] == names
    assert (told["folder_name"], told["total_files"], told["processed_files"], told["failed_files"], told["max_samples"]) == (
        "chunk_001", 7, 7, 2, 30)  # fmt: skip
    started = "".join(c for c in read_json(finished / "chunk_001/study.json")["started"][:19] if c.isdigit())
    assert told["timestamp"] == f"{started[:8]}_{started[8:]}"
    base = read_jsonl(finished / "chunk_001/base/eval/mini_mmlu.jsonl")
    for row in told["results"]:
        file = chunk / row["file_name"]
        assert row["dataset_path"] == str(file) and row["folder_name"] == "chunk_001"
        assert row["content_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
        before = row["results"]["base_model"]
        assert (before["total_questions"], before["correct_questions"]) == (30, sum(item["correct"] for item in base))
        assert row["evaluation_info"]["benchmark"] == "mini_mmlu" and sum(row["evaluation_info"]["questions_by_subject"].values()) == 30
    failed = {row["file_name"]: row["reason"] for row in told["results"] if row["status"] != "ok"}
    assert set(failed) == {"broken.json", "cut.json"} and str(chunk / "cut.json") in failed["cut.json"]
    assert "the file is cut off at byte" in failed["cut.json"] and "--salvage" in failed["cut.json"]
    assert all("\n" not in reason for reason in failed.values())


def test_what_a_row_says(finished):
    rows, counts = rows_of(finished), {"messages.jsonl": 20, "数据.json": 16}
    for name in ("alpaca.json", "context.json", "conversations.json", "messages.jsonl", "数据.json"):
        row = rows[name]
        metrics = row["training_info"]["training_metrics"]
        assert row["status"] == "ok" and row["reason"] is None and metrics["examples"] == counts.get(name, 24)
        assert metrics["steps"] == -(-counts.get(name, 24) // 8) and metrics["train_runtime"] == row["seconds"] > 0
        assert 3 < metrics["final_loss"] < 10 and metrics["tokens"] > 100 and row["memory_gib"] > 0
        folder = Path(row["training_info"]["adapter"])
        assert folder == finished / "chunk_001/lora_base" / row["dataset"] and (folder / "adapter_model.safetensors").is_file()
        before, after = (read_jsonl(path / "eval/mini_mmlu.jsonl") for path in (finished / "chunk_001/base", folder))
        right = [[float(item["correct"]) for item in items] for items in (before, after)]
        tuned = row["results"]["finetuned_model"]
        assert tuned["overall_accuracy"] == sum(right[1]) / 30 and tuned["correct_questions"] == sum(right[1])
        found = compare_items(*right)
        assert row["change"] == {key: found[key] for key in ("difference", "low", "high", "p")}
    for name in ("alpaca.json", "context.json"):  # the same questions and answers, in two formats
        assert rows[name]["training_info"]["data"]["bad_rows"] == 0
    assert rows["alpaca.json"]["dataset"] == "alpaca" and rows["数据.json"]["dataset"].startswith("data-")
    assert lasting(rows["alpaca.json"])["results"] == lasting(rows["conversations.json"])["results"]


def test_no_tensor_is_written_into_it(finished):
    """The project that this comes from wrote its adapters' numbers there."""
    lengths = []

    def walk(value) -> None:
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            lengths.append(len(part) if isinstance(part, list) else 0)
            walk(part)

    walk(result(finished))
    assert max(lengths) <= 30
    (file,) = (finished / "result").glob("*.json")
    assert file.stat().st_size < 40_000


def test_pictures_and_the_general_table(finished):
    (picture,) = (finished / "result").glob("*.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    assert (finished / "chunk_001/general_mini_mmlu.png").stat().st_size > 5000
    rows = read_json(finished / "chunk_001/general_results.json")["results"]
    assert {row["run"] for row in rows} == {"base", *(f"lora_base/{rows_of(finished)[name]['dataset']}" for name in rows_of(finished)
                                                       if rows_of(finished)[name]["status"] == "ok")}  # fmt: skip
    assert not [path for path in finished.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_a_data_set_is_trained_on_as_it_would_be_alone(finished, tiny, mine, tmp_path, no_pictures):
    """What was trained before it, or failed, leaves no trace."""
    assert train.main(batch(tiny, mine / "messages.jsonl", tmp_path / "alone")) == 0
    assert read_json(tmp_path / "alone/messages/study.json")["batch"].keys() == {"messages"}
    assert made(tmp_path / "alone") == {"messages": made(finished)["messages"]}
    alone, among = rows_of(tmp_path / "alone")["messages.jsonl"], rows_of(finished)["messages.jsonl"]
    assert alone["results"] == among["results"] and alone["change"] == among["change"]
    assert result(tmp_path / "alone")["folder_name"] == "messages" and result(tmp_path / "alone")["total_files"] == 1


def as_loaded(model, tiny) -> bool:
    """The same bits as in its file, as many parameters, and no adapter."""
    own, expected = dict(model.named_parameters()), dict(load_model(tiny, torch.float32, "cpu").named_parameters())
    return model.adapter is None and own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in expected)


def test_the_base_is_what_it_was(finished, tiny):
    """After five data sets that were trained on, and two that failed between them."""
    (subject,) = SUBJECTS
    assert as_loaded(subject.model, tiny) and not subject.model.altered


def test_all_weights(tiny, mine, tmp_path, monkeypatch, no_pictures):
    """Each data set begins from the base, which is read again."""
    subjects, load = [], train.load_subject
    monkeypatch.setattr(train, "load_subject", lambda *args: subjects.append(load(*args)) or subjects[-1])
    shutil.copyfile(mine / "alpaca.json", mine / "same.json")
    (mine / "messages.jsonl").unlink()
    assert train.main(batch(tiny, mine, tmp_path / "out", "--full", "--learning_rate", "1e-3")) == 0
    one, other = rows_of(tmp_path / "out").values()
    assert one["training_info"]["training_metrics"]["final_loss"] == other["training_info"]["training_metrics"]["final_loss"]
    weights = [(Path(row["training_info"]["adapter"]) / "model.safetensors").read_bytes() for row in (one, other)]
    assert weights[0] == weights[1] and one["results"] == other["results"] and as_loaded(subjects[0].model, tiny)


# ----------------------------------------------------------------------------------------------------------------------
# The same command again, and other files


def test_again_trains_nothing_and_tries_again_what_failed(finished, tiny, chunk, tmp_path, capsys, no_pictures):
    out = shutil.copytree(finished, tmp_path / "copy")
    before = times(out, "adapter_model.safetensors") | times(out, "*.jsonl")
    failed = times(out, "failed.json")
    assert train.main(batch(tiny, chunk.parent, out, "--chunk", "chunk_001")) == 0
    told = capsys.readouterr().out
    assert times(out, "adapter_model.safetensors") | times(out, "*.jsonl") == before
    assert {name for name, when in times(out, "failed.json").items() if when != failed[name]} == set(failed) and len(failed) == 2
    assert "7 runs, 5 of them done before" in told and told.count("\nfailed     cut: ") == 2 and " steps" not in told
    assert [lasting(row) | {"training_info": 0} for row in result(out)["results"]] == [
        lasting(row) | {"training_info": 0} for row in result(finished)["results"]]  # fmt: skip


def test_the_table_is_shown_where_nothing_can_be_written(finished, tiny, chunk, tmp_path, capsys, no_pictures):
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "result")
    (out / "result").write_text("in the way")
    assert train.main(["--skip_training", *batch(tiny, chunk, out)]) == 2
    told = capsys.readouterr()
    assert "mini_mmlu before and after training on each data set" in told.out and "\nconversations   " in told.out
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and str(out / "result") in told.err


def test_salvage_trains_on_what_was_cut(finished, tiny, chunk, tmp_path, no_pictures):
    out = shutil.copytree(finished, tmp_path / "copy")
    before = times(out, "adapter_model.safetensors")
    assert train.main(batch(tiny, chunk.parent, out, "--chunk", "1", "--salvage")) == 0
    row = rows_of(out)["cut.json"]
    assert row["status"] == "ok" and 8 <= row["training_info"]["training_metrics"]["examples"] < 24
    assert row["training_info"]["data"]["bad_rows"] == 1 and not (out / "chunk_001/lora_base/cut/failed.json").exists()
    assert rows_of(out)["broken.json"]["status"] == "failed" and result(out)["failed_files"] == 1
    assert set(times(out, "adapter_model.safetensors")) - set(before) == {"chunk_001/lora_base/cut/adapter_model.safetensors"}
    assert before.items() <= times(out, "adapter_model.safetensors").items()


def test_changed_and_added_files(tiny, mine, tmp_path, capsys, no_pictures):
    out, content = tmp_path / "out", (mine / "alpaca.json").read_bytes()
    assert train.main(batch(tiny, mine, out)) == 0
    first, rows = made(out), rows_of(out)
    (mine / "alpaca.json").write_bytes(content.replace(b"It is", b"It was"))
    lay(mine / "more.jsonl", [{"prompt": question, "answer": answer} for question, answer in PAIRS])
    capsys.readouterr()
    assert train.main(batch(tiny, mine, out)) == 0
    told = capsys.readouterr().out
    assert "changed    alpaca: its file is another one than before" in told and "3 runs, 1 of them done before" in told
    after, now = made(out), rows_of(out)
    assert {name for name in after if after[name] != first.get(name)} == {"alpaca", "more"}
    assert list(now) == ["alpaca.json", "messages.jsonl", "more.jsonl"] and now["messages.jsonl"] == rows["messages.jsonl"]
    assert now["alpaca.json"]["content_hash"] == hashlib.sha256(content.replace(b"It is", b"It was")).hexdigest()
    losses = [found["alpaca.json"]["training_info"]["training_metrics"]["final_loss"] for found in (now, rows)]
    assert losses[0] != losses[1] and result(out)["total_files"] == 3

    (mine / "alpaca.json").write_bytes(content)  # and back
    (mine / "messages.jsonl").unlink()
    assert train.main(batch(tiny, mine, out)) == 0 and made(out)["alpaca"] == first["alpaca"]
    assert list(rows_of(out)) == ["alpaca.json", "more.jsonl"] and lasting(rows_of(out)["alpaca.json"]) == lasting(rows["alpaca.json"])
    (mine / "alpaca.json").write_text("[")  # it was good before: what was made of it is not shown for what it is now
    assert train.main(batch(tiny, mine, out)) == 0
    assert {name: row["status"] for name, row in rows_of(out).items()} == {"alpaca.json": "failed", "more.jsonl": "ok"}
    assert "alpaca" not in made(out)


def test_other_settings_are_refused_and_cost_nothing(tiny, mine, tmp_path, capsys, no_pictures):
    """Also where a file has changed, whose run would be removed."""
    out = tmp_path / "out"
    assert train.main(batch(tiny, mine, out)) == 0
    before = adapters(out)
    lay(mine / "alpaca.json", [{"input": question, "output": "no"} for question, _ in PAIRS])
    capsys.readouterr()
    for more, named in ((["--lora_rank", "4"], "lora.rank: 16 in the folder, 4 asked"), (["--max_samples", "20"], "data of mini_mmlu")):
        assert train.main(batch(tiny, mine, out, *more)) == 2
        told = capsys.readouterr()
        assert named in told.err and "changed" not in told.out and adapters(out) == before
    with in_use(out / "mine"):  # another command is at it
        assert train.main(batch(tiny, mine, out)) == 2
        assert "is in use by another command" in capsys.readouterr().err and adapters(out) == before
    assert train.main(batch(tiny, mine, out)) == 0
    assert "changed    alpaca" in capsys.readouterr().out and adapters(out) != before


def test_several_seeds(tiny, mine, tmp_path, no_pictures):
    assert train.main(batch(tiny, mine / "messages.jsonl", tmp_path / "out", "--seeds", "0,1")) == 0
    assert set(adapters(tmp_path / "out")) == {f"messages/seed{n}/lora_base/messages" for n in (0, 1)}
    files = sorted((tmp_path / "out/result").glob("batch_mmlu_results_*.json"))  # beside the chunk's folder, as of one seed
    assert [file.stem[-6:] for file in files] == ["_seed0", "_seed1"]
    for n, file in enumerate(files):
        told = read_json(file)
        assert [row["training_info"]["seed"] for row in told["results"]] == [n]
        assert len(told["timestamp"]) == len("20260131_142500")


def test_scores_that_are_no_verdicts():
    """F1 of a generated answer, say: a little is not all."""
    items = [{"subject": "a", "correct": value} for value in (0.25, 0.75, 0.5, 0.0)]
    found = scores(items)
    assert found["overall_accuracy"] == found["macro_accuracy"] == found["subject_accuracy"]["a"] == 0.375
    assert found["correct_questions"] == 1.5 and found["accuracy_low"] < 0.375 < found["accuracy_high"]
    assert change(items, [{**item, "correct": item["correct"] / 2} for item in items])["difference"] == pytest.approx(-0.1875)


def test_chunks_that_were_begun_at_once_have_a_file_each(tmp_path):
    for name in ("chunk_001", "chunk_002"):
        write_json(tmp_path / name / "study.json", {"started": "2026-01-31T14:25:00+0000"})
    files = [BatchResult(tmp_path / name, name, [], "mini_mmlu", None).path for name in ("chunk_001", "chunk_002")]
    assert files[0] != files[1] and all(file.name.startswith("batch_mmlu_results_20260131_142500") for file in files)
    write_json(tmp_path / "long/study.json", {"started": "2026-01-31T14:25:00+0000"})
    BatchResult(tmp_path / "long", "x" * 250, [], "mini_mmlu", None).save()  # a name that a file system takes
    (tmp_path / "one/seed3").mkdir(parents=True)
    write_json(tmp_path / "one/seed3/study.json", {"started": "2026-01-31T14:25:00+0000"})
    assert BatchResult(tmp_path / "one/seed3", "one", [], "mini_mmlu", None).path.parent == tmp_path / "result"


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_one_that_runs_out_of_memory_is_left_behind(tiny, mine, finished, tmp_path, monkeypatch, no_pictures):
    whole = train.train_run

    def starved(bench, run, label):
        if run.task == "alpaca":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMuch more text")
        whole(bench, run, label)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_run", starved)
        assert train.main(batch(tiny, mine, tmp_path / "out")) == 0
    row = rows_of(tmp_path / "out")["alpaca.json"]
    assert (row["status"], row["reason"]) == ("failed", "CUDA out of memory. Tried to allocate 9 GiB.")
    assert "Traceback" in read_json(tmp_path / "out/mine/lora_base/alpaca/failed.json")["traceback"]
    assert row["results"]["finetuned_model"] is None and row["change"] is None
    assert made(tmp_path / "out") == {"messages": made(finished)["messages"]}
    assert train.main(batch(tiny, mine, tmp_path / "out")) == 0
    assert made(tmp_path / "out") == {name: made(finished)[name] for name in ("alpaca", "messages")}


def test_one_that_cannot_be_scored_is_scored_next_time(tiny, mine, tmp_path, monkeypatch, no_pictures):
    score, out = evaluation.score_benchmark, tmp_path / "out"

    def starved(subject, column, **more):
        if subject.model.adapter is not None:
            raise RuntimeError("out of memory")
        return score(subject, column, **more)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_benchmark", starved)
        assert train.main(batch(tiny, mine / "alpaca.json", out)) == 0
    row = rows_of(out)["alpaca.json"]
    assert row["status"] == "failed" and row["training_info"]["training_metrics"]["steps"] == 3
    before = times(out, "adapter_model.safetensors")
    assert train.main(batch(tiny, mine / "alpaca.json", out)) == 0
    assert times(out, "adapter_model.safetensors") == before and rows_of(out)["alpaca.json"]["status"] == "ok"


def test_ctrl_c_ends_the_batch_and_not_the_data_set(tiny, chunk, mine, finished, tmp_path, monkeypatch, capsys, no_pictures):
    shutil.copyfile(chunk / "cut.json", mine / "cut.json")
    whole_fit, begun = train.fit, []

    def stopped_in_the_second(*args, **kwargs):
        begun.append(1)
        for step in whole_fit(*args, **kwargs):
            yield step
            if len(begun) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stopped_in_the_second)
        assert train.main(batch(tiny, mine, tmp_path / "out")) == 130 and "the same command goes on" in capsys.readouterr().err
    assert set(made(tmp_path / "out")) == {"alpaca"} and [row["status"] for row in result(tmp_path / "out")["results"]] == ["ok", "failed"]
    assert not (tmp_path / "out/mine/lora_base/messages/failed.json").exists()
    kept = times(tmp_path / "out", "adapter_model.safetensors")
    assert train.main(batch(tiny, mine, tmp_path / "out")) == 0
    assert made(tmp_path / "out")["messages"] == made(finished)["messages"]
    assert kept.items() <= times(tmp_path / "out", "adapter_model.safetensors").items()


def test_a_full_disk_ends_the_batch(tiny, mine, tmp_path, monkeypatch, capsys, no_pictures):
    """It is no fault of the data set, and the next one would be trained in vain."""

    def full(*_, **__):  # what safetensors raises: no OSError
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.checkpoint.save_file", full)
    told = one_line(batch(tiny, mine, tmp_path / "out"), capsys)
    assert "no space left" in told and "same command again" in told
    assert not (tmp_path / "out/mine/lora_base/messages").exists() and not list((tmp_path / "out").rglob("failed.json"))


def test_a_name_that_is_no_unicode(tiny, mine, tmp_path, no_pictures):
    """Of archives made elsewhere."""
    try:
        shutil.copyfile(mine / "alpaca.json", os.fsencode(mine) + b"/caf\xe9.json")
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    for name in ("alpaca.json", "messages.jsonl"):
        (mine / name).unlink()
    assert train.main(batch(tiny, mine, tmp_path / "out")) == 0
    assert [row["status"] for row in result(tmp_path / "out")["results"]] == ["ok"]


def test_data_without_an_answer_that_fits(tiny, tmp_path, no_pictures):
    lay(tmp_path / "mine/long.json", [{"input": "Say it.", "output": "word " * 400}] * 3)
    lay(tmp_path / "mine/single.json", [{"input": "Say it.", "output": "word"}])
    assert train.main(batch(tiny, tmp_path / "mine", tmp_path / "out")) == 0
    rows = rows_of(tmp_path / "out")
    assert rows["long.json"]["status"] == "failed" and "no answer fits into --max_length 256" in rows["long.json"]["reason"]
    assert rows["single.json"]["status"] == "ok" and rows["single.json"]["training_info"]["training_metrics"]["examples"] == 1


def test_the_study_must_not_lie_among_the_data(tiny, mine, chunk, tmp_path, capsys):
    """Its own files would be data sets next time."""
    for folder, out in ((mine, mine.parent), (mine, mine), (chunk.parent, chunk.parent)):
        assert "choose another --out" in one_line(batch(tiny, folder, out), capsys)
    assert sorted(path.name for path in mine.iterdir()) == ["alpaca.json", "messages.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


@pytest.fixture
def two_chunks(chunk, tmp_path) -> Path:
    copied(chunk, tmp_path / "root/chunk_001", "alpaca.json")
    copied(chunk, tmp_path / "root/chunk_002", "messages.jsonl")
    return tmp_path / "root"


def test_forms_of_a_chunk(tiny, two_chunks, finished, tmp_path, capsys, no_pictures):
    told = one_line(batch(tiny, two_chunks, tmp_path / "out"), capsys)  # no terminal here
    assert "holds 2 chunks; choose one with --chunk: 1 (chunk_001: 1 files" in told and "2 (chunk_002" in told
    assert "no such chunk" in one_line(batch(tiny, two_chunks, tmp_path / "out", "--chunk", "3"), capsys)
    assert not (tmp_path / "out").exists()
    for asked in ("002", "2", "chunk_002", "CHUNK_2"):
        assert train.main(batch(tiny, two_chunks, tmp_path / "out", "--chunk", asked)) == 0
        assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "result"] == ["chunk_002"]
    assert made(tmp_path / "out") == {"messages": made(finished)["messages"]}


def test_a_chunk_is_chosen_on_a_terminal(tiny, two_chunks, tmp_path, monkeypatch, capsys, no_pictures):
    answers = iter(["7", "2"])
    monkeypatch.setattr(train, "choose_chunk", lambda root, asked, terminal: choose_chunk(root, asked, lambda _: next(answers), True))
    assert train.main(batch(tiny, two_chunks, tmp_path / "out")) == 0
    told = capsys.readouterr().out
    assert "'7' is none of them" in told and (tmp_path / "out/chunk_002").is_dir() and not (tmp_path / "out/chunk_001").exists()


@pytest.mark.parametrize(
    "more, named",
    [
        (["--datasets", "gsm8k"], "takes its data sets from the folder; leave out --datasets"),
        (["--pairs", "a:b"], "has one stage; leave out --pairs"),
        (["--stage", "2"], "has one stage; leave out --stage 2"),
        (["--mask", "highest"], "masks nothing; leave out --mask"),
        (["--inspect", "3"], "leave out --inspect"),
        (["--compare_optimizers"], "has one optimizer; leave out --compare_optimizers"),
        (["--comparison", "{adamw: [1.0e-3]}"], "has one optimizer; leave out --comparison"),
        (["--tasks", "mini_mmlu"], "leave out --tasks"),
        (["--max_test", "5"], "leave out --max_test"),
        (["--resume_stage1", "somewhere"], "leave out --resume_stage1"),
        (["--eval_steps", "5"], "leave out --eval_steps"),
        (["--strict", "--salvage"], "give one of them"),
        (["--chunk", "nothing"], "no such chunk"),
        (["--datasets_folder", "/no/such/folder"], "/no/such/folder: no such file or folder"),
        (["--mmlu_by", "generate"], "mini_mmlu is scored by the likelihood"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_that_make_no_sense_with_it(tiny, mine, tmp_path, capsys, more, named):
    assert named in one_line(batch(tiny, mine, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_what_a_batch_needs(tiny, mine, tmp_path, capsys):
    alone = ["--model", tiny, "--out", str(tmp_path / "out")]
    assert "give --mmlu FOLDER (or mini_mmlu), or --harness" in one_line(["--datasets_folder", str(mine), *alone], capsys)
    assert "--chunk chooses among the sub-folders of --datasets_folder" in one_line(["--chunk", "1", *alone], capsys)
    assert "needs --datasets_folder" in one_line(["--study", "batch", *alone], capsys)
    shutil.copyfile(mine / "alpaca.json", mine / "mini_mmlu.json")
    assert "mini_mmlu is both a data set and a column" in one_line(batch(tiny, mine, tmp_path / "out"), capsys)
    (tmp_path / "empty").mkdir()
    assert "no .json, .jsonl, .parquet file in it" in one_line(batch(tiny, tmp_path / "empty", tmp_path / "out"), capsys)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert "rows.csv: not a data set" in one_line(batch(tiny, tmp_path / "rows.csv", tmp_path / "out"), capsys)


def test_a_file_of_settings_may_select_tasks(tiny, mine, tmp_path, no_pictures):
    """Those of a study with tasks are good for a batch too: what selects among tasks has no meaning there."""
    (tmp_path / "mine.yaml").write_text("datasets: gsm8k\nmask: none\nevaluation: {tasks: gsm8k}\n")
    assert train.main(batch(tiny, mine / "alpaca.json", tmp_path / "out", "--config", tmp_path / "mine.yaml")) == 0
    assert [row["status"] for row in result(tmp_path / "out")["results"]] == ["ok"]


def test_eval_of_a_batch_says_who_goes_on_with_it(finished, capsys):
    assert evaluation.main(["--root", str(finished / "chunk_001")]) == 2
    assert "holds a batch of data sets; python train.py --datasets_folder" in capsys.readouterr().err


def test_the_model_of_the_environment(tiny, mine, tmp_path, monkeypatch, capsys, no_pictures):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    unnamed = [word for word in batch(tiny, mine / "alpaca.json", "x") if word not in ("--model", tiny, "--out", "x")]
    (tmp_path / "work/.env").write_text(f'# models\nOTHER=1\nexport MODEL_NAME="{tiny}"  # the small one\n')
    assert train.main(unnamed) == 0
    told = capsys.readouterr().out
    assert f"model      {tiny} (from MODEL_NAME in .env; --model wins over it)" in told
    assert (tmp_path / "work/out/tiny_batch/alpaca/lora_base/alpaca/adapter_model.safetensors").is_file()
    monkeypatch.setenv("MODEL_NAME", "another/model")
    assert train.main([*unnamed, "--print_config"]) == 0
    assert "another/model (from MODEL_NAME; --model wins" in capsys.readouterr().out
    assert train.main([*unnamed, "--print_config", "--model", tiny]) == 0
    told = capsys.readouterr().out
    assert f"name: {tiny}" in told and "MODEL_NAME" not in told
    assert train.main(["--print_config"]) == 0 and "name: nano" in capsys.readouterr().out  # of a batch alone
    assert "another/model" in one_line(unnamed, capsys)


def test_processes_that_would_share_each_step_are_refused(tiny, mine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "gather", lambda config: (Ranks(rank=0, world=2), Workers()))
    assert "add --shard runs" in one_line(batch(tiny, mine, tmp_path / "out"), capsys)
