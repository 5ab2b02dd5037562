"""Columns of general ability beside a study's tasks, from end to end: mini_mmlu, MMLU files, tasks of lm-evaluation-harness."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from tiny import TASKS, adapters, cells, one_line, times, words

import eval as evaluation
import train
from metrics.statistics import compare_items
from metrics.summary import summarise_benchmark
from model import harness
from study.folder import read_json, read_jsonl

FIRST, SECOND = TASKS
PAIR = f"{FIRST}_to_{SECOND}"
STUDY = ["--mask", "none,highest", "--pairs", f"{FIRST}:{SECOND}", "--threshold", "2000", "--max_test", "2"]
RUNS = [f"lora_base/{FIRST}", f"lora_base/{SECOND}", f"lora_transfer/{PAIR}", f"mask/highest/{PAIR}"]
MINI = ["--mmlu", "mini_mmlu", "--max_samples", "60"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Of masks and optimizers; those of general ability are drawn."""
    monkeypatch.setattr("study.report.draw_all", lambda rows, folder: [])
    monkeypatch.setattr("study.comparison.draw_comparison", lambda *_: [])


@pytest.fixture(scope="module")
def no_pictures_yet():
    """The same for fixtures of the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.report.draw_all", lambda rows, folder: [])
        yield


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory, no_pictures_yet) -> Path:
    """A study without a column; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("columns") / "plain"
    assert train.main(words(tiny, out, *STUDY)) == 0
    return out


