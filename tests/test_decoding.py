"""One function for all ways to decode; what the settings say of it, and that scores depend on them and on nothing else."""

import dataclasses

import pytest
from test_generate import model, ragged  # noqa: F401  a fixture
from tiny import SMALL, TASKS, one_line

import eval as evaluation
import train
from data.folder import find_task
from model.beam import beam_search
from model.decoding import GREEDY, Decoding, decode, seed_of
from model.generate import Decoder, generate
from model.sampling import sample
from model.subject import load_subject
from study.config import changed, config_text, parse, parse_eval
from study.errors import LetheError
from study.folder import read_json, read_jsonl
from study.identity import differences, identity_of
from study.settings import DECODING, EvalConfig, EvaluationConfig

BEAMS = Decoding(num_beams=3, length_penalty=0.8, no_repeat_ngram_size=2)
DRAWN = Decoding(temperature=0.8, top_p=0.9, top_k=50, no_repeat_ngram_size=3)


def test_each_way(model):  # noqa: F811
    prompts, decoder, seeds = ragged(9), Decoder(model, 4), range(9)
    assert GREEDY.greedy and decode(model, prompts, 8, [3], GREEDY) == generate(model, prompts, 8, [3])
    expected = {
        BEAMS: beam_search(model, prompts, 8, [3], num_beams=3, length_penalty=0.8, no_repeat_ngram_size=2),
        DRAWN: sample(model, prompts, 8, [3], temperature=0.8, top_p=0.9, top_k=50, no_repeat_ngram_size=3, seeds=seeds),
        Decoding(repetition_penalty=1.5): sample(model, prompts, 8, [3], temperature=0, repetition_penalty=1.5, seeds=seeds),
    }
    for how, outputs in expected.items():
        assert not how.greedy
        for more in ({}, {"decoder": decoder}, {"batch_size": 5}):
            heard = []
            assert decode(model, prompts, 8, [3], how, seeds=seeds, on_done=heard.append, **more) == outputs
            assert sum(heard) == 9
    assert decode(model, prompts, 8, [3], GREEDY, decoder=decoder) == generate(model, prompts, 8, [3])
    with pytest.raises(ValueError, match="needs a seed"):
        decode(model, prompts, 8, [3], DRAWN)


@pytest.mark.parametrize("settings, words", [
    ({"num_beams": 5, "temperature": 0.8}, "num_beams 5 searches and temperature 0.8 draws"), ({"length_penalty": 0.9}, "give num_beams"),
    ({"top_p": 0.9}, "give a temperature"), ({"num_beams": 2, "top_k": 5}, "give a temperature"),
])  # fmt: skip
def test_contradictions(settings, words):
    with pytest.raises(LetheError, match=words):
        Decoding(**settings)
    config = changed(parse(["--model", "nano"]), {f"evaluation.{name}": value for name, value in settings.items()})
    with pytest.raises(LetheError, match=f"evaluation: .*{words}"):
        evaluation.check_decoding(config.evaluation, TASKS, "data")
    config = changed(parse(["--model", "nano"]), {"evaluation.decoding": {"mini_svamp": settings}})
    with pytest.raises(LetheError, match=f"decoding of mini_svamp: .*{words}"):
        evaluation.check_decoding(config.evaluation, TASKS, "data")


def test_the_leaves_are_the_fields():
    fields = {f.name: f.default for f in dataclasses.fields(Decoding)}
    assert set(fields) == set(DECODING)
    for kind in (EvaluationConfig, EvalConfig):
        assert {name: getattr(kind, name) for name in DECODING} == fields


def write(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    return ["--config", str(tmp_path / "study.yaml")]


def test_a_task_of_its_own(tmp_path):
    given = write(tmp_path, "evaluation: {num_beams: 3, decoding: {mini_svamp: {temperature: 1}, mini_gsm8k: {}}}")
    asked = parse(given).evaluation
    assert evaluation.decoding_of(asked, "mini_svamp") == Decoding(temperature=1.0)
    assert evaluation.decoding_of(asked, "mini_gsm8k") == GREEDY and evaluation.decoding_of(asked, "other") == Decoding(num_beams=3)
    evaluation.check_decoding(asked, ["mini_svamp"], "data")  # to select tasks is no conflict
    assert parse(write(tmp_path, config_text(parse(given)))) == parse(given)
    assert parse(write(tmp_path, "decoding: {simp: {num_beams: 5}}")).evaluation.decoding == {"simp": {"num_beams": 5}}
    assert parse_eval(["--model", "nano", *write(tmp_path, "decoding: {simp: {num_beams: 5}}")]).decoding == {"simp": {"num_beams": 5}}


@pytest.mark.parametrize("text, words", [
    ("{simp: {num_beam: 5}}", r"decoding.simp: unknown key 'num_beam'; did you mean 'num_beams'\?"),
    ("{simp: {num_beams: 0}}", "decoding.simp.num_beams must be above 0"), ("{simp: {top_p: x}}", "simp.top_p must be a number"),
    ("{simp: 5}", "such as {num_beams: 5}|mapping"), ("[simp]", "a mapping of names to settings"),
])  # fmt: skip
def test_bad_words_of_a_task(tmp_path, text, words):
    for read, told in ((parse, f"evaluation: {{decoding: {text}}}"), (parse_eval, f"model: nano\ndecoding: {text}")):
        with pytest.raises(LetheError, match=words) as error:
            read(write(tmp_path, told))
        assert "\n" not in str(error.value)


def test_an_unknown_task_is_one_line(tiny, tmp_path, capsys):
    given = write(tmp_path, f"model: {tiny}\ndatasets: mini_svamp\nevaluation: {{decoding: {{mini_swamp: {{num_beams: 2}}}}}}")
    assert "no task is named 'mini_swamp'; did you mean 'mini_svamp'?" in one_line([*given, "--out", str(tmp_path / "o")], capsys)
    assert evaluation.main(["--model", tiny, "--tasks", "mini_svamp", "--num_beams", "2", "--temperature", "1"]) == 2
    assert "give one of them" in capsys.readouterr().err
    with pytest.raises(LetheError, match="--num_beams goes with --model"):
        parse_eval(["--root", "out/nano", "--num_beams", "2"])


def test_flags_of_rehearsal_stay_its_own():
    config = parse(["--model", "nano", "--temperature", "0.5", "--top_p", "0.4", "--repetition_penalty", "1.1", "--top_k", "3",
                    "--evaluation.temperature", "0.7", "--num_beams", "2"])  # fmt: skip
    assert (config.rehearsal.temperature, config.rehearsal.top_p, config.rehearsal.repetition_penalty) == (0.5, 0.4, 1.1)
    asked = config.evaluation
    assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty, asked.num_beams) == (0.7, 1.0, 3, 1.0, 2)


