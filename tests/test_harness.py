"""lm-evaluation-harness: the plug-in against lm-eval's own Hugging Face backend, on local tasks, and what it tells a user."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import yaml

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-extra.txt)")

from lm_eval.api.instance import Instance  # noqa: E402

from data.builtin import builtin_task  # noqa: E402
from model import harness, harness_model  # noqa: E402
from model.checkpoint import NANO  # noqa: E402
from model.choices import score_options  # noqa: E402
from model.harness import load_harness, run_harness, score_suite  # noqa: E402
from model.harness_model import HarnessModel  # noqa: E402
from model.subject import load_subject  # noqa: E402
from study.errors import LetheError  # noqa: E402

BOS, TURN = "<|begin_of_text|>", "<|eot_id|>"


def mean_of(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def rows_in(folder, name: str, **splits: list[dict]) -> dict:
    """Writes rows; the lines of a YAML that make them a data set."""
    files = {split: str(folder / f"{name}_{split}.jsonl") for split in splits}
    for split, docs in splits.items():
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    found = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
    return {**found, **({"training_split": "train"} if "train" in splits else {}), "test_split": "test"}


def task_in(folder, name: str, **settings) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **settings}))


def with_options(rows: list[dict]) -> list[dict]:
    rng, pool, docs = random.Random(0), sorted({row["output"] for row in rows}), []
    for row in rows:
        options = [row["output"], *rng.sample([text for text in pool if text != row["output"]], 3)]
        rng.shuffle(options)
        docs.append({"question": row["instruction"], "options": options, "gold": options.index(row["output"])})
    return docs


def write_tasks(folder) -> str:
    """Local tasks over local rows: options to choose from, a group of two, answers to generate, and whole texts."""
    simple, book, sums = (builtin_task(name) for name in ("mini_simpleqa", "mini_openbookqa", "mini_svamp"))
    form = {"doc_to_text": "Input: {{question}}\nOutput:", "metadata": {"version": 1}}
    asks = {**form, "output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "gold"}
    asks["metric_list"] = mean_of("acc", "acc_norm")
    chosen = rows_in(folder, "simple", train=with_options(simple["train"][:6]), test=with_options(simple["test"][:24]))
    task_in(folder, "toy_choice", **asks, **chosen, num_fewshot=2, tag="toy_tag")
    first = rows_in(folder, "first", train=with_options(book["train"][:6]), test=with_options(book["test"][:10]))
    shared = {"fewshot_config": {"sampler": "first_n"}, "description": "Short questions.\n\n"}
    task_in(folder, "toy_first", **asks, **first, **shared, num_fewshot=3, tag="toy_tag")
    second = rows_in(folder, "second", train=with_options(book["train"][:6]), test=with_options(book["test"][50:64]))
    task_in(folder, "toy_second", **asks, **second, num_fewshot=0)
    group = {"group": "toy_group", "task": ["toy_first", "toy_second"]}
    (folder / "toy_group.yaml").write_text(yaml.safe_dump(group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}))

    problems = [{"question": row["input"] or row["instruction"], "answer": row["output"]} for row in sums["test"][:10]]
    numbers = {"function": "regex", "regex_pattern": r"(-?\d+)"}
    filters = [{"name": name, "filter": [{**numbers, "group_select": place}, {"function": "take_first"}]}
               for name, place in (("last", -1), ("first", 0))]  # fmt: skip
    generation = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    task_in(folder, "toy_answer", **form, **rows_in(folder, "sums", test=problems), output_type="generate_until", filter_list=filters,
            doc_to_target="{{answer}}", generation_kwargs=generation, metric_list=mean_of("exact_match"))  # fmt: skip
    texts = [{"text": " ".join(row["instruction"] + " " + row["output"] for row in book["train"][:count])} for count in (3, 140)]
    told = rows_in(folder, "texts", test=texts)
    task_in(folder, "toy_text", **told, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def nano():
    return load_subject("nano", "cpu", "float32")


@pytest.fixture(scope="module")
def hf():
    """The peer: lm-eval's own backend, on the same weights."""
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face backend needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(NANO), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture
def oracle(hf, monkeypatch):
    """names, folder -> what lm-eval's own command computes with its own backend."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists every package of the machine

    def run(name: str, folder: str, **more):
        manager = TaskManager(include_path=folder, include_defaults=False)
        return lm_eval.simple_evaluate(model=hf, tasks=[name], task_manager=manager, bootstrap_iters=1000, **more)

    return run


def ask(kind: str, *arguments, task: str = "toy") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))


def agree(mine: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert [a for a, _ in mine] == [pytest.approx(b, abs=1e-4, rel=1e-6) for b, _ in theirs]  # rel: sums of hundreds of tokens in float32


# ----------------------------------------------------------------------------------------------------------------------
# Against lm-eval's Hugging Face backend


def test_choices_have_its_likelihoods_and_accuracy(tasks, nano, hf, oracle):
    (suite,) = load_harness(["toy_choice"], include_path=tasks)
    theirs = oracle("toy_choice", tasks)
    column = score_suite(nano, suite, quiet=True)
    requests = suite.loaded["tasks"]["toy_choice"].instances
    assert len(requests) == 96
    mine = HarnessModel(nano, quiet=True).loglikelihood(requests)
    agree(mine, hf.loglikelihood(requests, disable_tqdm=True))
    results, rows = theirs["results"]["toy_choice"], sorted(theirs["samples"]["toy_choice"], key=lambda row: row["doc_id"])
    for name in ("acc", "acc_norm"):
        assert column.summary[name] == pytest.approx((results[f"{name},none"], results[f"{name}_stderr,none"]))
    assert 0 < column.summary["acc"][0] < 1 and column.metric == "acc" and column.higher_is_better and column.shots == 2
    assert [item["correct"] for item in column.items] == [row["acc"] for row in rows]
    assert [item["metrics"]["acc_norm"] for item in column.items] == [row["acc_norm"] for row in rows]
    assert [item["loglikelihoods"] for item in column.items] == [pytest.approx([r[0][0] for r in row["resps"]], abs=1e-4) for row in rows]
    for item, row in zip(column.items, rows, strict=True):
        best = int(np.argmax([answer[0][0] for answer in row["resps"]]))
        assert item["output"] == row["doc"]["options"][best] and item["gold"] == row["doc"]["gold"] and item["id"] == row["doc_id"]
        assert row["arguments"][0][0].endswith(item["prompt"].removeprefix("… "))
    assert json.loads(json.dumps(column.items)) == column.items


def test_generation_says_the_same(tasks, nano, oracle):
    theirs = oracle("toy_answer", tasks)
    column = run_harness(nano, ["toy_answer"], include_path=tasks, quiet=True)["toy_answer"]
    rows = {kind: [row for row in theirs["samples"]["toy_answer"] if row["filter"] == kind] for kind in ("last", "first")}
    assert [item["output"] for item in column.items] == [row["resps"][0][0] for row in rows["last"]]
    assert len({item["output"] for item in column.items}) > 5 and not any("\n" in item["output"] for item in column.items)
    assert column.metric == "exact_match,last"
    assert [item["extracted"] for item in column.items] == [row["filtered_resps"][0] for row in rows["last"]]
    assert [item["correct"] for item in column.items] == [row["exact_match"] for row in rows["last"]]
    assert [item["metrics"]["exact_match,first"] for item in column.items] == [row["exact_match"] for row in rows["first"]]
    assert column.summary["exact_match,first"][0] == theirs["results"]["toy_answer"]["exact_match,first"]


def test_whole_texts_have_its_likelihoods(tasks, nano, oracle):
    theirs = oracle("toy_text", tasks)
    column = run_harness(nano, ["toy_text"], include_path=tasks, quiet=True)["toy_text"]
    rows = theirs["samples"]["toy_text"]
    lengths = [len(nano.tokenizer.encode(row["doc"]["text"])) for row in rows]
    assert lengths[0] < 200 and lengths[1] > 2 * nano.model.config.max_position_embeddings  # one window, and three
    for item, row in zip(column.items, rows, strict=True):
        logprob, words = item["metrics"]["word_perplexity"]
        assert logprob == pytest.approx(row["word_perplexity"][0], abs=1e-4, rel=1e-6) and words == row["word_perplexity"][1]
        assert item["correct"] is None
    assert column.summary["bits_per_byte"] == (pytest.approx(theirs["results"]["toy_text"]["bits_per_byte,none"], rel=1e-6), None)
    assert not column.higher_is_better


def test_groups_are_one_column(tasks, nano, oracle):
    theirs = oracle("toy_group", tasks)
    columns = run_harness(nano, ["toy_group"], include_path=tasks, quiet=True)
    assert list(columns) == ["toy_group"]
    column, results = columns["toy_group"], theirs["results"]["toy_group"]
    assert column.summary == {"acc": pytest.approx((results["acc,none"], results["acc_stderr,none"]))}
    places = [("toy_first", i) for i in range(10)] + [("toy_second", i) for i in range(14)]
    assert [(item["subject"], item["id"]) for item in column.items] == places
    for name in ("toy_first", "toy_second"):
        mine = [item["correct"] for item in column.items if item["subject"] == name]
        assert mine == [row["acc"] for row in theirs["samples"][name]] and np.mean(mine) == theirs["results"][name]["acc,none"]
    assert column.shots is None  # 3 and 0


def test_tags_shots_and_limits(tasks, nano, oracle):
    columns = run_harness(nano, ["toy_tag", "toy_second"], shots=1, limit=4, include_path=tasks, quiet=True)
    assert {name: (column.shots, len(column.items)) for name, column in columns.items()} == {
        "toy_choice": (1, 4), "toy_first": (1, 4), "toy_second": (0, 4)}  # fmt: skip
    for name, column in columns.items():
        rows = oracle(name, tasks, num_fewshot=1, limit=4)["samples"][name]
        assert [item["correct"] for item in column.items] == [row["acc"] for row in rows]
        assert all(row["arguments"][0][0].endswith(item["prompt"][2:]) for item, row in zip(column.items, rows, strict=True))


def test_other_ways_to_choose(tmp_path, nano, oracle):
    """Contexts to choose from; likelihoods less those without a context; a group that does not say how to sum it up."""
    rows = [{"gold": n % 2, "left": ["The fox is red", "The sea is red"], "right": ", they say.", "ends": [" a fox", " seven eggs"]}
            for n in range(6)]  # fmt: skip
    found = rows_in(tmp_path, "rows", test=rows)
    asks = {**found, "output_type": "multiple_choice"}
    task_in(tmp_path, "toy_blank", **asks, doc_to_text="gold", doc_to_choice="left", doc_to_target="right", target_delimiter="",
            metric_list=mean_of("acc"))  # fmt: skip
    task_in(tmp_path, "toy_less", **asks, doc_to_text="It was", doc_to_choice="ends", doc_to_target="gold", target_delimiter="",
            metric_list=mean_of("acc_mutual_info", "acc"))  # fmt: skip
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "toy_both", "task": ["toy_blank", "toy_less"]}))
    theirs, column = oracle("toy_both", str(tmp_path)), run_harness(nano, ["toy_both"], include_path=str(tmp_path), quiet=True)["toy_both"]
    blank, less = (theirs["samples"][name] for name in ("toy_blank", "toy_less"))
    assert [item["metrics"] for item in column.items[:6]] == [{"acc": row["acc"]} for row in blank]
    assert [item["metrics"] for item in column.items[6:]] == [{key: row[key] for key in ("acc_mutual_info", "acc")} for row in less]
    assert [item["loglikelihoods"] for item in column.items] == [
        pytest.approx([answer[0][0] for answer in row["resps"]][:2], abs=1e-4) for row in blank + less
    ]
    assert column.items[0]["output"] == int(np.argmax(column.items[0]["loglikelihoods"]))
    assert column.items[6]["output"] == rows[0]["ends"][int(np.argmax(column.items[6]["loglikelihoods"]))].strip()
    values = [item["correct"] for item in column.items]
    assert column.summary == {"acc": pytest.approx((np.mean(values), np.std(values, ddof=1) / 12**0.5))} and len(values) == 12


TEXTS = ["The fox", " leads", "tails \n", "two  spaces  ", "", "a\n\nb", "1234 é 漢字", f"{BOS}again", f"one {TURN} two", "   "]


def test_ids_are_those_of_the_hugging_face_backend(nano, hf):
    mine = HarnessModel(nano, quiet=True)
    for text in TEXTS:
        for special in (None, True, False):
            assert mine.tok_encode(text, special) == hf.tok_encode(text, special), (text, special)
    pairs = [(context, option) for context in TEXTS if context for option in (" yes", "no", "\nand more ")]
    requests = [ask("loglikelihood", *pair) for pair in pairs]
    assert [(a, b) for _, a, b in mine._pairs(requests)] == [hf._encode_pair(*pair) for pair in pairs]
    assert mine.prefix_token_id == hf.prefix_token_id == nano.tokenizer.bos and mine.max_length == hf.max_length
    assert nano.tokenizer.hf.encode_special_tokens  # as it was: prompts of users cannot say special tokens


def test_odd_requests_have_its_likelihoods(nano, hf, monkeypatch):
    monkeypatch.setattr(hf, "batch_size_per_gpu", 1)  # of a batch, it looks at the first text alone to see whether a BOS is there
    long = "The fox has three eggs. " * 400
    pairs = [("", " yes"), ("", f"{BOS} yes"), ("   ", "x"), ("Output: ", "fox"), (f"{BOS}Input: a", " b"), (f"a {TURN}", " b"),
             (long, " The fox"), (long, " eggs"), (long[:4090], " " + long[:480]), ("a", " b"), ("a", " b")]  # fmt: skip
    requests = [ask("loglikelihood", *pair) for pair in pairs]
    agree(HarnessModel(nano, quiet=True).loglikelihood(requests), hf.loglikelihood(requests, disable_tqdm=True))
    asked = [("Input: The fox", {}), (long, {"until": "."}), ("Input: The fox", {"until": ["\n\n", "The"], "max_gen_toks": 8}),
             (f"{BOS}Output:", {"max_gen_toks": 3, "temperature": 0.0}), (long, {"max_gen_toks": 1000})]  # fmt: skip
    requests = [ask("generate_until", context, {"until": ["\n"], **settings}) for context, settings in asked]
    assert HarnessModel(nano, quiet=True).generate_until(requests) == hf.generate_until(requests, disable_tqdm=True)
    requests = [ask("loglikelihood_rolling", text) for text in ("", "The fox", f"{BOS}The fox")]
    theirs = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    assert HarnessModel(nano, quiet=True).loglikelihood_rolling(requests) == pytest.approx(theirs, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# How it computes


def test_a_context_is_computed_once(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(harness_model, "score_options", lambda model, qs, **more: asked.append(qs) or score_options(model, qs, **more))
    subject = load_subject(tiny, "cpu", "float32")
    pairs = [("one", " a"), ("two", " a"), ("one", " b c"), ("one", " a"), ("", " a"), ("", " a")]
    found = HarnessModel(subject, quiet=True).loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    (questions,) = asked
    assert [len(question.options) for question in questions] == [2, 1, 1] and {question.group for question in questions} == {"toy"}
    assert found[0] == found[3] and found[4] == found[5] and len(set(found)) == 4


def test_windows_against_the_logits(tiny, monkeypatch):
    """A brute-force loop over windows in float64; packs of one and of many windows agree."""
    subject = load_subject(tiny, "cpu", "float64")
    generator = torch.Generator().manual_seed(0)
    windows = [(torch.randint(7, 2000, (a,), generator=generator).tolist(), torch.randint(7, 2000, (b,), generator=generator).tolist())
               for a, b in ((1, 1), (5, 1), (1, 40), (30, 7), (2, 2))]  # fmt: skip
    expected = []
    for context, scored in windows:
        logprobs = subject.model(torch.tensor([context + scored])).double().log_softmax(-1)[0]
        expected.append(sum(float(logprobs[len(context) + i - 1, token]) for i, token in enumerate(scored)))
    done = []
    subject.model.train()
    for tokens in (4096, 40, 1):
        monkeypatch.setattr(harness_model, "MICRO_TOKENS", {"cpu": tokens})
        assert harness_model.score_windows(subject.model, windows, done.append) == pytest.approx(expected, abs=1e-4)
    assert sum(done) == 3 * len(windows) and done[0] == len(windows) and done[-5:] == [1] * 5
    assert subject.model.training


def test_generation_ends_at_a_stop_string_of_one_character(nano):
    model = HarnessModel(nano, quiet=True)
    opening = model._opening(("\n", "Question:"))
    decode = nano.tokenizer.decode
    assert opening == {token for token in range(nano.tokenizer.vocab_size) if decode([token]).startswith("\n")} != set()
    assert model._opening(("Question:", "\n\n")) == set()  # a part of them may stand in the token before


def test_the_process_is_left_as_it_was(tasks, nano, capfd):
    weights = [parameter.clone() for parameter in nano.model.parameters()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand(), torch.rand(1, generator=torch.Generator().manual_seed(5))
    first = run_harness(nano, ["toy_choice", "toy_text"], include_path=tasks, limit=5, quiet=True)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert run_harness(nano, ["toy_text", "toy_choice"], include_path=tasks, limit=5, quiet=True) == first  # in any order
    assert all(torch.equal(a, b) for a, b in zip(weights, nano.model.parameters(), strict=True))
    told = capfd.readouterr()
    assert told.out == "" and told.err == ""


def test_fingerprints_follow_the_documents(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        write_tasks(folder)
    (folders[2] / "second_test.jsonl").write_text((folders[2] / "second_test.jsonl").read_text().replace('"gold": 0', '"gold": 1'))
    a, b, c = (load_harness(["toy_second", "toy_first"], include_path=str(folder)) for folder in folders)
    assert a[0].fingerprint == b[0].fingerprint != c[0].fingerprint and a[1].fingerprint == c[1].fingerprint
    (shots,) = load_harness(["toy_first"], 1, str(folders[0]))
    assert shots.fingerprint != a[1].fingerprint


def test_standard_errors_without_a_formula_are_resampled(tmp_path, nano):
    """lm-eval resamples perplexities in a pool of processes; here the same draws in this one."""
    from lm_eval.api import metrics

    rows = [{"a": f"The fox has {n}", "b": f" {word}"} for n, word in enumerate(("eggs", "books", "the", "of", "cups"))]
    found = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, *mean_of("acc")]
    task_in(tmp_path, "toy_likelihood", **rows_in(tmp_path, "rows", test=rows), output_type="loglikelihood", doc_to_text="{{a}}",
            doc_to_target="{{b}}", metric_list=found)  # fmt: skip
    column = run_harness(nano, ["toy_likelihood"], include_path=str(tmp_path), quiet=True)["toy_likelihood"]
    values = [item["metrics"]["perplexity"] for item in column.items]
    rng = random.Random(0)
    expected = np.std([np.exp(-np.mean(rng.choices(values, k=5))) for _ in range(1000)], ddof=1)
    assert column.summary["perplexity"] == pytest.approx((np.exp(-np.mean(values)), expected))
    assert column.metric == "acc" and metrics.bootstrap_stderr.__module__ == "lm_eval.api.metrics"


# ----------------------------------------------------------------------------------------------------------------------
# Chats


MESSAGES = [{"role": "system", "content": "Be short.\n\nVery."}, {"role": "user", "content": " What is 2+2? "},
            {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}]  # fmt: skip


def test_chats_are_hugging_faces(tiny, real_data):
    transformers = pytest.importorskip("transformers")
    folder = str(real_data / "llama-3.2-1b-instruct")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    subject = load_subject(tiny, "cpu", "float32")
    subject.tokenizer = harness_tokenizer(folder)
    model = HarnessModel(subject, quiet=True)
    for messages in (MESSAGES, MESSAGES[1:2]):
        theirs = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        assert model.apply_chat_template(messages) == theirs
        assert model.tok_encode(theirs) == peer.encode(theirs, add_special_tokens=False)  # one BOS
        begun = [*messages, {"role": "assistant", "content": "The answer is"}]
        theirs = peer.apply_chat_template(begun, tokenize=False, continue_final_message=True, date_string="26 Jul 2024")
        assert model.apply_chat_template(begun, add_generation_prompt=False) == theirs


def harness_tokenizer(folder: str):
    from model.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def test_tasks_in_chats(tasks, tiny):
    subject = load_subject(tiny, "cpu", "float32", "llama3")
    (suite,) = load_harness(["toy_choice"], include_path=tasks)
    score_suite(subject, suite, chat=True, limit=2, quiet=True)
    context, option = suite.loaded["tasks"]["toy_choice"].instances[0].args
    assert context.count(BOS) == 1 and context.count("<|start_header_id|>assistant") == 3 and context.endswith("<|end_header_id|>\n\n")
    assert not option.startswith(" ")
    ids = HarnessModel(subject).tok_encode(context)
    assert ids.count(subject.tokenizer.bos) == 1 and ids.count(subject.tokenizer.special["<|start_header_id|>"]) == 7
    with pytest.raises(LetheError, match="needs a model with a chat template"):
        run_harness(load_subject(tiny, "cpu", "float32"), ["toy_choice"], include_path=tasks, chat=True)


# ----------------------------------------------------------------------------------------------------------------------
# What a user is told


def refused(*arguments, **more) -> str:
    with pytest.raises(LetheError) as caught:
        run_harness(*arguments, **more, quiet=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_scored(tmp_path, tiny, monkeypatch):
    base = {**rows_in(tmp_path, "rows", test=[{"a": "x", "b": "y"}]), "doc_to_text": "{{a}}", "doc_to_target": "{{b}}"}
    says = {**base, "output_type": "generate_until", "metric_list": mean_of("exact_match")}
    task_in(tmp_path, "toy_draws", **says, generation_kwargs={"until": ["\n"], "do_sample": True, "temperature": 0.7})
    task_in(tmp_path, "toy_beams", **says, generation_kwargs={"until": [], "num_beams": 4})
    task_in(tmp_path, "toy_long", **says, generation_kwargs={"until": [], "max_gen_toks": 512})
    task_in(tmp_path, "toy_code", **says, unsafe_code=True)
    task_in(tmp_path, "toy_empty", **{**base, "doc_to_target": ""}, output_type="loglikelihood", metric_list=mean_of("acc"))
    task_in(tmp_path, "toy_away", **{**says, "dataset_path": "nobody/has_this", "dataset_kwargs": {}})
    monkeypatch.setattr(harness, "_manager", lambda path, defaults, made=harness._manager: made(path, False))  # lm-eval's own take seconds
    subject, where = load_subject(tiny, "cpu", "float32"), {"include_path": str(tmp_path)}
    assert "toy_draws asks for temperature 0.7; Lethe decodes greedily" in refused(subject, ["toy_draws"], **where)
    assert "toy_beams asks for num_beams 4" in refused(subject, ["toy_beams"], **where)
    assert "toy_long: answers of 512 tokens; this model has 512 positions" in refused(subject, ["toy_long"], **where)
    assert "toy_code: toy_code runs code" in refused(subject, ["toy_code"], **where)
    assert "toy_empty: an answer has no tokens" in refused(subject, ["toy_empty"], **where)
    assert "no task 'toy_drams'; did you mean toy_draws" in refused(subject, ["toy_drams"], **where)
    assert "names no task" in refused(subject, [" "], **where)
    assert "is no folder" in refused(subject, ["toy_draws"], include_path=str(tmp_path / "none"))
    assert "toy_draws has 1 solved examples, fewer than the 5 asked for" in refused(subject, ["toy_draws"], shots=5, **where)
    told = refused(subject, ["toy_away"], **where)
    assert told.startswith("--harness toy_away cannot be loaded (") and "on a machine with network" in told
    too_long = [ask("loglikelihood", "a", " word" * 600)]
    with pytest.raises(LetheError, match="an answer has 600 tokens; this model has 512 positions"):
        HarnessModel(subject, quiet=True).loglikelihood(too_long)


def test_without_the_package(tiny, monkeypatch):
    harness._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert refused(load_subject(tiny, "cpu", "float32"), ["hellaswag"]).endswith("pip install lm-eval")
