"""Record formats and containers; every kind of bad row and broken file."""

import json

import pytest

from data.folder import find_task, scan
from data.records import Record, Report, as_row, iter_records, load_records
from study.errors import LetheError


def write(path, rows, kind="jsonl"):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]" if kind == "json" else "\n".join(lines) + "\n", encoding="utf-8")
    return path


USER = (("user", "2+2?"),)
FORMATS = [
    ({"instruction": "2+2?", "input": "", "output": "4"}, [(USER, "4")]),
    ({"instruction": "Add.", "input": "2 2", "output": " 4\n"}, [((("user", "Add.\n2 2"),), "4")]),
    ({"instruction": "2+2?", "output": 4}, [(USER, "4")]),
    ({"instruction": "2+2?", "output": "4", "system": "Be brief."}, [((("system", "Be brief."), *USER), "4")]),
    (
        {"instruction": "And 3?", "output": "6", "history": [["2+2?", "4"]]},
        [(USER, "4"), ((*USER, ("assistant", "4"), ("user", "And 3?")), "6")],
    ),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, [(USER, "4")]),
    ({"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, [(USER, "4")]),
    (
        {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "a"), ("assistant", "b"))]},
        [((("system", "S"), ("user", "a")), "b")],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
                {"role": "assistant", "content": "4"},
            ]
        },
        [(USER, "4")],
    ),
    ({"prompt": "2+2?", "answer": "4"}, [(USER, "4")]),
    ({"prompt": "2+2?", "completion": "4"}, [(USER, "4")]),
    (
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        [(USER, "4")],
    ),
    ({"question": "2+2?", "answer": "4"}, [(USER, "4")]),
    ({"input": "2+2?", "output": "4", "id": 3}, [(USER, "4")]),
    (
        {
            "context_text": "Facts.",
            "qa_pairs": [{"question": "q1", "output": "a1"}, {"question": "q2", "output": "a2"}],
        },
        [((("user", "Facts.\n\nq1"),), "a1"), ((("user", "Facts.\n\nq2"),), "a2")],
    ),
]
BAD = [
    ([1], "a list, not an object"),
    ("text", "a str, not an object"),
    ({"foo": 1}, "no known format: its keys are foo"),
    ({"instruction": "x"}, "no output"),
    ({"instruction": "x", "output": "  \n"}, "empty output"),
    ({"instruction": "x", "output": ["4"]}, "output is list, not text"),
    ({"instruction": " ", "output": "4"}, "empty instruction and input"),
    ({"instruction": "x", "output": "4", "history": "y"}, "history is not a list"),
    ({"prompt": "x"}, "no answer"),
    ({"prompt": "", "answer": "4"}, "no prompt"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "hi"}, "messages is str"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no answer: no assistant turn"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "no answer"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "turn 1 has the unknown role 'bot'"),
    ({"messages": [{"role": ["u"], "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "turn 1 is assistant after nothing"),
    ({"conversations": [{"from": "human", "value": "x"}] * 2}, "turn 2 is user after user"),
    ({"context_text": "c", "qa_pairs": []}, "no qa_pairs"),
    ({"context_text": "c", "qa_pairs": [{"question": "q"}]}, "pair 1: no output"),
    ({"instruction": "x", "output": "\ud800"}, "surrogate"),
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_formats(tmp_path, kind):
    path = write(tmp_path / "mixed.json", [row for row, _ in FORMATS], kind)
    report = Report()
    got = load_records(path, report=report)
    assert [(r.prompt, r.answer) for r in got] == [pair for _, pairs in FORMATS for pair in pairs]
    assert (report.rows, report.kept, report.dropped_count) == (len(FORMATS), len(got), 0)
    first = 1 if kind == "jsonl" else 2
    assert got[0].source == f"{path}:{first}" and got[-1].source == f"{path}:{first + len(FORMATS) - 1}"


CHINESE = "背景知识：李白是唐代诗人。\n问题：李白是哪个朝代的？"
QUESTION, ANSWER = "李白是哪个朝代的？", "唐代。"


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": ANSWER}]}, CHINESE),
        ({"conversations": [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": ANSWER}]}, CHINESE),
        ({"input": QUESTION, "output": ANSWER}, QUESTION),
        (
            {"context_text": "李白是唐代诗人。", "qa_pairs": [{"question": QUESTION, "output": ANSWER}]},
            "李白是唐代诗人。\n\n李白是哪个朝代的？",  # an empty line between context and question
        ),
        ({"context_text": "", "qa_pairs": [{"question": QUESTION, "output": ANSWER}]}, QUESTION),
    ],
)
def test_files_of_one_format_alone(tmp_path, kind, row, prompt):
    """Whole files of each format, in Chinese, escaped (as json.dumps writes by default) and not."""
    path = write(tmp_path / "data.json", [row] * 3, kind)
    assert [(r.prompt, r.answer) for r in load_records(path)] == [((("user", prompt),), ANSWER)] * 3
    path.write_text(json.dumps([row] * 3, indent=2))
    assert ANSWER not in path.read_text() and [(r.prompt, r.answer) for r in load_records(path)] == [((("user", prompt),), ANSWER)] * 3


def test_two_turns_and_more(tmp_path):
    """One record for every answer, with the conversation before it as its prompt."""
    turns = [{"role": role, "content": f"{role}{i}"} for i in (1, 2) for role in ("user", "assistant")]
    got = load_records(write(tmp_path / "a.jsonl", [{"messages": turns}]))
    assert [r.answer for r in got] == ["assistant1", "assistant2"]
    assert got[1].prompt == (("user", "user1"), ("assistant", "assistant1"), ("user", "user2"))


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_are_dropped_with_their_reason(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"prompt": "a", "answer": "b"}) + "\n" + json.dumps(row) + "\n")
    report = Report()
    assert [r.answer for r in load_records(path, report=report)] == ["b"]
    assert report.dropped_count == 1 and report.dropped[0][0] == f"{path}:3" and reason in report.dropped[0][1]
    assert f"{path}:3: " in str(report)
    with pytest.raises(LetheError, match="rows.jsonl:3: "):
        load_records(path, strict=True)


def test_good_pairs_of_a_bad_row_stay(tmp_path):
    row = {"context_text": "c", "qa_pairs": [{"question": "q"}, {"question": "q", "output": "a"}]}
    report = Report()
    assert len(load_records(write(tmp_path / "a.jsonl", [row]), report=report)) == 1
    assert (report.rows, report.kept, report.dropped_count) == (1, 1, 1)


def test_report_counts_all_and_keeps_twenty(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}] * 30 + [{"prompt": "x", "answer": "y"}])
    report = Report()
    load_records(path, report=report)
    assert report.dropped_count == 30 and len(report.dropped) == 20 and "and 10 more" in str(report)


def test_broken_line_is_dropped_but_a_cut_last_line_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"prompt": "a", "answer": "b"}\n'
    path.write_bytes(good + b'{"prompt": \n' + b'{"prompt": "\xff", "answer": "b"}\n' + good)
    report = Report()
    assert len(load_records(path, report=report)) == 2
    assert [place.rsplit(":", 1)[1] for place, _ in report.dropped] == ["2", "3"]
    path.write_bytes(good + good[:-9])
    with pytest.raises(LetheError, match=r"a.jsonl:2: the file is cut off"):
        load_records(path)


def test_line_ends_inside_strings_do_not_split(tmp_path):
    text = "a\u0085b\u2028c\x0bd"
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "answer": "x"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_records(path)[0].prompt == (("user", text),)


@pytest.mark.parametrize("cut", range(1, 140, 7))
def test_cut_array_names_byte_and_row(tmp_path, cut):
    path = write(tmp_path / "a.json", [{"prompt": "\u00e9" * 9, "answer": "x"}, {"prompt": "b", "answer": 12}] * 2, "json")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with pytest.raises(LetheError, match=r"cut off.* at byte \d+, after \d whole rows|not UTF-8"):
        load_records(path)


def test_cut_array_place_is_right(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('[\n{"prompt": "é", "answer": "b"},\n{"prompt": "c", '.encode())
    with pytest.raises(LetheError, match=r"a.json:3: the file is cut off at byte 51, in a row that begins at byte 35, after 1 whole rows"):
        load_records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("[]", "no row to train on"),
        ("{}\n", "no row to train on among 1; the first: .*:1: no known format"),
        ("[1, 2,]", "a comma before"),
        ('[{"prompt": "a", "answer": "b"} {"x": 1}]', "no comma"),
        ('[{"prompt": "a", "answer": "b"}] []', "more after the array's end"),
        ('[{"prompt": "a" "answer": "b and much more text that follows"}, {"prompt": 1}]', "row 1 is not JSON"),
        ('{\n "prompt": "a",\n "answer": "b"\n}\n', "one JSON value over many lines"),
        ("\0\0\0", "binary"),
        ("garbage\n", "no row to train on"),
        ("garbage", "no row to train on among 1; the first: .*:1: not JSON"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LetheError, match=message):
        load_records(path)


def test_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(LetheError, match="no such file; train.jsonl lies beside it"):
        load_records(tmp_path / "trian.jsonl")
    with pytest.raises(LetheError, match="cannot be read"):
        load_records(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(LetheError, match="convert it"):
        load_records(tmp_path / "a.csv")


def test_array_is_streamed_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("data.rows._CHUNK", 7)
    rows = [{"prompt": f"\u00e9 {i} \U0001f600", "answer": "x" * (i % 50) + "."} for i in range(200)]
    path = write(tmp_path / "a.json", rows, "json")
    got = load_records(path)
    assert [r.prompt[0][1] for r in got] == [row["prompt"] for row in rows]
    assert [r.source for r in got] == [f"{path}:{i + 2}" for i in range(200)]
    path.write_text(json.dumps([12345] * 20 + rows[:1]))
    report = Report()
    load_records(path, report=report)
    assert report.dropped_count == 20  # a number cut by a window's end is still one row


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}]), path)
    report = Report()
    assert load_records(path, report=report) == [Record((("user", "a"),), "b", f"{path}:1")]
    assert report.dropped == [(f"{path}:2", "no answer")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LetheError, match="damaged parquet"):
        load_records(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(LetheError, match="pip install pyarrow"):
        load_records(tmp_path / "a.parquet")


def test_iter_records_is_lazy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", ')
    stream = iter_records(path)
    assert next(stream).answer == "b"
    with pytest.raises(LetheError):
        next(stream)


def rows_of(count):
    return [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(count)]


def test_given_file_holds_back_a_tenth(tmp_path):
    path = write(tmp_path / "mine.jsonl", rows_of(40) + rows_of(3))
    task = find_task(f"mine={path}", tmp_path)
    train, again = list(task.train()), list(task.train())
    assert (task.name, task.answer_kind, task.max_new_tokens, len(task.test)) == ("mine", "text", 256, 4)
    assert train == again and not {r.prompt for r in train} & {r.prompt for r in task.test}
    assert 36 <= len(train) <= 39 and len(task.fingerprint) == 64 and task.train_path == path
    assert find_task(f"mine={path}").test == task.test


def test_an_array_on_one_line(tmp_path):
    """json.dump writes no line ends; the rows are told apart all the same, in places and when some are held back."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([*rows_of(20), {"prompt": "x"}]))
    report = Report()
    got = load_records(path, report=report)
    assert [r.source for r in got[:3]] == [f"{path}:1", f"{path}:1 (row 2)", f"{path}:1 (row 3)"]
    assert report.dropped == [(f"{path}:1 (row 21)", "no answer")]
    task = find_task(f"mine={path}", tmp_path)
    assert (len(task.test), len(list(task.train()))) == (2, 18)


def test_given_file_keeps_a_conversation_whole(tmp_path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = write(
        tmp_path / "c.jsonl",
        [{"messages": [{**t, "content": f"{t['content']}{i}"} for t in turns * 3]} for i in range(20)],
    )
    task = find_task(f"c={path}")
    assert not {r.source for r in task.train()} & {r.source for r in task.test} and len(task.test) == 6


def test_given_test_file_and_sibling(tmp_path):
    train, test = write(tmp_path / "t.jsonl", rows_of(5)), write(tmp_path / "other.jsonl", rows_of(2))
    task = find_task(f"t={train}:{test}")
    assert (len(list(task.train())), len(task.test)) == (5, 2)
    write(tmp_path / "t_test.jsonl", rows_of(3))
    assert len(find_task(f"t={train}").test) == 3
    with pytest.raises(LetheError, match="no such file"):
        find_task(f"t={tmp_path / 'absent.jsonl'}")
    with pytest.raises(LetheError, match="cannot name a task"):
        find_task(f"a/b={train}")
    lone = write(tmp_path / "lone.jsonl", rows_of(1))
    with pytest.raises(LetheError, match="one row only"):
        find_task(f"lone={lone}")


def test_folder_task(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    train = write(folder / "gsm8k_remaining_train.json", rows_of(5), "json")
    with pytest.raises(LetheError, match="gsm8k_test.json: no such file"):
        find_task("gsm8k", tmp_path)
    write(folder / "gsm8k_test.json", rows_of(2), "json")
    task = find_task("gsm8k", tmp_path)
    assert (task.answer_kind, len(list(task.train())), len(task.test), task.replay) == ("number", 5, 2, None)
    write(folder / "gsm8k_train_1p.json", rows_of(1), "json")
    assert len(list(find_task("gsm8k", tmp_path).replay())) == 1
    write(train, rows_of(6), "json")
    assert find_task("gsm8k", tmp_path).fingerprint != task.fingerprint
    (tmp_path / "empty").mkdir()
    assert "gsm8k" in scan(tmp_path) and "empty" not in scan(tmp_path)


def test_unknown_tasks(tmp_path):
    with pytest.raises(LetheError, match="unknown task 'mini_gsm9k'; did you mean mini_gsm8k"):
        find_task("mini_gsm9k", tmp_path)
    with pytest.raises(LetheError, match="task svamp is not prepared.*python -m data.prepare svamp"):
        find_task("svamp", tmp_path)
    with pytest.raises(LetheError, match="Known: mini_gsm8k"):
        find_task("../x", tmp_path / "nowhere")


def test_builtin_task():
    task = find_task("mini_svamp")
    assert task.answer_kind == "number" and len(task.test) >= 200 and len(list(task.train())) >= 600
    assert {r.group for r in task.test} == {"", "held_out"} and task.fingerprint == find_task("mini_svamp").fingerprint


def test_references_and_original(tmp_path):
    """Of any row with one record; the answer comes first, equal ones stay. What is no list of texts is another column."""
    asked = {"instruction": "Simplify.", "input": "He commenced.", "output": "He began."}
    rows = [
        asked | {"references": ["He started.", " He began.\n", "", "He started."], "original": " He commenced. "},
        {"prompt": "2+2?", "answer": "4", "references": ["4", "four"]},
        asked | {"references": ["He began."]},
        asked | {"references": [{"url": "x"}], "original": {"id": 3}},
        {"instruction": "And 3?", "output": "6", "history": [["2+2?", "4"]], "references": ["six"]},
        asked | {"references": ["half \ud83d"]},
    ]
    report = Report()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load_records(tmp_path / "rows.jsonl", report=report)
    assert [record.references for record in records] == [("He began.", "He started.", "He started."), ("4", "four"), (), (), (), ()]
    assert [record.original for record in records] == ["He commenced.", "", "", "", "", ""]
    assert report.dropped_count == 1 and "reference holds half of a surrogate pair" in report.dropped[0][1]
    again = write(tmp_path / "again.jsonl", [as_row(record) for record in records])
    assert [(r.prompt, r.answer, r.references, r.original) for r in load_records(again)] == [
        (r.prompt, r.answer, r.references, r.original) for r in records
    ]
    assert as_row(records[2]).keys() == {"prompt", "answer"}