def test_part_of_what_a_study_is():
    old = identity_of(parse(["--model", "nano"]), "m", {"a": "1"})
    before = {name: value for name, value in old["settings"].items() if name.split(".")[-1] not in (*DECODING, "decoding")}
    before |= {name: value for name, value in old["settings"].items() if name.startswith("rehearsal.")}
    assert len(before) == len(old["settings"]) - len(DECODING) - 1
    assert differences({**old, "settings": before}, old) == []  # of a study from before there was a choice
    new = identity_of(parse(["--model", "nano", "--num_beams", "4"]), "m", {"a": "1"})
    assert differences({**old, "settings": before}, new) == ["evaluation.num_beams: 1 in the folder, 4 asked"]
    own = changed(parse(["--model", "nano"]), {"evaluation.decoding": {"simp": {"num_beams": 5}}})
    assert len(differences(old, identity_of(own, "m", {"a": "1"}))) == 1


def test_items(tiny):
    """What is drawn does not depend on the batch, on how many items there are, or on their order; answer_nll on no decoding."""
    subject, task = load_subject(tiny), find_task("mini_svamp")

    def items(how, batch=64, seed=0, rows=12, task=task, decoder=None):
        return evaluation.score_task(subject.model, subject.tokenizer, task, max_test=rows, max_new_tokens=6, quiet=True, how=how,
                                     seed=seed, batch_size=batch, decoder=decoder)  # fmt: skip

    greedy, decoder = items(GREEDY), Decoder(subject.model, 4)
    for how in (BEAMS, DRAWN):
        found = items(how)
        assert [item["output"] for item in found] != [item["output"] for item in greedy]
        outputs = [item["output"] for item in found]
        assert [item["output"] for item in items(how, batch=3)] == [item["output"] for item in items(how, decoder=decoder)] == outputs
        assert [item["output"] for item in items(how, rows=5)] == outputs[:5]
        backwards = dataclasses.replace(task, test=task.test[:12][::-1])
        assert [item["output"] for item in items(how, task=backwards)][::-1] == outputs
        assert [item["answer_nll"] for item in found] == pytest.approx([item["answer_nll"] for item in greedy], rel=1e-5)
        assert ([item["output"] for item in items(how, seed=1)] == outputs) == (how is BEAMS)
    assert seed_of(0, "a", "b") != seed_of(0, "ab") != seed_of(1, "ab") and 0 <= seed_of(7, "x") < 2**48


def test_a_study(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("study.report.draw_all", lambda rows, folder: [])
    text = f"model: {tiny}\nevaluation: {{top_k: 5, temperature: 1.0, decoding: {{mini_svamp: {{num_beams: 3}}}}}}"
    command = [*write(tmp_path, text), "--datasets", ",".join(TASKS), *SMALL, "--stage", "1", "--out", str(tmp_path / "out"), "--seed", "3"]
    assert train.main(command) == 0
    settings = read_json(tmp_path / "out" / "study.json")["identity"]["settings"]
    assert settings["evaluation.decoding"] == {"mini_svamp": {"num_beams": 3}} and settings["evaluation.top_k"] == 5
    subject = load_subject(tiny)
    cells = {name: tmp_path / "out" / "base" / "eval" / f"{name}.jsonl" for name in TASKS}
    for name, how in (("mini_svamp", Decoding(num_beams=3)), ("mini_simpleqa", Decoding(temperature=1.0, top_k=5))):
        items = evaluation.score_task(subject.model, subject.tokenizer, find_task(name), max_test=6, max_length=256, max_new_tokens=8,
                                      quiet=True, how=how, seed=3)  # fmt: skip
        assert [item["output"] for item in read_jsonl(cells[name])] == [item["output"] for item in items]
    before = {name: file.read_bytes() for name, file in cells.items()}
    for file in cells.values():
        file.unlink()
    assert evaluation.main(["--root", str(tmp_path / "out"), "--device", "cpu"]) == 0  # with the study's seed
    assert {name: file.read_bytes() for name, file in cells.items()} == before
    capsys.readouterr()
    assert train.main([*command, "--top_k", "6"]) == 2 and "evaluation.top_k: 5 in the folder, 6 asked" in capsys.readouterr().err
