"""Simplification, dialogue and question generation from src/tgt/src_info and flat files, ASSET, and --eval_size."""

import json

import pytest

from data.folder import find_task, task_modules
from data.prepare import main, prepare
from data.tasks import asset, simplification
from study.errors import LetheError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def read(out, task, part):
    return json.loads((out / task / f"{task}_{part}.json").read_text(encoding="utf-8"))


def columns(sentences, targets, prompt="Simplify this text: "):
    infos = [{"normal_sentence": sentence, "prompt_name": "simplification_1"} for sentence in sentences]
    return {"src": [f'{prompt}"{sentence}"' for sentence in sentences], "tgt": targets, "src_info": infos}


def numbered(start, count):
    jobs = range(start, start + count)
    return [f"He commenced job {i} -LRB- late -RRB-." for i in jobs], [f"He began job {i}." for i in jobs]


def test_columns(tmp_path, capsys):
    raw = tmp_path / "raw"
    write(raw / "simplification_1.train.json", columns(*numbered(0, 30)))
    # Another prompt for the same sentences: four of them are asked in the test.
    write(raw / "simplification_2.train.json", columns(*numbered(100, 4), prompt="Make it easier: "))
    sentences, targets = numbered(100, 4)
    write(raw / "simplification_1.test.json", columns(sentences, [[text, f" -LSB-{text}-RSB- "] for text in targets]))
    write(raw / "simplification_1.validation.json", columns(*numbered(50, 3)))
    report = prepare("simplification", str(raw), str(tmp_path / "out"))
    assert report.raw == {"test": 4, "train": 34} and len(report.contaminated) == 4 and "eval:" not in str(report)
    assert f"{raw / 'simplification_1.validation.json'} is left out: neither train nor test in its name" in capsys.readouterr().err
    train, test = read(tmp_path / "out", "simplification", "remaining_train"), read(tmp_path / "out", "simplification", "test")
    assert len(train) == 30 and not (tmp_path / "out/simplification/simplification_eval.json").exists()
    assert train[0] == {
        "instruction": "",
        "input": 'Simplify this text: "He commenced job 0 ( late )."',
        "output": "He began job 0.",
        "original": "He commenced job 0 ( late ).",
    }
    task = find_task("simplification", tmp_path / "out")
    assert (task.answer_kind, task.max_new_tokens, len(task.test)) == ("text", 80, 4)
    first = task.test[0]
    assert first.prompt == (("user", test[0]["input"]),) and first.original == "He commenced job 100 ( late )."
    assert first.references == ("He began job 100.", "[He began job 100.]") and first.answer == first.references[0]


@pytest.mark.parametrize("sentence", ["He commenced.", 'He said: "Go" and left.', "Two\nlines."])
def test_the_sentence_without_src_info(sentence):
    for source in (f'Simplify this text: "{sentence}"', f"{sentence}\n\n===\n\nGiven the above text, simplify it:", sentence):
        row = {"src": source, "tgt": "x", "src_info": None, "where": "f:1"}
        assert simplification.to_alpaca(row) == {"instruction": "", "input": source, "output": "x", "original": sentence}
    told = {"src": "Any", "tgt": ["x"], "src_info": {"original": "-LSB-y-RSB-"}, "where": "f:1"}
    assert simplification.to_alpaca(told)["original"] == "[y]" and "references" not in simplification.to_alpaca(told)


def test_rows_that_are_no_pairs(tmp_path):
    write(tmp_path / "empd_train.json", {"src": ["a", "", "b", "c", 3], "tgt": ["1", "2", " ", ["", "4"], "5"]})
    write(tmp_path / "empd_test.json", {"src": ["t"], "tgt": [["1", "2"]]})
    text = str(prepare("dialogue", str(tmp_path), str(tmp_path / "out")))
    assert "1 x no src (empd_train.json:2)" in text and "1 x no tgt (empd_train.json:3)" in text
    assert "1 x src or tgt is not text (empd_train.json:5)" in text
    assert [row["output"] for row in read(tmp_path / "out", "dialogue", "remaining_train")] == ["1", "4"]
    assert find_task("dialogue", tmp_path / "out").max_new_tokens == 64


def flat(train, evaluation, test):
    parts = zip(("train", "eval", "test"), (train, evaluation, test), strict=True)
    return {name: [{"input": f"q {i}", "output": f"a {i}", "src_info": {}, "index": i} for i in part] for name, part in parts}


def test_flat(tmp_path):
    write(tmp_path / "pre/eli5.json", flat(range(20), range(20, 23), range(40, 45)))
    write(tmp_path / "pre/other.json", flat(range(5), [], range(7, 9)))
    report = prepare("question_generation", str(tmp_path / "pre/eli5.json"), str(tmp_path / "out"), eval_size=0.5)
    assert "eval: the owners' 3 rows; --eval_size is not used" in str(report)
    assert f"question_generation from {tmp_path}/pre/eli5.json" in str(report)
    assert [row["input"] for row in read(tmp_path / "out", "question_generation", "eval")] == ["q 20", "q 21", "q 22"]
    assert len(read(tmp_path / "out", "question_generation", "remaining_train")) == 20
    with pytest.raises(LetheError, match="eli5.json: other data lies beside it; give the one file"):
        prepare("question_generation", str(tmp_path / "pre"), str(tmp_path / "out"))
    (tmp_path / "pre/other.json").unlink()
    for _ in range(2):  # the second time the prepared folder lies inside the source
        assert prepare("question_generation", str(tmp_path / "pre"), str(tmp_path / "pre")).raw == {"train": 20, "eval": 3, "test": 5}


