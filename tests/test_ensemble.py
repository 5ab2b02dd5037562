"""Several adapters in one pass against each of them alone; Monte-Carlo dropout against separate passes; a study's ensemble."""

import json

import numpy as np
import pytest
import torch
from tiny import NARROW, VOCABULARY, raw_config, tiny_model, train_some, words, write_folder

import kernels.members
from data.choices import choice_of, choice_questions
from data.folder import find_task
from data.records import Record
from kernels.dropout import Span
from kernels.linear import Addition, Joined, linear
from lora import add_lora, load_adapter, save_adapter
from lora.ensemble import load_ensemble
from lora.layers import dropout_keys, merged
from lora.probabilistic import Column, predict, predict_members, predict_samples, predictions, sample_keys
from model import load_tokenizer
from model.attention import Pack
from model.checkpoint import NANO
from model.choices import Question, score_copies
from study.errors import LetheError


def some_adapters(model, folder, count=3, rank=4, alpha=8.0, dropout=0.1, targets="all") -> list:
    folders = []
    for k in range(count):
        add_lora(model, rank, alpha, dropout, targets, generator=torch.Generator().manual_seed(k))
        train_some(model, seed=k)
        save_adapter(model, folder / f"{k}")
        folders.append(folder / f"{k}")
    return folders


def some_questions(count: int = 12) -> list[Question]:
    g = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    start = ids(40, 41)
    shared = [Question(start + ids(1, 9), [[5, 6, 7], [5, 6], [5, 8, 9], ids(1, 2)], "shares") for _ in range(count)]
    return [*shared, *(Question(ids(3, 9), [[1], [2], [3]], "") for _ in range(count))]


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


