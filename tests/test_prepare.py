"""data.prepare: the traps of the raw files on made-up rows, the hub against a local server, real files if given."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMIT

from data.prepare import main, prepare
from data.tasks import aqua_cot, aqua_rat, gsm8k, openbookqa, simpleQA, svamp
from metrics import extract_answer
from study.errors import LetheError

REPO = Path(__file__).parent.parent


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(out, task, part):
    return json.loads((Path(out) / task / f"{task}_{part}.json").read_text(encoding="utf-8"))


def gsm_rows(start, count):
    return [
        {"question": f"How many is {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i}"}
        for i in range(start, start + count)
    ]


def test_gsm8k_official_split(tmp_path):
    leak = {"question": "how many is  101 ?", "answer": "#### 101"}
    bad = {"question": "No mark?", "answer": "It is 3."}
    lines(tmp_path / "gsm8k/train.jsonl", [*gsm_rows(0, 60), leak, *gsm_rows(0, 1), bad])
    lines(tmp_path / "gsm8k/test.jsonl", gsm_rows(100, 5))
    report = prepare("gsm8k", str(tmp_path), str(tmp_path / "out"))  # a parent of the task's folder
    train, test, replay = (read(tmp_path / "out", "gsm8k", part) for part in ("remaining_train", "test", "train_1p"))
    assert (len(train), len(test), len(replay)) == (60, 5, 1) and replay[0] in train
    assert train[0] == {
        "instruction": "Solve step by step and give the final answer (format like #### 42).",
        "input": "How many is 0?",
        "output": "It is <<0=0>>0.\n#### 0",
    }
    assert [place.rsplit(":", 1)[1] for place in (*report.contaminated, *report.duplicates)] == ["61", "62"]
    text = str(report)
    assert "train: 63 rows, 1 dropped" in text and "1 x the solution has no '#### number' (train.jsonl:63)" in text
    assert not list((tmp_path / "out").rglob("*tmp*"))


def test_seed_split_takes_a_tenth_of_train(tmp_path):
    lines(tmp_path / "train.jsonl", gsm_rows(0, 50))
    lines(tmp_path / "test.jsonl", gsm_rows(100, 5))
    prepare("gsm8k", str(tmp_path), str(tmp_path / "a"), split="seed")
    prepare("gsm8k", str(tmp_path), str(tmp_path / "b"), split="seed")
    test, train = read(tmp_path / "a", "gsm8k", "test"), read(tmp_path / "a", "gsm8k", "remaining_train")
    assert (len(test), len(train)) == (5, 45) and test == read(tmp_path / "b", "gsm8k", "test")
    assert not {row["input"] for row in test} & {row["input"] for row in train}


def svamp_row(n, **changes):
    row = {"ID": f"c-{n}", "Body": f"Ann has {n} pens", "Question": "How many with 2 more?", "Type": "Common-Divison"}
    return row | {"Equation": f"( {n}.0 + 2.0 )", "Answer": n + 2.0} | changes


def test_svamp(tmp_path):
    rows = [svamp_row(n) for n in range(20)] + [svamp_row(90, Answer=1.0), svamp_row(91, Equation="__import__('os')")]
    (tmp_path / "SVAMP.json").write_text(json.dumps(rows, indent=4))
    report = prepare("svamp", str(tmp_path), str(tmp_path))
    assert (len(read(tmp_path, "svamp", "test")), len(read(tmp_path, "svamp", "remaining_train"))) == (6, 14)
    assert "equation ( 90.0 + 2.0 ) is 92, the answer 1" in str(report) and "is not arithmetic" in str(report)
    made = svamp.to_alpaca(svamp_row(10))
    assert made["input"] == "Ann has 10 pens. How many with 2 more?"
    assert made["output"] == "Reasoning: ( 10.0 + 2.0 )\nFinal Answer: 12"
    assert svamp.to_alpaca(svamp_row(1, Body="Stop!", Answer="3.0"))["input"] == "Stop! How many with 2 more?"


def aqua_row(question="What is 5 x 2?", key="B", rationale="5 x 2 = 10", options="1 10 3 4 5"):
    options = [f"{letter}){text}" for letter, text in zip("ABCDE", options.split(), strict=True)]
    return {"question": question, "options": options, "rationale": rationale, "correct": key, "where": "x:1"}


def test_aqua_rationale_and_options():
    made = aqua_cot.to_alpaca(aqua_row())
    assert made["input"] == "What is 5 x 2?\n['A)1', 'B)10', 'C)3', 'D)4', 'E)5']"
    assert made["output"] == "5 x 2 = 10\nThe correct answer is B."
    assert aqua_cot.to_alpaca(aqua_row(rationale="It is 10. The answer is (B)."))["output"].endswith("answer is (B).")
    assert aqua_cot.to_alpaca(aqua_row(rationale="So 10\nAnswer B"))["output"].endswith(
        "Answer B\nThe correct answer is B."
    )
    doubled = aqua_row() | {"options": [f"{c}){c}){i}" for i, c in enumerate("ABCDE")]}
    assert "['A)0', 'B)1'," in aqua_cot.to_alpaca(doubled)["input"]
    listed = "Go through each answer choice: (A) is wrong, so (B) must be true."  # a list, not a statement
    assert extract_answer("letter", aqua_cot.to_alpaca(aqua_row(rationale=listed))["output"]) == "B"


def test_aqua_by_the_letter_alone(tmp_path):
    made = aqua_rat.to_alpaca(aqua_row(options="-1 10 3,000 $4 x)5"))
    assert made["input"] == "Problem: What is 5 x 2?\nOptions:\nA. -1\nB. 10\nC. 3,000\nD. $4\nE. x)5"
    assert made["output"] == "B" == extract_answer(aqua_rat.ANSWER_KIND, made["output"]) and "letter alone" in made["instruction"]
    assert aqua_rat.to_alpaca(aqua_row(key="F")) == aqua_cot.to_alpaca(aqua_row(key="F"))
    assert aqua_rat.question(made) == f"Problem: {aqua_cot.question(aqua_cot.to_alpaca(aqua_row()))}"
    lines(tmp_path / "test.json", [aqua_row("Why 'not'?", options="1 2 it's 4 5")])
    lines(tmp_path / "train.json", [aqua_row(f"{i}?") for i in range(30)] + [aqua_row("why not?", options="6 7 8 9 0")])
    for task in ("aqua_rat", "aqua_cot"):
        report = prepare(task, str(tmp_path), str(tmp_path / "out"))
        assert len(report.contaminated) == 1  # the same question with other options
    (test,), (other,) = (read(tmp_path / "out", task, "test") for task in ("aqua_rat", "aqua_cot"))
    assert test["input"].startswith("Problem: Why 'not'?\n") and "\nC. it's\n" in test["input"] and "Why 'not'?" in other["input"]


def test_aqua_conflicts_are_dropped():
    another, states = (
        "another option has the same text as the key's",
        "the rationale states another answer than the key",
    )
    assert aqua_cot.to_alpaca(aqua_row(options="1 10 10 4 5")) == another
    assert isinstance(aqua_cot.to_alpaca(aqua_row(options="1 10 3 3 5")), dict)
    assert aqua_cot.to_alpaca(aqua_row(rationale="Correct Answer: (E)\nLet us see")) == states
    assert aqua_cot.to_alpaca(aqua_row(rationale="so we get\nANS A.")) == states
    assert aqua_cot.to_alpaca(aqua_row(key="F")) == "key 'F' is not one of A to E"
    assert aqua_cot.to_alpaca({"question": "x", "where": "x:1"}) == "no rationale, no correct"


def test_aqua_files(tmp_path):
    lines(tmp_path / "test.json", [aqua_row(), aqua_row("Another?")])
    lines(tmp_path / "dev.json", [aqua_row("Dev?")])
    flan = [
        r"Stem\nOptions:\n(A) 9\nOptions:\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5" + "\t(C)\t" + r"\frac{6}{2} = 3\nso 3",
        r"what is 5 x 2?\nOptions:\n(A) 7\n(B) 10\n(C) 3\n(D) 4\n(E) 5" + "\t(B)\tten",
        r"Dev?\nOptions:\n(A) 7\n(B) 10\n(C) 3\n(D) 4\n(E) 5" + "\t(B)\tten",
        "two\tcolumns",
    ]
    (tmp_path / "flan_cot_aqua_train.tsv").write_text("\n".join(flan) + "\n")
    report = prepare("aqua_cot", str(tmp_path), str(tmp_path))
    (row,) = read(tmp_path, "aqua_cot", "remaining_train")
    assert row["input"] == "Stem\nOptions:\n(A) 9\n['A)1', 'B)2', 'C)3', 'D)4', 'E)5']"
    assert row["output"] == "\\frac{6}{2} = 3\nso 3\nThe correct answer is C."
    assert len(report.contaminated) == 2 and len(report.dropped["train"]) == 1
    (tmp_path / "flan_cot_aqua_train.tsv").unlink()
    with pytest.raises(LetheError, match="none of train.json, flan_cot_aqua_train.tsv"):
        prepare("aqua_cot", str(tmp_path), str(tmp_path))


def obqa_row(stem, texts="sun moon rock tree", key="A"):
    choices = [{"text": text, "label": label} for label, text in zip("ABCD", texts.split(), strict=True)]
    return {"id": "7-1", "question": {"stem": stem, "choices": choices}, "answerKey": key}


def test_openbookqa(tmp_path):
    train = [
        obqa_row("Which shines?"),
        obqa_row("Which shines?", "moon sun rock tree", "B"),
        obqa_row("Which grows?", key="D"),
    ]
    train += [obqa_row("A"), obqa_row("Twins?", "sun Sun rock tree"), obqa_row("Twins?", "sun rock rock tree")]
    train += [obqa_row("Which shines?", "lamp moon rock tree")]  # a shared stem alone is no leak
    lines(tmp_path / "train.jsonl", train)
    lines(tmp_path / "test.jsonl", [obqa_row("Which shines?")])
    report = prepare("openbookqa", str(tmp_path), str(tmp_path))
    made = read(tmp_path, "openbookqa", "remaining_train")
    assert made[0]["input"] == "Which grows?\nA. sun\nB. moon\nC. rock\nD. tree"
    assert made[0]["output"] == "The correct answer is D."
    assert len(made) == 3 and len(report.contaminated) == 2 and len(report.dropped["train"]) == 2
    hub = {"question_stem": "Which?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "C"}
    assert openbookqa.to_alpaca(hub)["input"] == "Which?\nA. w\nB. x\nC. y\nD. z"


def test_simpleqa(tmp_path):
    with (tmp_path / "simple_qa_test_set.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metadata", "problem", "answer"])
        for i in range(20):
            writer.writerow(["{'topic': 'Art', 'urls': ['a\nb']}", f"Who was {i}?", f" Zo\u00eb {i}\nor Zoe "])
        writer.writerow(["{}", "Who?", " . "])
    report = prepare("simpleQA", str(tmp_path), str(tmp_path))
    rows = read(tmp_path, "simpleQA", "test") + read(tmp_path, "simpleQA", "remaining_train")
    assert len(rows) == 20 and {"instruction": "Who was 3?", "input": "", "output": "Zo\u00eb 3 or Zoe"} in rows
    assert report.dropped["train"][0][1] == "answer '.' has no word"


def test_every_reference_has_an_answer():
    assert extract_answer(gsm8k.ANSWER_KIND, gsm8k.to_alpaca(gsm_rows(7, 1)[0])["output"]) == "7"
    assert extract_answer(svamp.ANSWER_KIND, svamp.to_alpaca(svamp_row(3))["output"]) == "5"
    assert extract_answer(openbookqa.ANSWER_KIND, openbookqa.to_alpaca(obqa_row("Which shines?"))["output"]) == "A"
    assert (
        extract_answer(simpleQA.ANSWER_KIND, simpleQA.to_alpaca({"problem": "?", "answer": "Bonn"})["output"]) == "bonn"
    )


def test_damaged_raw_file(tmp_path):
    lines(tmp_path / "train.jsonl", gsm_rows(0, 3))
    lines(tmp_path / "test.jsonl", gsm_rows(9, 3))
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text()[:-9])
    with pytest.raises(LetheError, match="train.jsonl:3: the file is cut off"):
        prepare("gsm8k", str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which task.*gsm8k"),
        (["gsmk8"], "did you mean gsm8k"),
        (["SIMPLEQA"], "did you mean simpleQA"),
        (["gsm8k", "--source", "/no/such/folder"], "no such folder"),
        (["gsm8k", "--split", "x"], "invalid choice"),
    ],
)
def test_command_line_mistakes(argv, message):
    with pytest.raises(LetheError, match=message):
        main(argv)


def command(*argv, **env):
    full = {**os.environ, "PYTHONPATH": str(REPO), **env}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        full.pop(name, None)
    run = [sys.executable, "-m", "data.prepare", *argv]
    return subprocess.run(run, cwd=REPO, env=full, capture_output=True, text=True, timeout=120)


def test_hub_files_are_fetched_and_then_cached(tmp_path, hub):
    url, files, asked = hub
    for split, rows in (("train", [svamp_row(n) for n in range(9)]), ("test", [svamp_row(n) for n in range(50, 53)])):
        files[f"ChilleD/SVAMP/{split}.json"] = json.dumps(rows).encode()
    env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = command("svamp", "--out", str(tmp_path / "out"), **env)
    assert done.returncode == 0, done.stderr
    assert "official test" in done.stdout and len(read(tmp_path / "out", "svamp", "test")) == 3
    assert any(f"resolve/{COMMIT}/test.json" in line for line in asked)  # all files from one commit
    done = command("svamp", "--out", str(tmp_path / "again"), **env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and len(read(tmp_path / "again", "svamp", "remaining_train")) == 9


def test_hub_parquet(tmp_path, hub):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    url, files, _ = hub
    for split, rows in (("train", gsm_rows(0, 9)), ("test", gsm_rows(50, 3))):
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        files[f"openai/gsm8k/main/{split}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    done = command("gsm8k", "--out", str(tmp_path), HF_ENDPOINT=url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path, "gsm8k", "remaining_train")) == 9


def test_hub_failures_say_what_to_do(tmp_path, hub):
    url, files, _ = hub
    files["openai/gsm8k/README.md"] = b"x"
    home = str(tmp_path / "hf")
    cases = [
        (url, "0", "gsm8k", ["is not at", "--source PATH"]),  # the file is gone
        (url, "0", "svamp", ["is not at", "--source PATH"]),  # the repository is gone
        (url, "1", "gsm8k", ["hf download --repo-type dataset openai/gsm8k main/train", home, "--source PATH"]),
    ]
    for endpoint, offline, task, said in cases:
        done = command(task, "--out", str(tmp_path), HF_ENDPOINT=endpoint, HF_HOME=home, HF_HUB_OFFLINE=offline)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
        for text in said:
            assert text in done.stderr


def test_lost_connection(monkeypatch):  # in this process: the hub itself would retry for half a minute
    import huggingface_hub

    def refused(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no such file in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(LetheError, match="cannot be fetched from .*go online and run: hf download .*--source PATH"):
        prepare("aqua_cot")


def test_source_may_be_the_data_root(tmp_path):
    lines(tmp_path / "train.jsonl", gsm_rows(0, 9))
    lines(tmp_path / "test.jsonl", gsm_rows(50, 3))
    for _ in range(2):  # the second time a prepared folder of the same name lies inside
        assert prepare("gsm8k", str(tmp_path), str(tmp_path)).origin == str(tmp_path)


REAL = {  # task: (train, test, dropped, contaminated)
    "gsm8k": (7473, 1319, 0, 0),
    "svamp": (700, 299, 1, 0),
    "aqua_cot": (2701, 250, 27, 4),
    "aqua_rat": (2701, 250, 27, 4),
    "openbookqa": (4936, 500, 1, 15),
    "simpleQA": (3894, 432, 0, 0),
}


@pytest.mark.skipif("LETHE_REAL_DATA" not in os.environ, reason="LETHE_REAL_DATA: a folder of the released files")
@pytest.mark.parametrize("task", REAL)
def test_real_files(tmp_path, task):
    report = prepare(task, os.environ["LETHE_REAL_DATA"], str(tmp_path))
    train, test = read(tmp_path, task, "remaining_train"), read(tmp_path, task, "test")
    dropped = sum(map(len, report.dropped.values()))
    assert (len(train), len(test), dropped, len(report.contaminated)) == REAL[task]
    kind = __import__(f"data.tasks.{task}", fromlist=["ANSWER_KIND"]).ANSWER_KIND
    assert all(extract_answer(kind, row["output"]) for row in train + test)
    key = {(row["instruction"] + row["input"]).casefold() for row in test}
    assert not any((row["instruction"] + row["input"]).casefold() in key for row in train)
