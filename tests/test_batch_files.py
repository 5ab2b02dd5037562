"""A batch's files and results: chunks, names, the choice on a terminal, MODEL_NAME, and the result file against hand-computed values."""

import json
import math
import re

import numpy
import pytest

from study.batch import choose_chunk, chunks, natural, task_names
from study.batch_result import ABOUT, rows, save, scores, table
from study.environment import default_model
from study.errors import LetheError

# ----------------------------------------------------------------------------------------------------------------------
# Chunks


def make(root, *paths: str):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("[]")
    return root


def names_of(found) -> list:
    return [(name, [path.name for path in files]) for name, files in found]


def test_chunks_are_folders_with_data_in_natural_order(tmp_path):
    make(tmp_path, "chunk_10/a.json", "chunk_2/b10.jsonl", "chunk_2/b9.JSON", "chunk_2/notes.txt", "chunk_2/.hidden.json",
         ".cache/x.json", "empty/readme.md", "chunk_1/p.parquet", "chunk_1/deeper/q.json")  # fmt: skip
    assert names_of(chunks(tmp_path)) == [("chunk_1", ["p.parquet"]), ("chunk_2", ["b9.JSON", "b10.jsonl"]), ("chunk_10", ["a.json"])]
    make(tmp_path, "loose.json")  # root's own files are a chunk too, never left out in silence
    assert names_of(chunks(tmp_path))[-1] == (tmp_path.name, ["loose.json"])


def test_a_folder_of_files_and_a_file_are_one_chunk(tmp_path):
    make(tmp_path / "mine", "b.json", "a.jsonl")
    assert names_of(chunks(tmp_path / "mine")) == [("mine", ["a.jsonl", "b.json"])]
    assert chunks(tmp_path / "mine" / "b.json") == [("b", [tmp_path / "mine" / "b.json"])]
    never = lambda _: pytest.fail("asked")  # noqa: E731
    assert choose_chunk(tmp_path / "mine", ask=never, terminal=True)[0] == "mine"
    assert choose_chunk(str(tmp_path / "mine" / "b.json"), ask=never, terminal=False)[0] == "b"


def test_no_chunks(tmp_path):
    make(tmp_path, "datasets/chunk_1/deep/er/a.json", "datasets/notes.txt")
    with pytest.raises(LetheError, match=r"dataset: no such file or folder; datasets lies beside it"):
        chunks(tmp_path / "dataset")
    with pytest.raises(LetheError, match=r"no \.json, \.jsonl, \.parquet file in it or in its sub-folders; .*deep/er has some"):
        chunks(tmp_path / "datasets")
    with pytest.raises(LetheError, match="notes.txt: not a data set"):
        chunks(tmp_path / "datasets" / "notes.txt")


@pytest.fixture
def three(tmp_path):
    return make(tmp_path, "chunk_001/a.json", "chunk_001/b.json", "chunk_002/c.json", "chunk_010/d.json")


@pytest.mark.parametrize(
    ("asked", "name"),
    [("1", "chunk_001"), ("001", "chunk_001"), ("chunk_001", "chunk_001"), ("chunk_1", "chunk_001"), ("CHUNK_001", "chunk_001"),
     ("2", "chunk_002"), ("10", "chunk_010"), ("0010", "chunk_010")],
)  # fmt: skip
def test_one_chunk_by_any_of_its_names(three, asked, name):
    assert choose_chunk(three, asked, terminal=False)[0] == name
    assert choose_chunk(three, None, ask=lambda _: asked, terminal=True)[0] == name


@pytest.mark.parametrize("asked", ["3", "chunk", "", "-1", "chunk_0011"])  # 3: the third chunk is number 10
def test_a_chunk_that_is_not_there(three, asked):
    with pytest.raises(LetheError, match=r"no such chunk in .*; there are 1 \(chunk_001: 2 files, 0.0 MB\), 2 \(chunk_002: .*, 10 \("):
        choose_chunk(three, asked)


def test_without_a_terminal_the_chunks_are_listed(three):
    with pytest.raises(LetheError, match=r"holds 3 chunks; choose one with --chunk: 1 \(chunk_001: 2 files"):
        choose_chunk(three, terminal=False)
    with pytest.raises(LetheError, match="holds 3 chunks"):  # tests have no terminal
        choose_chunk(three)
    many = make(three / "many", *(f"part{i}/a.json" for i in range(30)))
    with pytest.raises(LetheError, match=r"19 \(part19: 1 files, 0.0 MB\) and 10 more$"):
        choose_chunk(many, terminal=False)