@pytest.mark.parametrize("merge", [0.0, 1e9], ids=["weights made", "products beside"])
@pytest.mark.parametrize("shape", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj,down_proj"])
@torch.no_grad()
def test_logits_of_each_member_are_those_of_the_member_alone(tmp_path, monkeypatch, merge, shape, targets):
    monkeypatch.setitem(kernels.members.MERGE, "cpu", merge)
    model = tiny_model(tmp_path / "model", **shape)
    folders, lengths = some_adapters(model, tmp_path, targets=targets), [7, 20, 1]
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    alone = []
    for folder in folders:
        load_adapter(model, folder)
        alone.append(model.eval().hidden(ids, Pack(lengths, model.config)) @ model.head_weight.T)
    load_ensemble(model, folders)
    together = model.hidden(ids.repeat(3), Pack(lengths * 3, model.config)) @ model.head_weight.T
    rows = torch.tensor([3, 27])
    some = model.hidden(ids.repeat(3), Pack(lengths * 3, model.config), torch.cat([rows + 28 * k for k in range(3)]))
    for k, (expected, found) in enumerate(zip(alone, together.split(28), strict=True)):
        assert (found - expected).abs().max() < 1e-5
        assert (some[2 * k : 2 * k + 2] @ model.head_weight.T - expected[rows]).abs().max() < 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # members differ


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_quantised_and_16_bit_bases(tmp_path, kind):
    from model import load_model

    folder = write_folder(tmp_path / "base")
    model = load_model(folder, quantize="int8") if kind == "int8" else load_model(folder, torch.bfloat16)
    folders, questions = some_adapters(model, tmp_path, 2), some_questions()
    together = predict_members(model, folders, [Column("c", questions, [])])[0]
    for folder, found in zip(folders, together, strict=True):
        load_adapter(model, folder)
        assert np.abs(predict(model, questions)[0] - found).max() < (1e-5 if kind == "int8" else 0.1)


def test_probabilities_of_members_in_whatever_passes(model, tmp_path):
    folders, questions = some_adapters(model, tmp_path), some_questions()
    column = Column("c", questions, [0] * len(questions))
    together = predict_members(model, folders, [column])[0]
    assert together.shape == (3, 24, 4) and np.allclose(together.sum(2), 1) and (together[:, 12:, 3] == 0).all()
    few = score_copies(model, questions, 3, micro_tokens=50)
    for k, folder in enumerate(folders):
        load_adapter(model, folder)
        assert np.abs(predict(model, questions)[0] - together[k]).max() < 1e-5
        with merged(model):
            assert np.abs(predict(model, questions)[0] - together[k]).max() < 1e-5
        alone = score_copies(model, questions, 1)[0]
        assert all(abs(a.logprob - b.logprob) < 2e-5 for x, y in zip(alone, few[k], strict=True) for a, b in zip(x, y, strict=True))
    assert np.array_equal(predict_members(model, folders[:1], [column])[0], predict_members(model, folders[:1], [column])[0])


def test_members_must_be_alike(model, tmp_path):
    (one,) = some_adapters(model, tmp_path / "a", 1)
    for number, (settings, told) in enumerate(
        (({"rank": 8}, "rank 8 with scale 1 and rank 4 with scale 2"), ({"alpha": 4.0}, "rank 4 with scale 1 and rank 4 with scale 2"),
         ({"targets": "q_proj"}, "only the second adapts model.layers"))
    ):  # fmt: skip
        (other,) = some_adapters(model, tmp_path / str(number), 1, **settings)
        with pytest.raises(LetheError, match=told) as error:
            load_ensemble(model, [one, other])
        assert "\n" not in str(error.value)
    with pytest.raises(LetheError, match="two adapters or more"):
        load_ensemble(model, [one])


def test_no_gradients(model, tmp_path):
    load_ensemble(model, some_adapters(model, tmp_path, 2))
    with pytest.raises(RuntimeError, match="without gradients"):
        model.hidden(torch.tensor([1, 2]), Pack([1, 1], model.config))


# ----------------------------------------------------------------------------------------------------------------------
# Dropout left on


def test_samples_are_separate_passes_with_the_same_keys(model, tmp_path):
    (folder,), questions = some_adapters(model, tmp_path, 1, dropout=0.3), some_questions()
    load_adapter(model, folder)
    plain, model = predict(model, questions)[0], model.eval()
    together = predict(model, questions, 4, sample_keys(7, 24))
    for k in range(4):
        alone = predict(model, questions, 1, sample_keys(7, 24, first=k))[0]
        assert np.abs(alone - together[k]).max() < 1e-5
    assert not model.training and np.array_equal(predict(model, questions)[0], plain)  # dropout is off again
    assert np.abs(together[0] - together[1]).max() > 1e-3 and np.abs(together[0] - plain).max() > 1e-3
    assert np.abs(predict(model, questions, 4, sample_keys(8, 24)) - together).max() > 1e-3  # another seed


@torch.no_grad()
def test_samples_against_the_plain_model_with_its_keys(model, tmp_path):
    """A question alone as whole sequences, option by option: a letter's place is the prompt's last, whose masks are those of its place."""
    (folder,) = some_adapters(model, tmp_path, 1, dropout=0.3)
    load_adapter(model, folder)
    questions = [Question([4, 8, 15, 16, 23], [[1], [2], [42]])]
    found = predict(model, questions, 3, sample_keys(5, 1))
    model.train()
    for k in range(3):
        keys = dropout_keys(5, 0, torch.full((5,), k), torch.arange(5))
        logits = model.hidden(torch.tensor(questions[0].prompt), Pack([5], model.config), row_keys=keys)[-1] @ model.head_weight.T
        assert np.abs(found[k, 0] - logits[[1, 2, 42]].softmax(0).numpy()).max() < 1e-5


@torch.no_grad()
def test_the_mean_of_samples_approaches_the_expectation_of_a_linear():
    g = torch.Generator().manual_seed(0)
    x, weight, A, B = (torch.randn(shape, generator=g) for shape in ((1, 32), (8, 32), (4, 32), (8, 4)))
    joined = Joined(weight, (weight,), None)
    addition = Addition((A, B), [Span(0, 4, 3)], [(0, 8)], [0.5], 0.25)
    expected, count = x @ weight.T + 0.5 * (x @ A.T) @ B.T, 40_000
    keys = dropout_keys(0, 0, torch.arange(count), torch.zeros(count, dtype=torch.long))
    samples = linear(x.expand(count, -1).contiguous(), joined, addition, keys)
    errors = samples.std(0) / count**0.5
    assert ((samples.mean(0) - expected[0]).abs() < 4.5 * errors).all() and (samples.std(0) > 1).all()


def test_a_rate_of_zero_is_refused(model, tmp_path):
    (folder,) = some_adapters(model, tmp_path, 1, dropout=0.0)
    column = Column("c", some_questions(2), [0] * 4)
    with pytest.raises(LetheError, match="LoRA dropout is 0") as error:
        predict_samples(model, folder, [column], 2, None, 0)
    assert "--mc_dropout" in str(error.value) and "\n" not in str(error.value)
    found = predict_samples(model, folder, [column], 2, 0.2, 0)[0]
    assert np.abs(found[0] - found[1]).max() > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Items


def record(prompt: str, answer: str) -> Record:
    return Record((("user", prompt),), answer)


@pytest.mark.parametrize(
    ("prompt", "answer", "answers", "gold"),
    [
        ("Solve.\nHow far?\nA)91 B)8 C)81", "9 * 9 = 81.\nThe correct answer is 81.",
         ("The correct answer is 91.", "The correct answer is 8.", "The correct answer is 81."), 2),
        ("Who?\nA. worms\nB. big seeds", "It eats seeds.\nAnswer: big seeds", ("Answer: worms", "Answer: big seeds"), 1),
        ("Which?\nA. x\nB. y\nC. z", "The correct answer is B.",
         ("The correct answer is A.", "The correct answer is B.", "The correct answer is C."), 1),
        ("Problem: p\nOptions:\nA. 1\nB. 2", "A", ("A", "B"), 0),
        ("Solve.\nq\n['A)1 km', 'B)2 km']", "400 - 398 = 2, so the answer is B",
         ("The correct answer is A.", "The correct answer is B."), 1),
        ("Name (A) or (B), a letter.\nA) one\nB) two", "Answer: two", ("Answer: one", "Answer: two"), 1),
    ],
)  # fmt: skip
def test_options_of_a_prompt(prompt, answer, answers, gold):
    found = choice_of(record(prompt, answer))
    assert found.answers == answers and found.gold == gold


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("How many apples has Tom?", "3 + 4 = 7.\n#### 7"), ("Which?\nA. x\nB. y", "Answer: z"), ("Which?\nB. x\nC. y", "B"),
        ("Which?\nA. x\nB. x", "Answer: x"), ("A. only", "A"), ("Which?\n['A)x', 'B)y'", "Answer: z"), ("Which?\nA. x\nB. y", ""),
    ],
)  # fmt: skip
def test_no_options(prompt, answer):
    assert choice_of(record(prompt, answer)) is None


