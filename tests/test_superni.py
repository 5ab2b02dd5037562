"""SuperNI's tasks from both forms of their files, what is told of a task, and the export in AlpacaEval's JSON."""

import json
import re
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest

import eval as evaluation
from data.alpaca_eval import alpaca_rows, export
from data.alpaca_eval import main as export_main
from data.folder import find_task, task_modules
from data.prepare import main, prepare
from data.superni import definition_of, demonstrations, input_of, labels_of
from data.tasks.superni import TASKS
from metrics.answers import score_answer
from metrics.text import rouge_l_jieba
from study.errors import LetheError, run_command
from study.folder import read_json, read_jsonl, write_json, write_jsonl

DEFINITION = "Say what follows.\nOne number is enough."


def row(number, output=None, definition=DEFINITION):
    return {"id": f"t-{number}", "input": f"after {number}?", "output": output or f"it is {number + 1}",
            "full_prompt": f"{definition}\n\nafter {number}?", "task_name": "task"}  # fmt: skip


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def split_files(folder, key="qa", train=30, label=lambda i: None):
    lines(folder / f"{key}.train.json", [row(i, label(i)) for i in range(train)])
    lines(folder / f"{key}.eval.json", [row(i, label(i - 1000)) for i in range(1000, 1006)])
    lines(folder / f"{key}.train.smp001.json", [row(i, label(i)) for i in range(train - 4, train)])


def read(out, task, part):
    return json.loads((out / task / f"{task}_{part}.json").read_text(encoding="utf-8"))


def test_split_files(tmp_path):
    split_files(tmp_path / "superni")
    with (tmp_path / "superni/qa.train.json").open("a") as file:
        leak = row(1002)
        file.write(json.dumps(leak | {"full_prompt": leak["full_prompt"].replace("after", "AFTER ")}) + "\n")
        file.write(json.dumps({"input": "x", "output": "y"}) + "\n")
    report = prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    train, test, replay = (read(tmp_path / "out", "superni_qa", part) for part in ("remaining_train", "test", "train_1p"))
    assert (len(train), len(test), len(replay)) == (30, 6, 4) and replay == train[-4:]  # the owners' choice, not a draw
    assert train[0] == {"instruction": f"{DEFINITION}\n\nafter 0?", "input": "", "output": "it is 1"}
    assert len(report.contaminated) == 1 and report.dropped["train"][0][1] == "no full_prompt"
    task = find_task("superni_qa", tmp_path / "out")
    assert (task.answer_kind, task.max_new_tokens) == ("text", 128)
    assert task.test[0].prompt == (("user", f"{DEFINITION}\n\nafter 1000?"),)  # the project's full_prompt to the letter


def test_a_replay_row_that_is_a_test_question_goes_too(tmp_path):
    split_files(tmp_path)
    lines(tmp_path / "qa.train.smp001.json", [row(3), row(1001)])
    report = prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    assert [one["output"] for one in read(tmp_path / "out", "superni_qa", "train_1p")] == ["it is 4"] and len(report.contaminated) == 1
    (tmp_path / "qa.train.smp001.json").unlink()  # without it 1 % is drawn, as for any task
    prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    assert len(read(tmp_path / "out", "superni_qa", "train_1p")) == 1