def test_eval_size(tmp_path):
    sentences, targets = numbered(0, 200)
    write(tmp_path / "raw/a.train.json", columns(sentences, targets))
    write(tmp_path / "raw/b.train.json", columns(sentences[:50], targets[:50], "Make it easier: "))
    write(tmp_path / "raw/a.test.json", columns(*numbered(500, 5)))
    report = prepare("simplification", str(tmp_path / "raw"), str(tmp_path / "out"), eval_size=0.1)
    held, train = read(tmp_path / "out", "simplification", "eval"), read(tmp_path / "out", "simplification", "remaining_train")
    replay = read(tmp_path / "out", "simplification", "train_1p")
    assert len(held) == 25 and not {row["original"] for row in held} & {row["original"] for row in train}
    lost = 250 - 25 - len(train)
    assert lost > 0 and f"eval: 25 rows of train, drawn with seed 42; {lost} more ask the same and are left out" in str(report)
    assert all(row in train for row in replay)
    main(["simplification", "--source", str(tmp_path / "raw"), "--out", str(tmp_path / "again"), "--eval_size", "0.1"])
    assert read(tmp_path / "again", "simplification", "eval") == held
    prepare("simplification", str(tmp_path / "raw"), str(tmp_path / "again"), eval_size=7, seed=1)
    assert len(read(tmp_path / "again", "simplification", "eval")) == 7
    prepare("simplification", str(tmp_path / "raw"), str(tmp_path / "again"))
    assert not (tmp_path / "again/simplification/simplification_eval.json").exists()  # its rows are in train now
    with pytest.raises(LetheError, match="--eval_size 250 of 250 training rows leaves none"):
        prepare("simplification", str(tmp_path / "raw"), str(tmp_path / "again"), eval_size=250)
    for wrong in ("0", "1.5", "-1", "nan", "inf", "some"):
        with pytest.raises(LetheError, match=f"--eval_size {wrong}: give a share below 1"):
            main(["simplification", "--source", str(tmp_path), f"--eval_size={wrong}"])


def test_broken_sources(tmp_path):
    with pytest.raises(LetheError, match="no file of training rows; it should hold JSON files"):
        prepare("dialogue", str(tmp_path), str(tmp_path))
    write(tmp_path / "x.train.json", {"src": ["a", "b"], "tgt": ["c"]})
    with pytest.raises(LetheError, match="x.train.json: 2 src, 1 tgt, 2 src_info: these lists must be equally long"):
        prepare("dialogue", str(tmp_path), str(tmp_path))
    write(tmp_path / "x.train.json", {"train": ["a"]})
    with pytest.raises(LetheError, match='x.train.json:train: not a list of {"input", "output"}'):
        prepare("dialogue", str(tmp_path), str(tmp_path))
    with pytest.raises(LetheError, match="these files are not on the hub"):
        prepare("dialogue", out=str(tmp_path))
    assert "generation" not in task_modules() and {"asset", "dialogue", "question_generation", "simplification"} <= set(task_modules())


def asset_files(folder, rows):
    folder.mkdir(parents=True)
    for split, count in rows.items():
        for n, part in enumerate(("orig", *(f"simp.{k}" for k in range(10)))):
            told = f"version {n // 2}" if n else "as it was"
            lines = [f"{split} sentence {i}\u2028{told}." for i in range(count)]
            (folder / f"asset.{split}.{part}").write_text("\n".join(lines), encoding="utf-8")  # as released: no newline at the end


def test_asset(tmp_path):
    asset_files(tmp_path / "asset", {"valid": 30, "test": 4})
    prepare("asset", str(tmp_path), str(tmp_path / "out"))
    task = find_task("asset", tmp_path / "out")
    assert len(list(task.train())) == 30 and len(task.test) == 4 and task.max_new_tokens == 80
    record = task.test[3]
    assert record.original == "test sentence 3\u2028as it was."
    assert record.prompt[0][1].endswith(f"understand.\n{record.original}")
    # Equal references stay, for SARI counts them.
    assert record.references == tuple(f"test sentence 3\u2028version {n // 2}." for n in range(1, 11))
    assert record.answer == record.references[0]
    (tmp_path / "asset/asset.test.simp.4").write_text("one\ntwo")
    with pytest.raises(LetheError, match="asset.test.simp.4: 2 lines, but asset.test.orig has 4"):
        prepare("asset", str(tmp_path), str(tmp_path / "out"))


def test_released_asset(real_data, tmp_path):
    report = prepare("asset", str(real_data), str(tmp_path))
    assert report.raw == {"train": 2000, "test": 359} and not report.contaminated and not report.duplicates
    task = find_task("asset", tmp_path)
    assert len(task.test) == 359 and {len(record.references) for record in task.test} == {asset.REFERENCES}
    originals = (real_data / "asset/asset.test.orig").read_text(encoding="utf-8").split("\n")[:359]
    assert [record.original for record in task.test] == [text.strip() for text in originals]
    assert all(record.original in record.prompt[0][1] for record in task.test)
