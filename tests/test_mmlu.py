"""MMLU: files as they are, prompts as lm-evaluation-harness words them, tokens, and letters said or scored."""

import csv
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from data.benchmarks import Item
from data.builtin_mmlu import mini_mmlu
from data.folder import task_modules
from data.questions import as_questions
from data.tasks.mmlu import chat_prompt, load_mmlu, said_letter
from model import load_model, load_tokenizer
from model.choices import score_options
from model.tokenizer import Tokenizer
from study.errors import LetheError

TRAPS = [
    ["A question\nof two lines?\n", "None", "1,000", "007", "x\ny", "B"],
    ["\u00a0Which \u0085 one \ufeff, \u201cthis\u201d\u2028?", "0", "0", "2.50", "nan", "A"],
    ["Lines like options?\nA. no\nB. neither\nD. nor", "one", "two", "thr\ree", "four", "D"],
]
DEV = [[f"Solved {k}?", "a", "b", "c", "d", "ABCD"[k % 4]] for k in range(5)]


def write_csv(file: Path, rows: list[list], ending: str = "\n", bom: bool = False) -> None:
    """As the released files are: no header, line ends of either kind, the last one sometimes missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as out:
        csv.writer(out, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows(rows)
    file.write_bytes(file.read_bytes().removesuffix(ending.encode()))


@pytest.fixture
def root(tmp_path) -> Path:
    """Two subjects; the second with other line ends, also within its fields, and a byte order mark."""
    write_csv(tmp_path / "mmlu" / "test" / "abstract_traps_test.csv", TRAPS)
    windows = [[field.replace("\n", "\r\n") for field in row] for row in TRAPS]
    write_csv(tmp_path / "mmlu" / "test" / "windows_test.csv", windows, "\r\n", bom=True)
    for subject in ("abstract_traps", "windows"):
        write_csv(tmp_path / "mmlu" / "dev" / f"{subject}_dev.csv", DEV)
    return tmp_path / "mmlu"


def test_every_field_comes_as_it_is(root):
    found = load_mmlu(root, shots=0)
    assert found.name == "mmlu_0shot" and found.spec == {"mmlu": str(root.resolve()), "shots": 0, "max_items": None}
    one, other = ([item for item in found.items if item.subject == subject] for subject in ("abstract_traps", "windows"))
    assert one[0].question == "A question\nof two lines?\nA. None\nB. 1,000\nC. 007\nD. x\ny\nAnswer:"
    assert one[1].question == "Which \u0085 one \ufeff, \u201cthis\u201d\u2028?\nA. 0\nB. 0\nC. 2.50\nD. nan\nAnswer:"
    assert [item.question for item in one] == [item.question for item in other]
    assert "C. thr\ree\n" in one[2].question  # a lone one ends no line
    assert [item.gold for item in one] == [1, 0, 3] and one[0].options == (" A", " B", " C", " D") and one[0].shots == ()
    assert one[0].header == "The following are multiple choice questions (with answers) about abstract traps.\n\n"
    assert one[2].source == f"{root}/test/abstract_traps_test.csv:3"


def test_where_the_files_may_lie(root, tmp_path):
    expected = load_mmlu(root, 0).fingerprint
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "data").symlink_to(root)
    (tmp_path / "bare").symlink_to(root / "test")
    for folder in (tmp_path / "tar", root / "test", tmp_path / "bare"):
        assert load_mmlu(folder, 0).fingerprint == expected
    assert load_mmlu(root / "test", 5).fingerprint == load_mmlu(tmp_path / "tar", 5).fingerprint != expected
    assert load_mmlu(root, 5).fingerprint != load_mmlu(root, 4).fingerprint
    with pytest.raises(LetheError, match="_dev.csv: no such file, and --shots 5 takes its examples from there; give --shots 0"):
        load_mmlu(tmp_path / "bare")


def test_shots_are_the_first_of_dev(root):
    item = load_mmlu(root, 2).items[0]
    assert item.shots == ("Solved 0?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n", "Solved 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n")
    with pytest.raises(LetheError, match="5 solved examples of abstract_traps, not 6; give --shots 5"):
        load_mmlu(root, 6)
    with pytest.raises(LetheError, match="--shots must be 0 or more"):
        load_mmlu(root, -1)


def test_worded_as_lm_evaluation_harness_words_them(root):
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("no lm_eval")
    import jinja2
    import yaml

    default = Path(spec.submodule_search_locations[0]) / "tasks" / "mmlu" / "default"
    template = jinja2.Template(yaml.safe_load((default / "_default_template_yaml").read_text())["doc_to_text"])
    header = yaml.safe_load((default / "mmlu_abstract_algebra.yaml").read_text().replace("include:", "_:"))["description"]
    items = load_mmlu(root, 5).items[:3]
    for item, (question, *choices, _) in zip(items, TRAPS, strict=True):
        assert item.question == template.render(question=question, choices=choices)
        assert item.header == header.replace("algebra", "traps")
    solved = [template.render(question=question, choices=choices) + f" {key}\n\n" for question, *choices, key in DEV]
    assert items[0].shots == tuple(solved)


def test_json_files(tmp_path):
    rows = [{"question": q, "choices": list(choices), "answer": "ABCD".index(key), "subject": "s"} for q, *choices, key in TRAPS]
    letters = [{**row, "answer": " abcd"[row["answer"] + 1]} for row in rows]
    forms = {
        "list": json.dumps(rows),
        "letters": json.dumps(letters),
        "by subject": json.dumps({"s": [{k: v for k, v in row.items() if k != "subject"} for row in rows]}, indent=1),
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "numbers": json.dumps([rows[0], {**rows[1], "choices": [0, 0, "2.50", "nan"]}, rows[2]]),
    }
    write_csv(tmp_path / "csv" / "s_test.csv", TRAPS)
    expected = load_mmlu(tmp_path / "csv", 0)
    for name, text in forms.items():
        file = tmp_path / name / "test_all_subjects.json"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        found = load_mmlu(file, 0)
        assert found.fingerprint == expected.fingerprint, name
        assert [item.gold for item in found.items] == [1, 0, 3] and found.items[1].source == f"{file}:2"
    with pytest.raises(LetheError, match="no solved examples and dev_all_subjects.json does not lie beside it, and --shots 5 needs some"):
        load_mmlu(file)
    solved = [{"question": q, "choices": list(choices), "answer": key, "subject": "s"} for q, *choices, key in DEV]
    (file.parent / "dev_all_subjects.json").write_text(json.dumps(solved))
    assert len(load_mmlu(file).items[0].shots) == 5
    (file.parent / "other.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "subject"} for row in rows]))
    item = load_mmlu(file.parent / "other.json", 0).items[0]
    assert item.subject == "" and item.header == "The following are multiple choice questions (with answers).\n\n"


CSV_FAULTS = {
    "six columns": ("q,a,b,c,d,A\nq,a,b,c,D\n", "x_test.csv:2: 5 columns, not 6 (question, A, B, C, D, key)"),
    "key": ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "x_test.csv:2: the answer is none of A, B, C, D or 0 to 3"),
    "header": ("question,A,B,C,D,answer\nq,a,b,c,d,A\n", "x_test.csv:1: the answer is none of"),
    "question": (" ,a,b,c,d,A\n", "x_test.csv:1: no question"),
    "choice": ("q,a,,c,d,A\n", "x_test.csv:1: choice B is empty or no text"),
    "cut": ('q,a,b,c,d,A\n"q,a,b', "x_test.csv: no csv at line 2 (unexpected end of data); is the file cut?"),
    "bytes": (b"q,a,b,c,d,A\nq\xff,a,b,c,d,A\n", "x_test.csv: not UTF-8 (invalid start byte"),
    "empty": ("", "its *_test.csv files are empty"),
}
GOOD = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}
JSON_FAULTS = {
    "answer": (json.dumps([GOOD, {**GOOD, "answer": 4}]), "test.json:2: the answer is none of"),
    "truth": (json.dumps([{**GOOD, "answer": True}]), "test.json:1: the answer is none of"),
    "choices": (json.dumps([{**GOOD, "choices": ["a", "b", "c"]}]), "test.json:1: 3 choices, not 4"),
    "no choices": (json.dumps([{"question": "q", "answer": 1}]), "test.json:1: no list of choices, not 4"),
    "null": (json.dumps([{**GOOD, "choices": ["a", None, "c", "d"]}]), "test.json:1: choice B is empty or no text"),
    "no row": (json.dumps([GOOD, "text"]), "test.json:2: a str, not an object"),
    "subject": (json.dumps([{**GOOD, "subject": 3}]), "test.json:1: the subject is 3, not text"),
    "none": ("[]", "test.json: no question in it"),
    "cut": (json.dumps([GOOD, GOOD])[:-9], "test.json"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_csv_faults(tmp_path, fault):
    text, told = CSV_FAULTS[fault]
    (tmp_path / "x_test.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(LetheError) as error:
        load_mmlu(tmp_path, 0)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_faults(tmp_path, fault):
    text, told = JSON_FAULTS[fault]
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(LetheError) as error:
        load_mmlu(tmp_path / "test.json", 0)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(LetheError, match="nowhere: no such file or folder; MMLU is a folder"):
        load_mmlu(tmp_path / "nowhere")
    with pytest.raises(LetheError, match="no \\*_test.csv in it"):
        load_mmlu(tmp_path)
    assert "mmlu" not in task_modules() and "gsm8k" in task_modules()  # data.prepare makes no training data of it


def test_fewer_items_are_spread_evenly(tmp_path):
    for subject, count in (("a", 3), ("b", 20), ("c", 20)):
        write_csv(tmp_path / f"{subject}_test.csv", [[f"{subject} {k}?", "a", "b", "c", "d", "A"] for k in range(count)])
    found = {n: load_mmlu(tmp_path, 0, n) for n in (1, 2, 6, 11, 30, 43, 99)}
    chosen = {n: {item.source for item in benchmark.items} for n, benchmark in found.items()}
    assert [len(names) for names in chosen.values()] == [1, 2, 6, 11, 30, 43, 43]
    assert Counter(item.subject for item in found[6].items) == {"a": 2, "b": 2, "c": 2}
    assert sorted(Counter(item.subject for item in found[11].items).values()) == [3, 4, 4]  # a has no more
    assert chosen[1] < chosen[2] < chosen[6] < chosen[11] < chosen[30] < chosen[43]
    assert chosen[6] != {f"{tmp_path}/{s}_test.csv:{k}" for s in "abc" for k in (1, 2)}  # drawn, not the first ones
    order = [item.source for item in found[43].items]
    assert [item.source for item in found[30].items] == [source for source in order if source in chosen[30]]
    assert load_mmlu(tmp_path, 0, 6) == found[6] and found[6].spec["max_items"] == 6
    with pytest.raises(LetheError, match="must be 1 or more, not 0"):
        load_mmlu(tmp_path, 0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# As tokens


def whole(tokenizer, item: Item, shots: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    """The plain way: the prompt, and every option with the whole prompt before it."""
    text = item.header + "".join(shots) + item.question
    ids = tokenizer.encode(text)
    both = [tokenizer.encode(text + option) for option in item.options]
    rest = [b[len(ids) :] if b[: len(ids)] == ids else tokenizer.encode(option) for b, option in zip(both, item.options, strict=True)]
    return [tokenizer.bos, *ids], rest


@pytest.fixture(scope="module")
def nano():
    return load_tokenizer("nano")


def test_tokens_equal_the_plain_way(root, nano):
    items = load_mmlu(root, 5).items + mini_mmlu().items[::5]
    items += [
        Item("odd", text, (" yes", "no", "ne", "\n", "! "), 0) for text in ("ends in a line end\n", "ends in a space ", "a\n\n  b", "n")
    ]
    found, fit = as_questions(items, nano, 10_000)
    assert fit.lost_shots == fit.cut == 0
    for item, question in zip(items, found, strict=True):
        prompt, options = whole(nano, item, item.shots)
        assert question.prompt == prompt and question.options == options and question.group == item.subject
        assert question.prompt.count(nano.bos) == 1
    assert {len(option) for question in found for option in question.options} > {1, 2}


def test_a_last_line_without_tokens_of_its_own():
    """A tokenizer that joins across line ends, and puts a mark before whatever it is given apart."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers

    vocabulary = {text: number for number, text in enumerate(["\n", "A", "B", "q", "\u2581", "\nA", "\nAB"])}
    hf = HFTokenizer(models.BPE(vocabulary, [("\n", "A"), ("\nA", "B")]))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    (question,), _ = as_questions([Item("s", "q\nA", ("B",), 0)], Tokenizer(hf, {}, None, [0], "plain"), 100)
    assert question.prompt == [4, 3, 5] and question.options == [[4, 2]]  # "\nAB" is one token: B is encoded apart