@pytest.fixture(scope="module")
def carried(tiny, tmp_path_factory, no_pictures_yet) -> Path:
    """The same one with mini_mmlu; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("columns") / "carried"
    assert train.main(words(tiny, out, *STUDY, *MINI)) == 0
    return out


@pytest.fixture
def study(plain, tmp_path) -> Path:
    """A copy of the plain one to be added to."""
    return Path(shutil.copytree(plain, tmp_path / "study"))


def column_cells(out: Path, column: str) -> dict[str, bytes]:
    return {name: content for name, content in cells(out).items() if Path(name).stem == column}


def refused(*command, capsys) -> str:
    """What eval.py says in its one line."""
    assert evaluation.main([str(word) for word in command]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


# ----------------------------------------------------------------------------------------------------------------------
# A study that carries mini_mmlu


def test_every_model_is_scored(carried, plain):
    assert set(column_cells(carried, "mini_mmlu")) == {f"{run}/eval/mini_mmlu.jsonl" for run in ["base", *RUNS]}
    base = read_jsonl(carried / "base/eval/mini_mmlu.jsonl")
    for run in RUNS:
        items = read_jsonl(carried / run / "eval/mini_mmlu.jsonl")
        assert len(items) == 60 and [(one["question"], one["gold"]) for one in items] == [(one["question"], one["gold"]) for one in base]
        assert any(one["logprobs"] != other["logprobs"] for one, other in zip(items, base, strict=True))  # the adapter was on
    record = read_json(carried / "study.json")
    assert record["columns"] == {"mini_mmlu": {"mmlu": "mini_mmlu", "max_items": 60}} and set(record["tasks"]) == set(TASKS)
    assert set(record["identity"]["data"]) == {*TASKS, "mini_mmlu"}
    # It is looked at and never trained on: all else is what it would be without it.
    assert adapters(carried) == adapters(plain)
    assert {name: content for name, content in cells(carried).items() if "mini_mmlu.jsonl" not in name} == cells(plain)


def test_its_results(carried):
    rows = read_json(carried / "general_results.json")["results"]
    assert read_json(carried / "eval_results_mask.json")["general"] == rows
    assert [row["run"] for row in rows if row["metric"] == "accuracy"] == ["base", *RUNS[1::-1], *RUNS[2:]]  # as they are read
    for run in ["base", *RUNS]:
        mine = [row for row in rows if row["run"] == run]
        expected = summarise_benchmark(read_jsonl(carried / run / "eval/mini_mmlu.jsonl"))
        assert [{key: row[key] for key in expected[0]} for row in mine] == expected
        assert {"accuracy", "accuracy_macro", "answer_nll", "accuracy/addition"} <= {row["metric"] for row in mine}
    who = {row["run"]: (row["arm"], row["stage"], row["first"], row["second"], row["task"], row["seed"]) for row in rows}
    assert who["base"] == ("base", 0, None, None, "mini_mmlu", 0)
    assert who[RUNS[3]] == ("highest", 2, FIRST, SECOND, "mini_mmlu", 0)
    assert not any(row["task"] == "mini_mmlu" for row in read_json(carried / "eval_results_mask.json")["results"])
    picture = imread(carried / "performance_matrices_mask/general_mini_mmlu.png")
    assert 600 < picture.shape[1] < 2500 and 200 < picture.shape[0] < 1200


def test_its_table(carried, tmp_path, capsys):
    out = shutil.copytree(carried, tmp_path / "copy")
    assert evaluation.main(["--root", str(out), "--replot"]) == 0
    told = capsys.readouterr().out
    lines = told[told.index("General ability") :].split("\n\n")[0].splitlines()
    subjects = len({one["subject"] for one in read_jsonl(carried / "base/eval/mini_mmlu.jsonl")})
    assert lines[0].startswith(f"General ability: mini_mmlu, 60 items in {subjects} subjects, in %")
    table = {line.split("  ")[0]: line for line in lines[3:]}
    assert list(table) == ["base", "after stage 1", "lora_transfer", "mask_highest"]

    def right(run):
        return [float(one["correct"]) for one in read_jsonl(carried / run / "eval/mini_mmlu.jsonl")]

    change = compare_items(right("base"), right(RUNS[2]))
    text = f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    since = compare_items(right(RUNS[0]), right(RUNS[2]))
    assert text in table["lora_transfer"] and f"{100 * since['difference']:+.1f} ({100 * since['low']:+.1f}" in table["lora_transfer"]
    models = lines[1].index("models"), lines[1].index("models") + len("models")
    assert [table[state][slice(*models)].strip() for state in table] == ["1", "2", "1", "1"]
    assert table["base"].split()[1] == f"{100 * sum(right('base')) / 60:.1f}"


def test_the_same_command_again_has_nothing_to_do(carried, tiny, tmp_path, capsys):
    out = shutil.copytree(carried, tmp_path / "copy")
    before = times(out, "*.jsonl")
    assert train.main(words(tiny, out, *STUDY, *MINI)) == 0 and "nothing to do" in capsys.readouterr().out
    assert train.main(words(tiny, out, *STUDY)) == 0 and "nothing to do" in capsys.readouterr().out  # a column is only selected
    (out / RUNS[2] / "eval/mini_mmlu.jsonl").unlink()
    assert train.main(words(tiny, out, *STUDY, *MINI)) == 0
    after = times(out, "*.jsonl")
    assert {name for name in after if before[name] != after[name]} == {f"{RUNS[2]}/eval/mini_mmlu.jsonl"}
    assert cells(out) == cells(carried)


def test_another_number_of_items_is_another_column(carried, tiny, tmp_path, capsys):
    out = shutil.copytree(carried, tmp_path / "copy")
    assert train.main(words(tiny, out, *STUDY, "--mmlu", "mini_mmlu", "--max_samples", 40)) == 2
    assert "data of mini_mmlu" in capsys.readouterr().err
    told = refused("--root", out, "--mmlu", "mini_mmlu", "--max_samples", 40, capsys=capsys)
    assert "mini_mmlu: this study has it with other items or settings" in told
    assert read_json(out / "study.json")["columns"]["mini_mmlu"]["max_items"] == 60 and cells(out) == cells(carried)


def test_a_study_gets_a_column_later(study, carried, tiny, capsys):
    before = times(study, "eval/*.jsonl") | times(study, "adapter_model.safetensors")
    assert evaluation.main(["--root", str(study), *MINI]) == 0
    told = capsys.readouterr().out
    assert "scored     5 missing cells" in told and "General ability: mini_mmlu, 60 items" in told
    assert cells(study) == cells(carried) and before.items() <= times(study, "*.*").items()
    assert read_json(study / "study.json")["columns"] == read_json(carried / "study.json")["columns"]
    assert read_json(study / "general_results.json") == read_json(carried / "general_results.json")
    before = times(study, "eval/*.jsonl")
    for more in (MINI, []):  # from now on it is part of the study
        assert evaluation.main(["--root", str(study), *more]) == 0
        told = capsys.readouterr().out
        assert "every cell was there" in told and "General ability: mini_mmlu" in told and times(study, "eval/*.jsonl") == before
    (study / "base/eval/mini_mmlu.jsonl").unlink()
    assert evaluation.main(["--root", str(study), "--tasks", "mini_mmlu"]) == 0
    assert "scored     1 missing cell\n" in capsys.readouterr().out and cells(study) == cells(carried)
    assert train.main(words(tiny, study, *STUDY, *MINI)) == 0 and "nothing to do" in capsys.readouterr().out


def test_train_adds_a_column_to_a_trained_study(study, carried, tiny, capsys):
    assert train.main(words(tiny, study, *STUDY, *MINI)) == 0
    told = capsys.readouterr().out
    assert "4 runs, 4 of them done before" in told and "columns    mini_mmlu (60 items): general ability" in told
    assert cells(study) == cells(carried) and adapters(study) == adapters(carried)


def test_only_the_column_is_scored(carried, tiny, tmp_path, capsys):
    """--tasks takes the names of columns too, and what is scored is reported."""
    assert train.main(words(tiny, tmp_path, "--stage", 1, "--tasks", "mini_mmlu", *MINI)) == 0
    assert "General ability: mini_mmlu" in capsys.readouterr().out
    assert cells(tmp_path) == {name: content for name, content in column_cells(carried, "mini_mmlu").items() if "_to_" not in name}
    assert len(read_json(tmp_path / "general_results.json")["results"]) > 0
    assert train.main(words(tiny, tmp_path, "--stage", 1, "--tasks", "mini_mmlu", *MINI)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_column_that_is_asked_for_can_be_selected_at_once(study, carried, capsys):
    for cell in study.rglob(f"eval/{FIRST}.jsonl"):
        cell.unlink()
    assert evaluation.main(["--root", str(study), *MINI, "--tasks", "mini_mmlu"]) == 0
    assert column_cells(study, "mini_mmlu") == column_cells(carried, "mini_mmlu") and not column_cells(study, FIRST)
    capsys.readouterr()
    assert "'mini_mmul' is not in this study; it has mini_svamp" in refused("--root", study, "--tasks", "mini_mmul", capsys=capsys)


def test_a_changed_column_is_refused(carried, tmp_path, capsys):
    out = shutil.copytree(carried, tmp_path / "copy")
    record = read_json(out / "study.json")
    record["identity"]["data"]["mini_mmlu"] = "0" * 64
    (out / "study.json").write_text(json.dumps(record))
    assert "the data of mini_mmlu changed" in refused("--root", out, capsys=capsys)


def test_several_seeds(carried, tiny, tmp_path, capsys):
    assert train.main(words(tiny, tmp_path, "--seeds", "0,1", "--stage", 1, "--max_test", 2, *MINI)) == 0
    told = capsys.readouterr().out
    assert "95 % over items and seeds" in told
    assert {name for name in cells(tmp_path) if "mini_mmlu" in name} == {
        f"seed{n}/{run}/eval/mini_mmlu.jsonl" for n in (0, 1) for run in ["base", *RUNS[:2]]}  # fmt: skip
    for run in ["base", *RUNS[:2]]:
        assert cells(tmp_path)[f"seed0/{run}/eval/mini_mmlu.jsonl"] == cells(carried)[f"{run}/eval/mini_mmlu.jsonl"]
    rows = read_json(tmp_path / "general_results.json")["results"]
    assert {(row["seed"], row["run"]) for row in rows} == {(n, run) for n in (0, 1) for run in ["base", *RUNS[:2]]}
    assert (tmp_path / "performance_matrices_mask/general_mini_mmlu.png").stat().st_size > 5000
    (tmp_path / "seed1/base/eval/mini_mmlu.jsonl").unlink()
    assert evaluation.main(["--root", str(tmp_path)]) == 0 and "scored     1 missing cell\n" in capsys.readouterr().out


def test_an_optimizer_study_carries_it_too(tiny, tmp_path, capsys):
    command = words(tiny, tmp_path, "--compare_optimizers", "--comparison", "{adamw: [1.0e-2], muon: [1.0e-2]}", "--max_test", 2, *MINI)
    assert train.main(command) == 0
    told = capsys.readouterr().out
    states = [f"{name}_lr0.01, stage {stage}" for stage in (1, 2) for name in ("adamw", "muon")]
    assert all(f"\n{state}  " in told for state in ["base", *states])
    runs = [f"optimizer/{name}_lr0.01/{rest}" for name in ("adamw", "muon") for rest in (FIRST, PAIR)]
    assert set(column_cells(tmp_path, "mini_mmlu")) == {f"{run}/eval/mini_mmlu.jsonl" for run in ["base", *runs]}
    assert {row["run"] for row in read_json(tmp_path / "general_results.json")["results"]} == {"base", *runs}
    assert (tmp_path / "logs/general_mini_mmlu.png").stat().st_size > 5000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard/study"))
    board.Reload()
    assert "general_mini_mmlu" in board.Tags()["images"]
    assert train.main(command) == 0 and "nothing to do" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# MMLU from files


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    """A folder as released: two subjects, two solved examples each, with quotes and line ends within fields."""
    folder = tmp_path_factory.mktemp("mmlu")
    for subject, start in (("law_of_words", 0), ("numbers", 7)):
        rows = [[f'Which "word"\nis number {start + n}?', f"{n}, of course", "two", f"the '{n}'", "none of\nthese", "ABCD"[n % 4]]
                for n in range(7)]  # fmt: skip
        for part, mine in (("test", rows[:5]), ("dev", rows[5:])):
            (folder / part).mkdir(exist_ok=True)
            with (folder / part / f"{subject}_{part}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(mine)
    return folder


def test_mmlu_by_letter_and_by_generation(study, mmlu, tiny, capsys):
    assert evaluation.main(["--root", str(study), "--mmlu", str(mmlu), "--shots", "1"]) == 0
    assert evaluation.main(["--root", str(study), "--mmlu", str(mmlu), "--mmlu_by", "generate"]) == 0
    told = capsys.readouterr().out
    assert "General ability: mmlu_1shot, 10 items in 2 subjects" in told
    assert "General ability: mmlu_0shot_generate, 10 items in 2 subjects" in told and "that could be read; they count as wrong" in told
    record = read_json(study / "study.json")["columns"]
    assert record["mmlu_1shot"] == {"mmlu": str(mmlu), "shots": 1, "max_items": None}
    assert record["mmlu_0shot_generate"] == {"mmlu": str(mmlu), "shots": 0, "max_items": None, "by": "generate"}
    for run in ["base", *RUNS]:
        letters, said = (read_jsonl(study / run / f"eval/{name}.jsonl") for name in record)
        assert [(one["subject"], one["gold"]) for one in letters] == [
            (subject, "ABCD"[n % 4]) for subject in ("law_of_words", "numbers") for n in range(5)
        ]
        assert [one["question"] for one in letters] == [one["question"] for one in said] and 'Which "word"\nis number 0?' in letters[0][
            "question"
        ]
        assert letters[0]["options"] == ["A", "B", "C", "D"] and all(len(one["logprobs"]) == 4 for one in letters)
        assert all("logprobs" not in one and isinstance(one["output"], str) for one in said)
    capsys.readouterr()
    assert evaluation.main(["--root", str(study)]) == 0 and "every cell was there" in capsys.readouterr().out
    assert "this study has it with other items" in refused("--root", study, "--mmlu", mmlu, "--shots", 1, "--max_samples", 4, capsys=capsys)
    assert train.main(words(tiny, study, *STUDY, "--mmlu", mmlu, "--shots", 1)) == 0


def test_any_model_on_mmlu(mmlu, plain, tiny, tmp_path, capsys):
    command = ["--model", tiny, "--mmlu", str(mmlu), "--shots", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert evaluation.main([*command, "--adapter", str(plain / RUNS[0])]) == 0
    told = capsys.readouterr().out
    assert "accuracy/law_of_words" in told and SECOND not in told  # with a column and no --tasks, the column alone
    items = read_jsonl(tmp_path / "eval/mmlu_1shot.jsonl")
    rows = read_json(tmp_path / "eval_results.json")["results"]
    assert [{key: row[key] for key in ("metric", "value", "n")} for row in rows] == [
        {key: row[key] for key in ("metric", "value", "n")} for row in summarise_benchmark(items)]  # fmt: skip
    assert {row["task"] for row in rows} == {"mmlu_1shot"} and all(row["adapter"] for row in rows)
    assert evaluation.main([*command, "--tasks", FIRST, "--max_test", "2", "--max_new_tokens", "8"]) == 0
    assert {row["task"] for row in read_json(tmp_path / "eval_results.json")["results"]} == {FIRST, "mmlu_1shot"}
    assert read_jsonl(tmp_path / "eval/mmlu_1shot.jsonl") != items  # the base


@pytest.mark.parametrize(
    "more, named",
    [
        (["--mmlu", "no/such/folder"], "no/such/folder: no such file or folder"),
        (["--mmlu", "{mmlu}", "--shots", "3"], "2 solved examples of law_of_words, not 3; give --shots 2"),
        (["--mmlu", "{mmlu}/dev"], "no *_test.csv in it"),
        (["--mmlu", "{mmlu}", "--shots", "-1"], "--shots must be 0 or more"),
        (["--mmlu", "mini_mmlu", "--max_samples", "0"], "--max_samples must be above 0"),
        (["--mmlu", "mini_mmlu", "--mmlu_by", "generate"], "mini_mmlu is scored by the likelihood of its answers"),
        (["--mmlu", "mini_mmlu", "--shots", "2"], "mini_mmlu has no solved examples"),
        (["--mmlu", "mini_mmlu", "--mmlu_by", "letters"], "did you mean 'letter'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_requests(tiny, mmlu, tmp_path, capsys, more, named):
    more = [word.format(mmlu=mmlu) for word in more]
    assert named in one_line(words(tiny, tmp_path / "out", *more), capsys)
    assert named in refused("--model", tiny, *more, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_a_columns_name_is_refused(tiny, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "What follows {n}?", "answer": "{n + 1}"}}\n' for n in range(20)))
    command = ["--model", tiny, "--datasets", f"mini_mmlu={file}", "--stage", "1", "--out", str(tmp_path / "out"), *MINI]
    assert "mini_mmlu is both a data set and a column of general ability" in one_line(command, capsys)


def test_a_broken_mmlu_file_is_told_before_anything_is_trained(tiny, mmlu, tmp_path, capsys):
    shutil.copytree(mmlu, tmp_path / "mmlu")
    file = tmp_path / "mmlu/test/numbers_test.csv"
    file.write_text(file.read_text()[:-20])
    assert "numbers_test.csv" in one_line(words(tiny, tmp_path / "out", "--mmlu", tmp_path / "mmlu", "--shots", 0), capsys)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Three local tasks: options to choose from, an answer to generate, and whole texts."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What follows {n}?", "options": [str(n + 1), str(n + 2), "red"], "gold": n % 2, "answer": str(n + 1)}
            for n in range(16)]  # fmt: skip
    for part, mine in (("train", rows[12:]), ("test", rows[:12])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    found = {"dataset_path": "json", "training_split": "train", "test_split": "test", "doc_to_text": "{{question}}",
             "dataset_kwargs": {"data_files": {part: str(folder / f"{part}.jsonl") for part in ("train", "test")},
                                "cache_dir": str(folder / "cache")}}  # fmt: skip

    def task(name: str, *metrics: str, **more) -> None:
        listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **found, "metric_list": listed, **more}))

    task("toy_choice", "acc", "acc_norm", output_type="multiple_choice", doc_to_choice="options", doc_to_target="gold")
    task(
        "toy_answer",
        "exact_match",
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
    )
    task("toy_text", "word_perplexity", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}")
    return folder


def test_columns_of_the_harness(tasks, study, tiny, tmp_path, capsys):
    mine = ["--harness", "toy_choice,toy_answer", "--harness_path", str(tasks), "--max_samples", "8"]
    assert evaluation.main(["--root", str(study), *mine]) == 0
    told = capsys.readouterr().out
    assert "General ability: toy_choice, 8 items" in told and "General ability: toy_answer, 8 items" in told
    assert evaluation.main(["--root", str(study)]) == 0 and "every cell was there" in capsys.readouterr().out  # finds its tasks again
    rows = read_json(study / "general_results.json")["results"]
    assert {(row["task"], row["run"]) for row in rows} == {(name, run) for name in ("toy_choice", "toy_answer") for run in ["base", *RUNS]}
    assert {row["metric"] for row in rows if row["task"] == "toy_choice"} == {"accuracy", "acc", "acc_norm"}

    out = tmp_path / "trained"
    assert train.main(words(tiny, out, *STUDY, *mine)) == 0
    for name in ("toy_choice", "toy_answer"):
        assert column_cells(out, name) == column_cells(study, name) and len(column_cells(out, name)) == 5
    capsys.readouterr()
    # Other documents are another column here too.
    assert train.main(words(tiny, out, *STUDY, *mine[:-1], 9)) == 2 and "data of toy_choice" in capsys.readouterr().err
    assert "toy_choice: this study has it with other items" in refused("--root", out, *mine[:-1], 9, capsys=capsys)

    command = ["--model", tiny, "--device", "cpu", "--out", str(tmp_path / "model"), *mine, "--adapter", str(study / RUNS[2])]
    assert evaluation.main(command) == 0
    assert read_jsonl(tmp_path / "model/eval/toy_choice.jsonl") == read_jsonl(study / RUNS[2] / "eval/toy_choice.jsonl")
    assert (tmp_path / "model/eval/toy_answer.jsonl").read_bytes() == column_cells(study, "toy_answer")[f"{RUNS[2]}/eval/toy_answer.jsonl"]


def test_shots_name_a_column(tasks, tiny, tmp_path):
    command = ["--model", tiny, "--device", "cpu", "--out", str(tmp_path), "--harness", "toy_choice", "--harness_path", str(tasks)]
    assert evaluation.main([*command, "--shots", "2", "--mmlu", "mini_mmlu", "--max_samples", "4"]) == 0
    assert {file.stem for file in (tmp_path / "eval").iterdir()} == {"toy_choice_2shot", "mini_mmlu"}
    assert len(read_jsonl(tmp_path / "eval/toy_choice_2shot.jsonl")) == 4 == len(read_jsonl(tmp_path / "eval/mini_mmlu.jsonl"))


def test_what_the_harness_cannot_give(tasks, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "_manager", lambda path, defaults, made=harness._manager: made(path, False))  # lm-eval's own take seconds

    def said(names: str, *more) -> str:
        return one_line(words(tiny, tmp_path / "out", "--harness", names, "--harness_path", tasks, *more), capsys)

    assert "no task 'toy_chioce'; did you mean toy_choice" in said("toy_chioce")
    assert "two columns of general ability are named toy_choice" in said("toy_choice,toy_choice")
    assert "toy_text has no score of its own for each item" in said("toy_choice,toy_text")
    assert "--harness_path says where tasks of --harness lie" in one_line(
        words(tiny, tmp_path / "out", "--harness_path", tasks, *MINI), capsys
    )
    assert not (tmp_path / "out").exists()