def test_on_a_terminal_it_asks_until_it_knows(three, capsys):
    (three / "chunk_002" / "c.json").write_text("x" * 1_250_000)
    answers = iter(["", "nonsense", "7", " 002 "])
    assert choose_chunk(three, ask=lambda prompt: next(answers), terminal=True) == ("chunk_002", [three / "chunk_002" / "c.json"])
    told = capsys.readouterr().out
    assert re.search(r"^ *2 +chunk_002 +1 +1\.2$", told, re.MULTILINE) and re.search(r"^ *1 +chunk_001 +2 +0\.0$", told, re.MULTILINE)
    assert "'nonsense' is none of them" in told and next(answers, None) is None
    for answer in ("q", "Q"):
        with pytest.raises(SystemExit) as left:
            choose_chunk(three, ask=lambda prompt, answer=answer: answer, terminal=True)
        assert left.value.code == 0

    def ended(prompt):
        raise EOFError

    with pytest.raises(SystemExit):
        choose_chunk(three, ask=ended, terminal=True)


def test_names_without_numbers_or_with_the_same_are_told_apart(tmp_path):
    words = make(tmp_path / "words", "law/a.json", "art/a.json")
    assert [choose_chunk(words, asked)[0] for asked in ("1", "2", "law")] == ["art", "law", "law"]
    twice = make(tmp_path / "twice", "a_1/a.json", "b_1/a.json", "c_2/a.json")
    with pytest.raises(LetheError, match=r"there are a_1 \(1 files, 0.0 MB\), b_1 \(1 files, 0.0 MB\), 2 \(c_2: 1 files"):
        choose_chunk(twice, "1")
    assert choose_chunk(twice, "b_1")[0] == "b_1" and choose_chunk(twice, "2")[0] == "c_2"
    both = make(tmp_path / "both", "chunk_1/a.json", "chunk_01/a.json")
    assert [choose_chunk(both, asked)[0] for asked in ("chunk_1", "chunk_01")] == ["chunk_1", "chunk_01"]
    mixed = make(tmp_path / "mixed", "chunk_2/a.json", "loose.json")
    with pytest.raises(LetheError):  # the first in the list is number 2: 1 must not be guessed
        choose_chunk(mixed, "1")


def test_natural_order():
    names = ["b", "chunk_10", "chunk_9", "Chunk_1", "2", "10", "a1b10", "a1b9"]
    assert sorted(names, key=natural) == ["2", "10", "a1b9", "a1b10", "b", "Chunk_1", "chunk_9", "chunk_10"]


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_task_names(tmp_path):
    def of(*files: str) -> list[str]:
        return list(task_names([tmp_path / file for file in files]).values())

    assert of("dolly_chunk_001.json", "MetaMath-40K.jsonl", "v1.2.parquet") == ["dolly_chunk_001", "MetaMath-40K", "v1.2"]
    names = of("数据集.json", "数据.json", "a b.json", "a_b.json", "a  b.json", "..odd.json", "x" * 240 + ".json", "Foo.json", "foo.json",
               "bar.json", "bar.jsonl", "=:.json")  # fmt: skip
    assert len({name.lower() for name in names}) == len(names) == 12
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) and len(name) < 120 for name in names)
    assert names[3].startswith("a_b-")  # as "a b" wants that name too
    alone = {file: of(file)[0] for file in ("数据集.json", "bar.jsonl", "plain.json", "a b.json")}
    more = of(*alone, "other.json", "bar2.json", "another one.json")
    assert more[:4] == list(alone.values()) and alone["bar.jsonl"] == "bar"  # files that are added change no name
    shared = of("bar.json", "bar.jsonl")
    assert "bar" not in shared and of("bar.jsonl", "bar.json") == shared[::-1]  # nor does a name go over to another file


def test_task_names_are_those_that_tasks_may_have(tmp_path):
    from data.folder import find_task

    file = tmp_path / "我的 data.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": "a"}) + "\n" for i in range(5)))
    name = task_names([file])[file]
    assert find_task(f"{name}={file}").name == name


# ----------------------------------------------------------------------------------------------------------------------
# Results


def item(subject: str, correct: bool, nll: float = 1.0, extracted: str | None = "A") -> dict:
    return {"subject": subject, "correct": correct, "gold": "A", "extracted": extracted, "logprobs": [-1.0] * 4, "answer_nll": nll}


def lay(folder, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content))