def test_first_shots_go_until_it_fits(root, nano):
    items = load_mmlu(root, 5).items[:3]
    sizes = [[len(whole(nano, items[0], items[0].shots[lost:])[0]) for lost in range(6)] for _ in items]
    for lost in range(6):
        question, *_ = as_questions(items, nano, sizes[0][lost])[0]
        assert question.prompt == whole(nano, items[0], items[0].shots[lost:])[0]
        assert question.group == (f"abstract_traps, {5 - lost} shots" if lost else "abstract_traps")
    questions, fit = as_questions(items, nano, sizes[0][1])
    assert fit.lost_shots >= 1 and all(len(q.prompt) <= sizes[0][1] for q in questions)
    questions, fit = as_questions(items, nano, 20)
    ids = whole(nano, items[0], ())[0]
    assert (fit.lost_shots, fit.cut) == (3, 3) and questions[0].prompt == [*ids[:10], *ids[-10:]]
    long = Item("s", "q", (" a", " one two three four"), 0, source="here:3")
    (question,), fit = as_questions([long], nano, 1 + 1 + len(nano.encode(" one two three four")) - 1)
    assert fit.cut == 0 and len(question.prompt) == 2
    with pytest.raises(LetheError, match="here:3: an option has too many tokens"):
        as_questions([long], nano, 3)
    with pytest.raises(LetheError, match="here:4: an option has no tokens"):
        as_questions([Item("s", "q", (" a", ""), 0, source="here:4")], nano, 100)


