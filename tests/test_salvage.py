"""Files that are cut off or damaged: the error names the byte, and salvage gives exactly the rows that are whole."""

import json
import re

import pytest

from data.folder import find_task
from data.records import Report, iter_records, load_records
from data.rows import iter_rows
from study.errors import LetheError

# Rows whose text can be cut in every awkward place: two to four bytes a character, escapes, surrogate pairs, brackets and quotes in
# strings, numbers, literals, white space that means nothing.
ROWS = [
    '{"prompt": "é 你好 \U0001f600", "answer": "ja"}',
    '{"prompt": "\\ud83d\\ude00 \\"[1, 2], {\\\\", "answer": -12.5e+3}',
    '{ "instruction" : "x" , "input" : null , "n" : [ true , false , {} ] , "output" : "]}" }',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\\u00e9\\n"}]}',
]


def array_of(rows: list[str], between: str = ",\n", inner: str = "\n") -> tuple[bytes, list[int]]:
    """A JSON array's bytes, and the byte at which each row ends."""
    text, ends = "[" + inner, []
    for row in rows:
        text += (between if ends else "") + row
        ends.append(len(text.encode()))
    return (text + inner + "]\n").encode(), ends


def lines_of(rows: list[str]) -> tuple[bytes, list[int]]:
    ends = [len("\n".join(rows[:count]).encode()) for count in range(1, len(rows) + 1)]
    return ("\n".join(rows) + "\n").encode(), ends


def salvaged(path) -> tuple[list, list[tuple[str, str]]]:
    lost = []
    rows = [row for _, row in iter_rows(path, lambda *found: lost.append(found), salvage=True)]
    return rows, lost


def error_of(path) -> str | None:
    """The message that reading without salvage ends with."""
    try:
        list(iter_rows(path))
    except LetheError as error:
        return str(error)
    return None


@pytest.mark.parametrize("chunk", [1 << 20, 5])
@pytest.mark.parametrize("form", ["array", "dense", "bom", "lines", "bom lines"])
def test_a_file_cut_at_every_byte(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr("data.rows._CHUNK", chunk)
    whole, ends = lines_of(ROWS) if form.endswith("lines") else array_of(ROWS, ",", "") if form == "dense" else array_of(ROWS)
    if form.startswith("bom"):
        whole, ends = b"\xef\xbb\xbf" + whole, [end + 3 for end in ends]
    last = ends[-1] if form.endswith("lines") else whole.rindex(b"]") + 1  # nothing of it is missing from here on
    begins = [whole.rindex(row.encode()) for row in ROWS]
    path, rows = tmp_path / "a.json", [json.loads(row) for row in ROWS]
    for cut in range(4 if form.startswith("bom") else 1, len(whole)):
        path.write_bytes(whole[:cut])
        done = sum(end <= cut for end in ends)
        message, (found, lost) = error_of(path), salvaged(path)
        assert found == rows[:done], cut
        at_a_line = form.endswith("lines") and cut in {at for end in ends for at in (end, end + 1)}
        if cut >= last or at_a_line:  # a cut between lines cannot be seen
            assert message is None and lost == [], cut
            continue
        assert f"cut off at byte {cut}" in message and f"after {done} whole rows; get the whole file" in message
        assert lost == [(message.split(": ")[0], f"the file is cut off at byte {cut} after {done} whole rows; the rest is lost")]
        inside = re.search(r"in a row that begins at byte (\d+)", message)
        assert (int(inside[1]) if inside else cut) == (begins[done] if done < len(ROWS) and begins[done] < cut else cut)
        line = 1 + whole.count(b"\n", 0, int(inside[1]) if inside else cut)
        assert lost[0][0] == f"{path}:{line}"


@pytest.mark.parametrize("garbage", [b"\xff\xfe\xfd", b"\0" * 40, b"<html>\n404\n</html>", b"}]", b"\xe4\xbd"])
def test_an_array_whose_end_is_garbage(tmp_path, garbage):
    """What follows byte `cut` was overwritten, as by a download that failed and a proxy's page."""
    whole, ends = array_of(ROWS, ",", "")
    path, rows = tmp_path / "a.json", [json.loads(row) for row in ROWS]
    for cut in range(4, len(whole) - 1):  # a file whose first bytes hold zeros is told to be binary
        path.write_bytes(whole[:cut] + garbage)
        try:
            expected = json.loads(path.read_bytes())  # garbage that happens to be right
        except ValueError:
            expected = None
        message, (found, lost) = error_of(path), salvaged(path)
        if expected is not None:
            assert (found, message) == (expected, None)
            continue
        done = sum(end <= cut for end in ends)
        if garbage == b"}]" and found[:done] == rows[:done] and len(found) == done + 1:  # it closed a row that was open
            done, rows_now = done + 1, rows[:done] + found[done:]
        else:
            rows_now = rows
        assert found == rows_now[:done] and len(lost) == 1 and lost[0][1].endswith(f"after {done} whole rows; the rest is lost")
        assert 0 <= int(re.search(r" at byte (\d+)", message)[1]) <= cut + len(garbage)


def test_the_byte_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('[{"prompt": "é", "answer": "b"},\n{"prompt": "'.encode() + b"\xe9t\xe9" + b'", "answer": "b"}]')
    with pytest.raises(LetheError, match=r"a.json:2: not UTF-8 \(invalid continuation byte\) at byte 46, after 1 whole rows"):
        load_records(path)
    assert path.read_bytes()[46:47] == b"\xe9"
    assert len(load_records(path, salvage=True)) == 1


@pytest.mark.parametrize("numbers", [["12", "-3.5", "1e+2", "0"], ["true", "null", '"x"', "[]"]])
def test_rows_that_are_no_objects_are_cut_like_others(tmp_path, numbers):
    """A number at the end of the text may go on; a literal, a string or a list that is closed does not."""
    path = tmp_path / "a.json"
    for between in (",", " ,\n "):
        whole, ends = array_of(numbers, between, "")
        for cut in range(1, len(whole) - 2):
            path.write_bytes(whole[:cut])
            number = re.search(rb"[-+.\w]+$", whole[:cut]) and numbers[0] == "12"
            done = sum(end <= cut for end in ends) - bool(number and cut in ends)
            assert salvaged(path)[0] == [json.loads(text) for text in numbers[:done]], whole[:cut]
            assert f"after {done} whole rows" in error_of(path)


def test_a_number_of_too_many_digits_is_told(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": ' + "9" * 5000 + "}]")
    with pytest.raises(LetheError, match="row 2 is not JSON .* at byte 33, after 1 whole rows"):
        load_records(path)