BEFORE = [item("law", True, 0.5), item("law", False, 2.0), item("law", True, 1.0), item("art", True, 0.5)]
AFTER = [item("law", False, 3.0), item("law", False, 2.0, None), item("law", True, 1.0), item("art", False, 2.0)]
MANIFEST = {"status": "done", "run": {}, "steps": 9, "tokens": 800, "seconds": 3.5, "examples": 40, "final_loss": 1.25, "memory_gib": 2.5,
            "data": {"rows": 41, "bad_rows": 1}, "learning_rate": 2e-4, "template": "plain", "dtype": "float32", "seed": 0}  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """A batch of four files: done, failed, trained but not scored, not begun."""
    root = tmp_path / "out"
    lay(root, "base/eval/mmlu_5shot.jsonl", BEFORE)
    lay(root, "lora_base/good/run.json", MANIFEST)
    lay(root, "lora_base/good/eval/mmlu_5shot.jsonl", AFTER)
    lay(root, "lora_base/good/failed.json", {"reason": "an earlier attempt"})
    lay(root, "lora_base/bad/failed.json", {"reason": "bad.json:3: the file is cut off"})
    lay(root, "lora_base/half/run.json", MANIFEST)
    return root


def runs_of(tmp_path) -> list:
    folder = make(tmp_path / "chunk_001", "good.json", "bad.json", "half.json", "todo.json")
    return [(name, folder / f"{name}.json", f"lora_base/{name}") for name in ("good", "bad", "half", "todo")]


def test_rows(tree, tmp_path):
    good, bad = rows(tree, runs_of(tmp_path), "mmlu_5shot")
    assert {key: good[key] for key in ("dataset", "file_name", "folder_name", "status", "reason", "seconds", "memory_gib")} == {
        "dataset": "good", "file_name": "good.json", "folder_name": "chunk_001", "status": "ok", "reason": None, "seconds": 3.5,
        "memory_gib": 2.5,
    }  # fmt: skip
    assert good["dataset_path"] == str(tmp_path / "chunk_001" / "good.json")
    assert good["training_info"]["training_metrics"] == {
        "train_runtime": 3.5,
        "final_loss": 1.25,
        "steps": 9,
        "tokens": 800,
        "examples": 40,
    }
    assert good["training_info"]["data"] == {"rows": 41, "bad_rows": 1} and good["training_info"]["adapter"] == str(tree / "lora_base/good")
    assert good["evaluation_info"] == {"benchmark": "mmlu_5shot", "questions_by_subject": {"law": 3, "art": 1}}
    before, after = good["results"]["base_model"], good["results"]["finetuned_model"]
    assert (before["overall_accuracy"], before["total_questions"], before["correct_questions"], before["unparsed"]) == (0.75, 4, 3, 0)
    assert (after["overall_accuracy"], after["total_questions"], after["correct_questions"], after["unparsed"]) == (0.25, 4, 1, 1)
    assert before["subject_accuracy"] == {"art": 1.0, "law": 2 / 3} and before["macro_accuracy"] == pytest.approx(5 / 6)
    assert after["macro_accuracy"] == pytest.approx(1 / 6) and (before["answer_nll"], after["answer_nll"]) == (1.0, 2.0)
    # Two right before and wrong after, none the other way: McNemar's p = 2 * 1/4. Wilson's interval of 1 of 4 by its formula.
    assert good["change"]["difference"] == -0.5 and good["change"]["p"] == 0.5
    assert good["change"]["low"] <= -0.5 <= good["change"]["high"]
    z = 1.959963984540054
    middle, half = (0.25 + z * z / 8) / (1 + z * z / 4), z * math.sqrt(0.25 * 0.75 / 4 + z * z / 64) / (1 + z * z / 4)
    assert numpy.allclose((after["accuracy_low"], after["accuracy_high"]), (middle - half, middle + half))
    assert (bad["status"], bad["reason"], bad["results"]["finetuned_model"], bad["change"]) == (
        "failed", "bad.json:3: the file is cut off", None, None,
    )  # fmt: skip
    assert bad["results"]["base_model"] == before and bad["training_info"]["training_metrics"]["train_runtime"] is None


def test_rows_of_one_file_are_those_of_all(tree, tmp_path):
    runs = runs_of(tmp_path)
    assert [row for run in runs for row in rows(tree, [run], "mmlu_5shot")] == rows(tree, runs, "mmlu_5shot")


def test_rows_without_a_base_or_of_other_questions(tree, tmp_path):
    (tree / "base/eval/mmlu_5shot.jsonl").unlink()
    good = rows(tree, runs_of(tmp_path), "mmlu_5shot")[0]
    assert good["results"]["base_model"] is None and good["change"] is None and good["results"]["finetuned_model"]["total_questions"] == 4
    lay(tree, "base/eval/mmlu_5shot.jsonl", BEFORE[:3])
    with pytest.raises(LetheError, match="lora_base/good/eval/mmlu_5shot.jsonl: other questions than those of the base"):
        rows(tree, runs_of(tmp_path), "mmlu_5shot")
    assert rows(tree, runs_of(tmp_path), "mmlu_0shot")[0]["status"] == "failed"  # another column has no scores of it yet