# ----------------------------------------------------------------------------------------------------------------------
# By generation

SAID = ["Answer: B", "Correct answer is B.", "Because x", "D. Panama", "The answer is D", "The answer is D.", "(C)"]


def test_said_letters():
    assert [said_letter(text) for text in SAID] == [1, 1, None, 3, 3, 3, 2]
    assert [said_letter(text) for text in ("", "The answer is E.", "E", "A", "2", "Option 2")] == [None, None, None, 0, None, None]


def test_chat_prompt(root):
    turns = chat_prompt(load_mmlu(root, 2).items[2])
    assert [role for role, _ in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[1][1] == "A" and turns[3][1] == "B" and "Question: Solved 1?\n\nOptions:\nA. a\nB. b\nC. c\nD. d\n\n" in turns[2][1]
    assert turns[4][1] == (
        "Please answer the following multiple choice question:\n\n"
        "Question: Lines like options?\nA. no\nB. neither\nD. nor\n\n"
        "Options:\nA. one\nB. two\nC. thr\ree\nD. four\n\n"
        "Please only answer with the option letter (A, B, C, or D)."
    )


# ----------------------------------------------------------------------------------------------------------------------
# The released files


@pytest.fixture(scope="module")
def llama3(real_data):
    return load_tokenizer(real_data / "llama-3.2-1b")


@pytest.fixture(scope="module")
def released(real_data):
    return load_mmlu(real_data / "mmlu", 5)


def test_released_files_load_whole(released, real_data):
    assert len(released.items) == 14042 and len({item.subject for item in released.items}) == 57
    shots = {item.subject: item.shots for item in released.items}
    assert {len(few) for few in shots.values()} == {5} and sum(map(len, shots.values())) == 285
    # Counted on the bytes: rows are where a line ends in a comma and a key.
    text = b"\n".join(file.read_bytes() for file in sorted((real_data / "mmlu" / "test").glob("*.csv"))).replace(b"\r\n", b"\n")
    keys = [line[-1:].decode() for line in text.split(b"\n") if line[-2:] in (b",A", b",B", b",C", b",D")]
    assert Counter("ABCD"[item.gold] for item in released.items) == Counter(keys)
    nones = sum(len(re.findall(r"\n[A-D]\. None(?=\n)", item.question)) for item in released.items)
    assert nones == len(re.findall(rb"(?<=,)None(?=,)", text)) > 5
    assert any("\u0085" in item.question for item in released.items) and not any("\r" in item.question for item in released.items)


def test_released_rows_come_back_from_their_prompts(released, real_data):
    for subject in ("formal_logic", "high_school_physics", "professional_law", "world_religions"):
        with (real_data / "mmlu" / "test" / f"{subject}_test.csv").open(newline="", encoding="utf-8") as file:
            rows = [[field.replace("\r\n", "\n") for field in row] for row in csv.reader(file)]
        items = [item for item in released.items if item.subject == subject]
        for (question, *choices, key), item in zip(rows, items, strict=True):
            options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
            assert f"Question: {question.strip()}\n\nOptions:\n{options}\n\nPlease" in chat_prompt(item)[-1][1]
            assert "ABCD"[item.gold] == key


def test_released_rows_as_llama_3_tokens(released, llama3):
    items = released.items[::301]
    found, fit = as_questions(items, llama3, 4096)
    letters = [[362], [426], [356], [423]]  # " A", " B", " C", " D"
    assert fit.lost_shots == fit.cut == 0 and all(question.options == letters for question in found)
    assert all((q.prompt, q.options) == whole(llama3, item, item.shots) for item, q in zip(items, found, strict=True))


def test_five_shot_letters_equal_those_of_transformers_one_by_one(released, llama3, tmp_path):
    """The real vocabulary and rows, four layers of random weights: benchmarks/mmlu.py does it for more items."""
    from transformers import LlamaForCausalLM

    from benchmarks.common import SHAPES
    from benchmarks.decode import write_model

    folder = write_model(SHAPES["cpu"], tmp_path, 0)
    model, theirs = load_model(folder, torch.float32), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    by_subject = {item.subject: [] for item in released.items}
    for item in released.items:
        by_subject[item.subject].append(item)
    shortest = sorted(by_subject.values(), key=lambda items: sum(map(len, items[0].shots)))[:5]
    items = [item for items in shortest for item in items[:8]]
    questions, _ = as_questions(items, llama3, 2048)
    found = torch.tensor([[option.logprob for option in row] for row in score_options(model, questions)], dtype=torch.float64)
    with torch.no_grad():
        logits = [theirs(torch.tensor([question.prompt]), logits_to_keep=1).logits[0, -1] for question in questions]
    expected = torch.stack(logits).double().log_softmax(-1)[:, [362, 426, 356, 423]]
    assert len(found) == 40 and expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 and torch.equal(found.argmax(-1), expected.argmax(-1))


def test_benchmark_runs(tmp_path, capsys):
    from benchmarks import mmlu

    assert mmlu.main(["--toy", "--rounds", "1", "--out", str(tmp_path / "found.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["same_argmax"] == 12 and result["largest_difference"] < 1e-4 and result["ratio"] > 0
    assert json.loads((tmp_path / "found.json").read_text())["prompt_tokens"] == result["prompt_tokens"]
    assert mmlu.main(["--toy", "--data", "somewhere"]) == 2 and "go together" in capsys.readouterr().err


def test_benchmark_reads_the_files(root, tmp_path):
    from benchmarks import mmlu

    settings = mmlu.PRESETS["toy"]
    questions = mmlu.released_questions(settings, str(root), "nano", 5)
    assert len(questions) == 6 and {question.group for question in questions} == {"abstract_traps", "windows"}