def test_labels_come_by_turns(tmp_path):
    split_files(tmp_path, "pos", 30, lambda i: "True" if i % 30 < 15 and i < 30 else "False")
    lines(tmp_path / "pos.eval.json", [row(i, "True" if i < 1003 else "False") for i in range(1000, 1006)])
    with (tmp_path / "pos.train.json").open("a") as file:
        file.write(json.dumps(row(99, "Maybe")) + "\n")
    report = prepare("superni_pos", str(tmp_path), str(tmp_path / "out"))
    assert report.dropped["train"] == [(f"{tmp_path}/pos.train.json:31", "label 'Maybe' is not one of True, False")]
    for part, count in (("remaining_train", 30), ("test", 6)):  # so the first rows of --max_train and --max_test have both
        assert [one["output"] for one in read(tmp_path / "out", "superni_pos", part)] == ["True", "False"] * (count // 2)
    assert find_task("superni_pos", tmp_path / "out").answer_kind == "short"
    assert score_answer("short", "false.\n", "False")["exact_match"] and not score_answer("short", "True", "False")["exact_match"]


def test_the_sample_stands_in_for_an_absent_training_file(tmp_path, capsys):
    split_files(tmp_path, "qg")
    (tmp_path / "qg.train.json").rename(tmp_path / "qg.train.smp01.json")
    prepare("superni_qg", str(tmp_path), str(tmp_path / "out"))
    told = f"qg.train.json is not in {tmp_path}: its sample qg.train.smp01.json is the training set, 30 rows"
    assert told in capsys.readouterr().err and len(read(tmp_path / "out", "superni_qg", "remaining_train")) == 30
    (tmp_path / "qg.train.smp01.json").unlink()
    with pytest.raises(LetheError, match="none of qg.train.json, qg.train.smp01.json is there"):
        prepare("superni_qg", str(tmp_path), str(tmp_path / "out"))


def original(instances, definition=(DEFINITION,)):
    made = [{"id": f"i{i}", "input": text, "output": [output, "another"]} for i, (text, output) in enumerate(instances)]
    return {"Contributors": ["A. Nother"], "Definition": list(definition), "Positive Examples": [], "Instances": made}


def test_the_original_form_is_split(tmp_path):
    instances = [(f" what is {i}? ", f"it is {i}") for i in range(2600)]
    task = original(instances)
    task["Instances"] += [
        {"input": "", "output": ["x"]},
        {"input": "long", "output": ["y" * 513]},
        {"input": "z" * 2200, "output": ["w"]},
        7,
    ]
    write_json(tmp_path / "tasks/task024_cosmosqa_answer_generation.json", task)
    report = prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    train, test, replay = (read(tmp_path / "out", "superni_qa", part) for part in ("remaining_train", "test", "train_1p"))
    drawn = np.random.RandomState(0).permutation(2600)  # what choice without replacement takes its first from
    assert [one["output"] for one in train] == [f"it is {i}" for i in drawn[:2000]]
    assert [one["output"] for one in test] == [f"it is {i}" for i in drawn[2000:2500]] and replay == train[-20:]
    assert train[0]["instruction"] == f"{DEFINITION}\n\nwhat is {drawn[0]}?"  # stripped; the first reference alone
    reasons = Counter(reason for _, reason in report.dropped["train"])
    assert reasons == {
        "no input": 1,
        "output above 512 characters": 1,
        "definition and input above 2200 characters": 1,
        "no input and output": 1,
    }


def test_the_original_form_of_a_classification_is_halved(tmp_path):
    instances = [(f"{i} is even", "positive" if i % 3 else "negative") for i in range(4000)] + [("odd", "neutral")]
    write_json(tmp_path / "task1312_amazonreview_polarity_classification.json", original(instances))
    prepare("superni_sa", str(tmp_path), str(tmp_path / "out"))
    for part, count in (("remaining_train", 2000), ("test", 500), ("train_1p", 20)):
        rows = read(tmp_path / "out", "superni_sa", part)
        assert [one["output"] for one in rows] == ["positive", "negative"] * (count // 2)
        assert all((int(one["instruction"].split()[-3]) % 3 == 0) == (one["output"] == "negative") for one in rows)
    write_json(tmp_path / "task1312_amazonreview_polarity_classification.json", original(instances[:3000]))
    with pytest.raises(LetheError, match="1000 usable instances labelled 'negative'; the split needs 1260"):
        prepare("superni_sa", str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize("task", [[], {"Definition": "x"}, {"Definition": [], "Instances": []}, {"Definition": [3], "Instances": []}])
def test_no_task_of_natural_instructions(tmp_path, task, capsys):
    write_json(tmp_path / "task024_cosmosqa_answer_generation.json", task)
    assert run_command(lambda: main(["superni_qa", "--source", str(tmp_path), "--out", str(tmp_path / "out")])) == 2
    told = capsys.readouterr().err
    assert "no task of Natural Instructions" in told and told.count("\n") == 1


def test_names_and_files_that_are_missing(tmp_path):
    assert set(TASKS) <= set(task_modules()) and len(TASKS) == 10 and "superni" not in task_modules()
    with pytest.raises(LetheError, match="not on the hub; give them by --source PATH: qa.train.json"):
        prepare("superni_qa", out=str(tmp_path))
    with pytest.raises(LetheError, match="none of qa.eval.json, task024_cosmosqa_answer_generation.json"):
        prepare("superni_qa", str(tmp_path), str(tmp_path))
    with pytest.raises(LetheError, match="task superni_qa is not prepared: .* python -m data.prepare superni_qa"):
        find_task("superni_qa", tmp_path)


def test_definition_and_input_are_the_whole_prompt(tmp_path):
    split_files(tmp_path)
    prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    task = find_task("superni_qa", tmp_path / "out")
    assert definition_of(task) == f"{DEFINITION}\n\n"  # "after " is shared too, and no definition
    assert [input_of(record, definition_of(task)) for record in task.test[:2]] == ["after 1000?", "after 1001?"]
    built_in = find_task("mini_gsm8k")
    assert definition_of(built_in) == "Solve step by step and end with ####.\n"
    assert definition_of(find_task("mini_simpleqa")) == ""  # its rows are questions alone
    whole = definition_of(built_in) + input_of(built_in.test[0], definition_of(built_in))
    assert whole == built_in.test[0].prompt[-1][1] and "\n" not in input_of(built_in.test[0], definition_of(built_in))


def test_demonstrations(tmp_path):
    split_files(tmp_path)
    prepare("superni_qa", str(tmp_path), str(tmp_path / "out"))
    task = find_task("superni_qa", tmp_path / "out")
    kept, train, test = list(task.replay()), list(task.train()), {record.prompt for record in task.test}
    assert [record.answer for record in demonstrations(task, 4)] == [record.answer for record in kept]
    some = demonstrations(task, 12)
    assert some[:4] == kept and len({record.prompt for record in some}) == 12 and not {record.prompt for record in some} & test
    assert some == demonstrations(task, 12) != demonstrations(task, 12, seed=1)
    assert len(demonstrations(task, 99)) == len(train) and len(demonstrations(task, 2)) == 2


def test_labels(tmp_path):
    split_files(tmp_path, "sa", 30, lambda i: ("positive", "negative")[i % 2])
    prepare("superni_sa", str(tmp_path), str(tmp_path / "out"))
    assert Counter(labels_of(find_task("superni_sa", tmp_path / "out").train())) == {"positive": 15, "negative": 15}
    assert labels_of(find_task("mini_svamp").train()) is None
    assert labels_of(find_task("superni_sa", tmp_path / "out").test[:1]) is None  # one row tells nothing


REAL = {name: (200 if name in ("superni_qg", "superni_sum") else 2000, 500, 20) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_real_files(name, real_data, tmp_path):
    report = prepare(name, str(real_data), str(tmp_path))
    parts = [read(tmp_path, name, part) for part in ("remaining_train", "test", "train_1p")]
    assert tuple(map(len, parts)) == REAL[name] and not report.contaminated and not any(report.dropped.values())
    task, raw = find_task(name, tmp_path), read_jsonl(real_data / "superni" / f"{TASKS[name].key}.eval.json")
    assert Counter((one.prompt[-1][1], one.answer) for one in task.test) == Counter((one["full_prompt"], one["output"]) for one in raw)
    definition = definition_of(task)
    assert {one["full_prompt"].removesuffix(one["input"]) for one in raw} == {definition}
    demos = demonstrations(task)
    smallest = read_jsonl(real_data / "superni" / f"{TASKS[name].key}.train.smp001.json")
    assert sorted(input_of(one, definition) for one in demos) == sorted(one["input"] for one in smallest)
    assert (labels_of(task.train()) is not None) == bool(TASKS[name].labels) == (task.answer_kind == "short")
    if TASKS[name].labels:
        assert Counter(record.answer for record in list(task.train())[:40]) == dict.fromkeys(TASKS[name].labels, 20)


# AlpacaEval's JSON

PROMPTS = [
    {"instruction": f"Tell me of {i}.\n", "output": f"There is {i}.", "generator": "reference", "dataset": f"set{i % 2}"} for i in range(4)
]


def test_outputs_of_a_model_in_alpaca_evals_json(tiny, tmp_path, capsys):
    write_json(tmp_path / "prompts.json", PROMPTS)
    task = f"ae={tmp_path}/prompts.json:{tmp_path}/prompts.json"
    words = ["--model", tiny, "--tasks", task, "--device", "cpu", "--max_new_tokens", "4", "--max_test", "3"]
    out, made = str(tmp_path / "out"), tmp_path / "outputs.json"
    assert evaluation.main([*words, "--out", out]) == 0
    export_main(["--root", out, "--run", ".", "--task", task, "--out", str(made), "--generator", "mine"])
    items = read_jsonl(tmp_path / "out/eval/ae.jsonl")
    assert (
        read_json(made)
        == [  # the instruction as the file has it, its last line break too: outputs are paired by it
            {"instruction": prompt["instruction"], "output": item["output"], "generator": "mine", "dataset": prompt["dataset"]}
            for prompt, item in zip(PROMPTS[:3], items, strict=True)
        ]
    )
    assert f"wrote {made}: 3 outputs of mine" in capsys.readouterr().out


def scored(task, count):
    return [{"reference": record.answer, "output": f"out {i}"} for i, record in enumerate(task.test[:count])]


def test_outputs_of_a_run_of_a_study(tmp_path):
    task = find_task("mini_svamp")
    write_jsonl(tmp_path / "lora_base/mini_gsm8k/eval/mini_svamp.jsonl", scored(task, 5))
    study = {"model": "nano", "tasks": {"mini_svamp": {"name": "mini_svamp"}}, "identity": {"data": {"mini_svamp": task.fingerprint}}}
    write_json(tmp_path / "study.json", study)
    rows = export(tmp_path, "lora_base/mini_gsm8k", "mini_svamp")
    want = {"instruction": task.test[0].prompt[-1][1], "output": "out 0", "generator": "nano/lora_base/mini_gsm8k", "dataset": "mini_svamp"}
    assert rows[0] == want and len(rows) == 5
    with pytest.raises(LetheError, match="not scored; mini_svamp is scored under lora_base/mini_gsm8k"):
        export(tmp_path, "base", "mini_svamp")
    with pytest.raises(LetheError, match="not scored; nothing under .* has mini_gsm8k"):
        export(tmp_path, "base", "mini_gsm8k")
    write_json(tmp_path / "study.json", study | {"identity": {"data": {"mini_svamp": "other"}}})
    with pytest.raises(LetheError, match="data of mini_svamp changed"):
        export(tmp_path, "lora_base/mini_gsm8k", "mini_svamp")


def test_items_of_another_task_are_refused(tmp_path):
    task, other = find_task("mini_svamp"), find_task("mini_gsm8k")
    with pytest.raises(LetheError, match="scored item 1 answers another row"):
        alpaca_rows(task, scored(other, 3), "x")
    with pytest.raises(LetheError, match="201 scored items and 200 test rows"):
        alpaca_rows(task, scored(task, 200) + scored(task, 1), "x")
    with pytest.raises(LetheError, match="no scored item"):
        alpaca_rows(task, [], "x")
    rows = [{"instruction": "Add.", "input": f"{i} + 1", "output": str(i + 1)} for i in range(3)]
    lines(tmp_path / "t.jsonl", rows)
    mine = find_task(f"mine={tmp_path}/t.jsonl:{tmp_path}/t.jsonl")
    made = alpaca_rows(mine, scored(mine, 3), "x")
    assert made[1] == {"instruction": "Add.\n1 + 1", "output": "out 1", "generator": "x", "dataset": "mine"}


def test_rouge_over_jiebas_tokens(monkeypatch):
    stand_in = ModuleType("jieba")  # cuts at spaces and signs, which it keeps, as jieba does for such words
    stand_in.cut, stand_in.setLogLevel = re.compile(r"\w+|\s|[^\w\s]").findall, lambda level: None
    monkeypatch.setitem(sys.modules, "jieba", stand_in)
    assert rouge_l_jieba("The cat sat.", "the cat sat on it.") == pytest.approx(0.6)  # cat, sat and the full stop, of 4 and 6
    assert rouge_l_jieba(" \n", "x") == rouge_l_jieba("x", "") == 0.0 and rouge_l_jieba("a b", "a  b") == 1.0
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match="pip install jieba"):
        rouge_l_jieba("a", "b")


def test_rouge_over_jiebas_tokens_is_rouge_chineses():
    jieba, rouge = pytest.importorskip("jieba"), pytest.importorskip("rouge_chinese")
    for said, wanted in (
        ("It isn't 3.5% of Zo\u00eb's.", "It is 3.5 of Zoe's!"),
        ("n, 6583", "6583, n, a"),
        ("\u00bfQu\u00e9? S\u00ed.", "S\u00ed, que."),
    ):
        (theirs,) = rouge.Rouge().get_scores(" ".join(jieba.cut(said)), " ".join(jieba.cut(wanted)))
        assert rouge_l_jieba(said, wanted) == pytest.approx(theirs["rouge-l"]["f"], abs=1e-7)