def test_a_run_that_trained_and_could_not_be_scored_has_failed(tree, tmp_path):
    lay(tree, "lora_base/half/failed.json", {"reason": "out of memory"})
    half = rows(tree, runs_of(tmp_path), "mmlu_5shot")[2]
    assert (half["status"], half["reason"], half["seconds"]) == ("failed", "out of memory", 3.5)


def test_scores_of_items_without_nll():
    found = scores([{"subject": "law", "correct": False, "gold": "B", "extracted": None, "answer_nll": None}])
    assert found["answer_nll"] is None and found["unparsed"] == 1 and scores([]) is None


def test_the_result_file_has_the_names_people_read(tree, tmp_path):
    found = rows(tree, runs_of(tmp_path), "mmlu_5shot")
    path = tmp_path / "result" / "batch_mmlu_results_20260131_142500.json"
    header = {"folder_name": "chunk_001", "timestamp": "20260131_142500", "total_files": 4, "max_samples": None, "model": "nano"}
    save(path, header, found)
    told = json.loads(path.read_text())
    assert list(told)[:5] == ["folder_name", "timestamp", "total_files", "processed_files", "max_samples"]
    assert (told["total_files"], told["processed_files"], told["failed_files"], told["model"]) == (4, 2, 1, "nano")
    names = {"dataset", "dataset_path", "training_info", "evaluation_info", "results", "file_name", "folder_name"}
    assert all(names <= set(row) for row in told["results"]) and told["results"] == json.loads(json.dumps(found))
    row = told["results"][0]
    assert f"{row['results']['finetuned_model']['overall_accuracy']:.4f}" == "0.2500"
    assert f"{row['training_info']['training_metrics']['train_runtime']:.2f}" == "3.50"
    fields = set(told) | {key for row in told["results"] for key in (*row, *row["results"], *row["training_info"]["training_metrics"])}
    fields |= set(row["results"]["base_model"])
    assert told["about"] == ABOUT and {word for key in ABOUT for word in key.split(", ")} <= fields  # it explains nothing that is not there
    with pytest.raises(KeyError):
        save(path, {"folder_name": "x"}, found)


def test_table(tree, tmp_path):
    text = table(rows(tree, runs_of(tmp_path), "mmlu_5shot"))
    assert re.search(r"^good +40 +75\.0 +25\.0 +-50\.0 +-\d+\.\d to [-+]\d+\.\d +0\.5000 +1\.000 +2\.000$", text, re.MULTILINE)
    assert text.splitlines()[-1] == "failed     bad: bad.json:3: the file is cut off"
    assert re.search(r"^in part    good: \d+ rows left out$", text, re.MULTILINE)  # of a salvaged file, say
    assert table([]) == "no file is done yet"
    long = rows(tree, [("a" * 80, tmp_path / "a.json", "lora_base/good")], "mmlu_5shot")
    assert max(map(len, table(long).splitlines())) <= 110


# ----------------------------------------------------------------------------------------------------------------------
# The default model


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("MODEL_NAME=/path/to/model\n", "/path/to/model"),
        ("MODEL_NAME=a/b", "a/b"),
        ("  export MODEL_NAME = a/b  \r\n", "a/b"),
        ('MODEL_NAME="/with space/m" # the one\n', "/with space/m"),
        ("MODEL_NAME='a#b'\n", "a#b"),
        ("MODEL_NAME=a#b # said\n", "a#b"),
        ("# MODEL_NAME=x\nOTHER=1\nMODEL_NAME=a\nMODEL_NAME=b\n", "b"),
        ("\ufeffMODEL_NAME=模型\n", "模型"),
        ("MODEL_NAME=\n", None),
        ("MODEL_NAME=''\n", None),
        ("MODEL_NAME= # none\n", None),
        ("MY_MODEL_NAME=a\nMODEL_NAME_2=b\nMODEL_NAME\n", None),
        ("", None),
    ],
)
def test_model_name_of_a_dotenv_file(tmp_path, text, name):
    (tmp_path / ".env").write_text(text, encoding="utf-8", newline="")
    assert default_model({}, tmp_path) == (name and (name, f"MODEL_NAME in {tmp_path / '.env'}"))


def test_model_name_of_the_environment_comes_first(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("MODEL_NAME=file\n")
    assert default_model({"MODEL_NAME": " here "}, tmp_path) == ("here", "MODEL_NAME")
    assert default_model({"MODEL_NAME": ""}, tmp_path)[0] == "file"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_NAME", "there")
    assert default_model() == ("there", "MODEL_NAME")
    monkeypatch.delenv("MODEL_NAME")
    assert default_model() == ("file", "MODEL_NAME in .env")
    (tmp_path / ".env").unlink()
    assert default_model() is None
    (tmp_path / ".env").mkdir()  # some keep a virtual environment there
    assert default_model() is None