def test_questions_of_the_built_in_tasks():
    tokenizer = load_tokenizer(NANO)
    for name, count, opening in (("mini_aqua", 5, "The correct answer is"), ("mini_openbookqa", 4, "Answer:")):
        task = find_task(name)
        questions, gold, left_out = choice_questions(task.test, tokenizer, 1024)
        assert len(questions) == 200 and left_out == 0 and len(set(gold)) == count
        for question, right, one in zip(questions, gold, task.test, strict=True):
            text = tokenizer.decode(question.prompt + question.options[right])
            closing = one.answer.splitlines()[-1]
            assert text.endswith(f"Output: {closing}") and opening in closing and len(question.options) == count
            assert one.answer.splitlines()[0] not in text  # the worked steps would give the answer away
            assert all(a is b or a != b[: len(a)] for a in question.options for b in question.options)
    assert choice_questions(find_task("mini_gsm8k").test, tokenizer, 1024) == ([], [], 200)
    same = [record("Which?\nA. worm\nB. worm farm", "Answer: worm")]  # one is the beginning of the other: the end token tells
    (question,), _, _ = choice_questions(same, tokenizer, 1024)
    assert question.options[0][-1] == question.options[1][-1] == tokenizer.end_id
    (short,), _, _ = choice_questions(same, tokenizer, 20)
    assert len(short.prompt) + max(map(len, short.options)) <= 20