@pytest.mark.parametrize("kind", ["array", "lines"])
def test_what_was_lost_stands_in_the_report(tmp_path, kind):
    rows = [json.dumps({"prompt": f"q{i}", "answer": f"a{i}"}) for i in range(5)]
    whole, ends = array_of(rows) if kind == "array" else lines_of(rows)
    path, report = tmp_path / "mine.json", Report()
    path.write_bytes(whole[: ends[2] + 9])
    assert [record.answer for record in load_records(path, report=report, salvage=True)] == ["a0", "a1", "a2"]
    where, line = ends[2] + 9, 5 if kind == "array" else 4
    assert report.dropped == [(f"{path}:{line}", f"the file is cut off at byte {where} after 3 whole rows; the rest is lost")]
    assert (report.rows, report.kept, report.dropped_count) == (4, 3, 1) and f"mine.json:{line}: the file is cut off" in str(report)
    with pytest.raises(
        LetheError, match=rf"mine.json:{line}: the file is cut off at byte {where}.* or take the rows before it with --salvage"
    ):
        load_records(path)
    with pytest.raises(LetheError, match="the rest is lost"):  # strict forbids every loss
        load_records(path, strict=True, salvage=True)
    path.write_bytes(whole)
    assert load_records(path, salvage=True) == load_records(path) and len(load_records(path)) == 5


def test_salvage_passes_over_bad_rows_too_and_needs_one_good_one(tmp_path):
    path, report = tmp_path / "a.jsonl", Report()
    path.write_text('{"prompt": "a", "answer": "b"}\n{"foo": 1}\nnonsense\n{"prompt": "c", "ans')
    assert len(load_records(path, report=report, salvage=True)) == 1
    assert [where.rsplit(":", 1)[1] for where, _ in report.dropped] == ["2", "3", "4"]
    assert report.dropped[2][1].endswith("after 2 whole rows; the rest is lost")
    path.write_text('[{"prompt": "c", "ans')
    with pytest.raises(LetheError, match="no row to train on among 1; the first: .*a.jsonl:1: .*cut off at byte 21 after 0 whole rows"):
        load_records(path, salvage=True)


def test_salvage_streams(tmp_path):
    """Rows come before the end of the file is looked at."""
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "answer": "b"}, {"prompt": ')
    stream = iter_records(path, salvage=True)
    assert next(stream).answer == "b" and list(stream) == []


def test_a_task_of_a_cut_file(tmp_path):
    """A tenth of the whole rows is held back, and training's report says what was lost."""
    path, whole = tmp_path / "mine.json", json.dumps([{"prompt": f"question {i}", "answer": f"a{i}"} for i in range(41)])
    path.write_text(whole[:-20])
    with pytest.raises(LetheError, match="cut off at byte"):
        find_task(f"mine={path}")
    task, report = find_task(f"mine={path}", salvage=True), Report()
    rows = list(task.train(report=report))
    assert len(task.test) == 4 and len(rows) == 36 and list(task.train()) == rows
    assert "after 40 whole rows; the rest is lost" in report.dropped[0][1] and task.test_report.dropped == report.dropped
    (tmp_path / "mine_test.json").write_text(whole[:-1])
    assert len(find_task(f"mine={path}", salvage=True).test) == 41


def test_what_salvage_does_not_mend(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (("", "empty"), ('{\n "prompt": "a",\n "ans', "one JSON value over many lines"), ("\0\0", "binary")):
        path.write_text(text)
        with pytest.raises(LetheError, match=message):
            load_records(path, salvage=True)


def test_a_cut_parquet_file_is_an_error_with_salvage_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": f"a{i}", "answer": "b"} for i in range(50)]), path)
    whole = path.read_bytes()
    for cut in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(LetheError, match="damaged parquet file after 0 rows"):
            load_records(path, salvage=True)


def test_a_real_file_cut_in_the_middle(tmp_path, real_data):
    """GSM8K's training rows as an array and as lines, cut at a third; the whole rows by json itself."""
    lines = (real_data / "gsm8k" / "train.jsonl").read_bytes().splitlines(keepends=True)
    for whole in (b"".join(lines), b"[\n" + b",".join(lines) + b"]"):
        cut, path = len(whole) // 3, tmp_path / "cut.json"
        path.write_bytes(whole[:cut])
        parts = whole[:cut].removeprefix(b"[\n").split(b"\n")[:-1]
        expected = [json.loads(part.lstrip(b",")) for part in parts]
        assert len(expected) > 2000 and salvaged(path)[0] == expected
        assert f"cut off at byte {cut}" in error_of(path)