# ----------------------------------------------------------------------------------------------------------------------
# A study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    import train

    folder = tmp_path_factory.mktemp("study")
    base = write_folder(folder / "base", raw_config(**NARROW), tokenizer=True)
    more = ["--datasets", "mini_svamp,mini_openbookqa", "--mask", "none", "--seeds", "0,1", "--lora_dropout", "0.2"]
    assert train.main([*words(base, folder / "out"), *more]) == 0
    return folder / "out"


def test_a_study_as_an_ensemble(study, capsys):
    import eval as scoring

    command = ["--root", str(study), "--probabilistic", "--mc_samples", "2", "--device", "cpu"]
    assert scoring.main(command) == 0
    told = capsys.readouterr().out
    results = json.loads((study / "probabilistic_results.json").read_text())["results"]
    cells = {(row["run"], row["task"], row["arm"]) for row in results}
    runs = ["lora_base/mini_openbookqa", "lora_base/mini_svamp", "lora_transfer/mini_openbookqa_to_mini_svamp",
            "lora_transfer/mini_svamp_to_mini_openbookqa"]  # fmt: skip
    arms = ["deterministic", "ensemble", "mc_dropout"]
    assert cells == {("base", "mini_openbookqa", "deterministic"), *((run, "mini_openbookqa", arm) for run in runs for arm in arms)}
    kept = json.loads((study / "probabilistic" / runs[2] / "mini_openbookqa.json").read_text())
    members, samples = np.array(kept["members"]), np.array(kept["samples"])
    assert members.shape == (2, 6, 4) and samples.shape == (2, 2, 6, 4)
    gold = np.array(kept["gold"])
    get = {(row["arm"], row["metric"]): row for row in results if row["run"] == runs[2]}
    each = -np.log(members[:, range(6), gold])
    assert get["deterministic", "nll"]["value"] == pytest.approx(each.mean(), rel=1e-5)
    assert get["deterministic", "nll"]["lowest"] == pytest.approx(each.mean(1).min(), rel=1e-5)
    assert get["ensemble", "nll"]["value"] == pytest.approx(-np.log(members.mean(0)[range(6), gold]).mean(), rel=1e-5)
    assert get["mc_dropout", "nll"]["value"] == pytest.approx(-np.log(samples.mean(1)[:, range(6), gold]).mean(), rel=1e-5)
    gain = get["ensemble", "nll_minus_deterministic"]
    assert gain["value"] == pytest.approx(get["ensemble", "nll"]["value"] - get["deterministic", "nll"]["value"]) and gain["value"] <= 1e-9
    assert get["ensemble", "mutual_information"]["value"] >= 0
    pictures = {file.name for file in (study / "probabilistic").glob("*.png")}
    assert pictures == {f"reliability_{run.replace('/', '_')}.png" for run in runs[2:]}
    assert "ensemble" in told and "seeds      0, 1" in told
    before = {file: file.stat().st_mtime_ns for file in (study / "probabilistic").rglob("*.json")}
    assert scoring.main(command) == 0 and before == {file: file.stat().st_mtime_ns for file in before}  # nothing is predicted twice


def test_what_cannot_be_an_ensemble(study, tmp_path, capsys):
    import eval as scoring

    assert scoring.main(["--root", str(study), "--probabilistic", "--tasks", "mini_svamp", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "lists options" in told and told.count("\n") == 1


def test_one_seed_has_no_ensemble(model, tmp_path):
    (folder,), column = some_adapters(model, tmp_path, 1), Column("c", some_questions(2), [0] * 4)
    found = predictions(model, tmp_path, "run", [folder], [0], [column], 2, None)["c"]
    assert found["members"].shape == (1, 4, 4) and found["samples"].shape == (1, 2, 4, 4) and model.adapter is None
    again = predictions(model, tmp_path, "run", [folder], [0], [column], 2, None)["c"]
    assert np.abs(again["members"] - found["members"]).max() < 1e-8
    assert predictions(model, tmp_path, "run", [folder], [0], [column], 0, None)["c"]["samples"] is None
