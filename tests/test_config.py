"""study/config.py: flags, YAML, order of precedence, and errors that fit in one line."""

import dataclasses
import json
from typing import get_args

import pytest

from study.config import Config, changed, config_text, optimizer_arms, parse, parse_eval, parse_seeds, stage_config
from study.errors import LetheError
from study.flags import CONFIGS, leaves
from study.folder import open_study
from study.identity import differences, identity_of


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_builtin_study_is_the_default_and_another_model_takes_the_dataclass_defaults():
    config = parse([])
    assert config.model.name == "nano" and config.sources == (str(CONFIGS / "nano.yaml"),)
    assert parse(["--model", "nano"]) == config
    other = parse(["--model", "meta-llama/Llama-3.2-1B"])
    assert other.sources == () and dataclasses.replace(other, model=Config().model) == Config()
    assert Config().training.stage1.learning_rate == 1e-4 and Config().lora.alpha == 16


def test_defaults_then_file_then_flags(tmp_path):
    path = write(tmp_path, "model: x\nepochs: 7\ntraining: {stage2: {epochs: 2}}\nlora: {rank: 4}\nlr: 1e-3\n")
    config = parse(["--config", path, "--lora_rank", "8"])
    assert (config.training.stage1.epochs, config.training.stage2.epochs) == (7, 2)
    assert config.lora.rank == 8 and config.lora.alpha == 16 and config.model.name == "x"
    assert config.training.stage1.learning_rate == 1e-3 and config.sources == (path,)


def test_flag_spellings():
    config = parse(
        [
            "--stage2.epochs",
            "1",
            "--learning-rate=2e-3",
            "--epochs",
            "5",
            "--batch_size",
            "4",
            "--strict",
            "--output_dir",
            "o",
            "--lora-targets",
            "q_proj, v_proj",
            "--evaluation.batch_size",
            "9",
            "--optimizer",
            "adamw",
            "--training.stage1.max_steps",
            "3",
            "--lora.rank",
            "2",
            "--mask",
            "none",
        ]
    )
    one, two = config.training.stage1, config.training.stage2
    assert (one.epochs, two.epochs, one.learning_rate, two.batch_size) == (5, 1, 2e-3, 4)
    assert (one.max_steps, two.max_steps, config.evaluation.batch_size) == (3, None, 9)
    assert config.strict and config.out == "o" and config.lora.targets == ["q_proj", "v_proj"] and config.lora.rank == 2
    assert config.mask == "none" and not parse(["--strict", "--no-strict"]).strict
    assert parse(["--lora_targets", "all"]).lora.targets == "all"
    assert parse(["--max_train", "5", "--max_train", "null"]).max_train is None


def test_every_leaf_has_a_flag_that_reaches_it(tmp_path):
    sample = {int: "1", float: "0.5", bool: "true", str: "cpu", int | None: "1", str | None: "a:b", float | None: "0.5"}
    named = {"seeds": "0,1", "max_memory": "6GiB", "comparison": "{'adamw': [0.5]}", "lora.targets": "q_proj"}
    needs = {"chunk": ["--datasets_folder", "sets"], "rehearsal.arms": ["--sequence", "a,b"]}
    named |= {"sequence": "a,b", "study": "optimizers", "rehearsal.demos": "3", "rehearsal.pool": "2.5", "evaluation.num_beams": "2"}
    named |= {"pretraining.row_length": "3", "pretraining.shape": "{'num_hidden_layers': 2}"}
    named |= {"growth.models": "{'a': 'x'}", "growth.factor": "3"}
    for name, (kind, field) in leaves(Config).items():
        if name in ("arms", "evaluation.decoding"):
            continue
        text = named.get(name, sample.get(kind, field.default))
        if kind not in sample and field.default in get_args(kind):  # another choice than the default one
            text = next(choice for choice in get_args(kind) if choice not in (field.default, "model"))
        value = parse(["--config", write(tmp_path, config_text(parse([f"--{name}", str(text), *needs.get(name, [])])))])
        for part in name.split("."):
            value = getattr(value, part)
        assert str(value).lower() in (str(text).lower(), f"{text}.0", f"['{text}']"), name
        assert value != field.default or kind is bool, name


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rte", "1"], "did you mean --learning_rate?"),
        (["--learning_rate", "abc"], "--learning_rate must be a number, not 'abc'"),
        (["--batch_size", "2.5"], "whole number"),
        (["--epochs", "-1"], "above 0"),
        (["--lr", "nan"], "must be"),
        (["--epochs", ".inf"], "above 0"),
        (["--scheduler", "cosin"], "did you mean 'cosine'?"),
        (["--optimizer", "muonn"], "did you mean 'muon'?"),
        (["--warmup_steps", "-1"], "0 or more"),
        (["--save_steps", "0"], "above 0"),
        (["--quantize", "nf3"], "did you mean 'nf4'?"),
        (["--max_memory", "much"], "such as 6GiB"),
        (["--max_memory", "0GiB"], "such as 6GiB"),
        (["--comparison", "{sgd: [1]}"], "adamw or muon"),
        (["--comparison", "{muon: [0]}"], "above 0"),
        (["--comparison", "{muon: []}"], "learning rates"),
        (["--comparison", "{}"], "learning rates"),
        (["--comparison", "muon"], "a mapping of optimizers to learning rates"),
        (["--full", "--quantize", "nf4"], "--quantize nf4 freezes"),
        (["--full", "--max_memory", "6GiB"], "--max_memory keeps away"),
        (["--shard", "model"], "--full"),
        (["--compare_optimizers", "--stage", "1"], "leave out --stage 1"),
        (["--compare_optimizers", "--mask", "highest"], "--mask highest"),
        (["--compare_optimizers", "--optimizer", "muon"], "give one of them"),
        (["--compare_optimizers", "--inspect", "2"], "masks nothing"),
        (["--compare_optimizers", "--resume_stage1", "x"], "there are 6 optimizers and rates"),
        (["--resume_stage2", "x", "--seeds", "0,1"], "several seeds"),
        (["--resume_stage1", "x", "--skip_training"], "--resume_stage1 trains"),
        (["--resume_stage2", "x", "--stage", "1"], "--stage 1 ends before it"),
        (["--inspect", "1", "--skip_training"], "one of them"),
        (["--stage", "3"], "1 or 2"),
        (["--name", "x"], "model.name or optimizer.name"),
        (["gsm8k"], "not a flag"),
        (["--threshold"], "needs a value"),
        (["--threshold", "--seed", "1"], "needs a value"),
        (["--config", "nanno.yaml"], "did you mean 'nano.yaml'?"),
        (["--seeds", "1,x"], "--seeds must be"),
        (["--device", "gpu"], "auto, cpu, cuda"),
        (["--out", " "], "some text"),
        (["--strict=maybe"], "true or false"),
        (["--overlap_ratio", "1"], "below 1"),
        (["--seed", "true"], "whole number"),
    ],
)
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(LetheError) as error:
        parse(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", "did you mean"),
        ("training: {stage1: {epoch: 1}}", "training.stage1.epochs"),
        ("lora: {rank: x}", "lora.rank must be a whole number, not 'x'"),
        ("- a\n- b", "not a list"),
        ("a: [1", "not valid YAML"),
        ("strict: 3", "true or false"),
        ("lora: 3", "unknown key 'lora'"),
        ("arms: {highest: {epoch: 1}}", "did you mean 'epochs'?"),
        ("arms: {highest: {epochs: x}}", "arms.highest.epochs must be a number"),
        ("arms: 3", "mapping"),
        ("lora: {rank: {a: 1}}", "unknown key 'lora.rank.a'"),
        ("seed: true", "whole number"),
        ("epochs: null", "must be a number, not None"),
        ("training: {stage3: {}}", "unknown key 'training.stage3'"),
        ("comparison: 3", "a mapping of optimizers"),
        ("comparison: {muon: [fast]}", "a mapping of optimizers"),
    ],
)
def test_bad_files_name_the_file(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(LetheError) as error:
        parse(["--config", path])
    assert words in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_yaml_niceties(tmp_path):
    path = write(
        tmp_path,
        "model: {name: m}\ndatasets: [a, b]\nseeds: 3\nout: 2026\nlora:\nmax-length: 64\noptimizer: adamw\n"
        "stage1: {epochs: 9}\nstage2: {}\nmasking: {threshold: .inf}\ncomparison: {muon: 1e-3}\n",
    )
    config = parse(["--config", path])
    assert config.datasets == "a,b" and parse_seeds(config) == [3] and config.out == "2026" and config.max_length == 64
    assert config.training.stage1.epochs == 9 and config.training.stage2.epochs == 3 and config.masking.threshold == float("inf")
    assert config.comparison == {"muon": [1e-3]} and config.study == "masks" and optimizer_arms(config) is None
    assert parse_seeds(parse(["--seeds", "2, 0,2"])) == [2, 0] and parse_seeds(parse(["--seed", "5"])) == [5]


def test_resolved_config_reads_back(tmp_path):
    config = parse(["--config", str(CONFIGS / "seed_masking.yaml"), "--lora_targets", "q_proj", "--pairs", "gsm8k:svamp"])
    assert parse(["--config", write(tmp_path, config_text(config))]) == config


def test_shipped_configs():
    equal, seed = (parse(["--config", str(CONFIGS / f"{name}.yaml")]) for name in ("masking", "seed_masking"))
    for arm in ("none", "bottom10", "highest"):
        assert stage_config(equal, 2, arm) == (equal.training.stage2, 3000)
    settings, max_train = stage_config(seed, 2, "highest")
    assert settings.learning_rate == 2e-5 and max_train is None
    assert stage_config(seed, 2, "none")[0].learning_rate == 1e-4 and stage_config(seed, 1, "highest")[1] == 3000


def test_eval_flags_and_help(capsys):
    config = parse(["--root", "out/nano", "--tasks", "gsm8k", "--batch-size", "3", "--replot"], "eval")
    assert (config.root, config.tasks, config.batch_size, config.replot) == ("out/nano", "gsm8k", 3, True)
    for argv, words in (
        (["--adapter", "x"], "--model"),
        (["--model", "x", "--no_merge"], "--adapter"),
        (["--root", "a", "--model", "b"], "one of them"),
        (["--learning_rate", "1"], "unknown flag"),
        (["--dtype", "fp8"], "one of auto"),
    ):
        with pytest.raises(LetheError, match=words):
            parse_eval(argv)
    with pytest.raises(SystemExit) as stop:
        parse(["--seed", "1", "-h"])
    page = capsys.readouterr().out
    assert stop.value.code == 0 and "--learning_rate" in page and len(page.splitlines()) < 190
    assert max(len(line) for line in page.splitlines()) <= 130
    assert "Newton-Schulz" in page and ": none | nf4 | int8 [none]" in page
    with pytest.raises(SystemExit):
        parse_eval(["--help"])
    assert "--replot" in capsys.readouterr().out


def test_eval_takes_out_as_the_study_unless_a_model_is_scored():
    assert (parse_eval(["--out", "out/x"]).root, parse_eval(["--out", "out/x"]).out) == ("out/x", None)
    scored = parse_eval(["--model", "nano", "--out", "scores"])
    assert (scored.root, scored.out) == (None, "scores")
    with pytest.raises(LetheError, match="both name a study"):
        parse_eval(["--out", "out/x", "--root", "out/y"])


OPTIMIZERS = ["--config", str(CONFIGS / "optimizers.yaml")]


def test_the_shipped_comparison_is_the_default_one_and_its_tasks_can_be_others():
    config = parse([*OPTIMIZERS, "--compare_optimizers"])
    names, rates = [name for name, _ in optimizer_arms(config)], [rate for _, rate in optimizer_arms(config)]
    assert set(names) == {"adamw", "muon"} and len(set(zip(names, rates, strict=True))) == 6
    assert (config.study, config.mask, config.pairs, config.out) == ("optimizers", "none", None, "out/{model}_optimizers")
    assert parse(["--compare_optimizers"]) == config and parse(["--study", "optimizers"]) == parse(OPTIMIZERS)
    other = parse([*OPTIMIZERS, "--compare_optimizers", "--datasets", "gsm8k,aqua_cot"])
    assert dataclasses.replace(other, datasets=config.datasets) == config and other.pairs is None
    # plain AdamW at the file's own rate is the built-in study's arm, but for its checkpoints
    assert parse([*OPTIMIZERS, "--save_steps", "7"]).training == parse(["--save_steps", "7"]).training
    assert parse(OPTIMIZERS).lora == parse([]).lora


def test_arms_of_an_optimizer_study(tmp_path):
    path = write(tmp_path, "study: optimizers\nmodel: m\nlr: 2e-4\ncomparison: {muon: [1e-3, 1e-3, 3e-3], adamw: 1e-4}\n")
    assert optimizer_arms(parse([])) is None and optimizer_arms(parse(["--optimizer", "muon"])) is None
    assert optimizer_arms(parse(["--config", path])) == [("adamw", 2e-4)]
    assert optimizer_arms(parse(["--config", path, "--optimizer", "muon", "--lr", "5"])) == [("muon", 5)]
    compared = parse(["--config", path, "--compare_optimizers"])
    assert optimizer_arms(compared) == [("muon", 1e-3), ("muon", 3e-3), ("adamw", 1e-4)]
    # flags win over the file: one rate, or another comparison
    assert optimizer_arms(parse(["--config", path, "--compare-optimizers", "--lr", "5e-4"])) == [("muon", 5e-4), ("adamw", 5e-4)]
    assert optimizer_arms(parse(["--config", path, "--comparison", "{adamw: [7e-4]}"])) == [("adamw", 7e-4)]
    plain = parse(["--model", "m", "--compare_optimizers", "--lr", "2e-3"])  # no comparison anywhere
    assert optimizer_arms(plain) == [("adamw", 2e-3), ("muon", 2e-3)] and plain.out == "out/{model}_optimizers"
    assert parse(["--model", "m", "--compare_optimizers", "--out", "o"]).out == "o"
    for config in (compared, plain, parse(["--config", path])):
        assert parse(["--config", write(tmp_path, config_text(config))]) == config


def test_settings_of_one_run():
    config = parse(["--learning_rate", "4e-3", "--stage2.learning_rate", "1e-3"])
    one = changed(config, {"optimizer.name": "muon", "learning_rate": 8e-3})
    assert one.optimizer.name == "muon" and one.training.stage1.learning_rate == 8e-3
    assert one.training.stage2.learning_rate == pytest.approx(2e-3)  # a quarter, as in the configuration
    assert changed(config, {"learning_rate": 4e-3, "optimizer.name": "adamw"}) == config == changed(config, {})
    assert changed(one, {"training.stage2.max_steps": 3}).training.stage2.max_steps == 3 and one.training.stage2.max_steps is None


def settings(*argv):
    return identity_of(parse(list(argv)), "model", {"a": "1"})


def test_what_belongs_to_a_study():
    for words in (["--keep", "5"], ["--save_steps", "7"], ["--max_memory", "6GiB"], ["--skip_training"], ["--resume_stage1", "x"],
                  ["--shard", "runs"]):  # fmt: skip
        assert settings(*words) == settings(), words
    for words in (["--full"], ["--quantize", "nf4"], ["--warmup_steps", "3"], ["--optimizer", "muon"], ["--momentum", "0.9"]):
        assert len(differences(settings(), settings(*words))) == 1, words
    assert differences(settings(), settings("--warmup_steps", "3")) == ["warmup_steps: null in the folder, 3 asked"]


def test_an_optimizer_study_holds_every_optimizer_and_rate():
    study = settings(*OPTIMIZERS)
    for words in (["--optimizer", "muon"], ["--compare_optimizers"], ["--comparison", "{muon: [1]}"], ["--lr", "1"]):
        assert settings(*OPTIMIZERS, *words) == study, words
    assert differences(study, settings(*OPTIMIZERS, "--ns_steps", "6")) == ["optimizer.ns_steps: 5 in the folder, 6 asked"]
    assert len(differences(study, settings(*OPTIMIZERS, "--stage2.learning_rate", "1"))) == 1
    assert differences(settings(), study) == ["study: masks in the folder, optimizers asked"]


def test_a_study_of_an_older_version_goes_on(tmp_path):
    """Its study.json and config.yaml know nothing of the leaves that came later."""
    new = ["study", "full", "quantize", "training.stage1.warmup_steps", "training.stage2.warmup_steps", "optimizer.momentum",
           "optimizer.nesterov", "optimizer.ns_steps", "optimizer.muon_scale", "optimizer.muon_factors"]  # fmt: skip
    old = settings()
    for name in new:
        del old["settings"][name]
    open_study(tmp_path / "s", parse([]), json.loads(json.dumps(old)))
    assert open_study(tmp_path / "s", parse([]), settings()).record["identity"]["settings"] == old["settings"]
    for words, line in (
        (["--full"], "full: false in the folder, true asked"),
        (["--quantize", "int8"], "quantize: none in the folder, int8 asked"),
        (["--learning_rate", "1"], "learning_rate: 0.003 in the folder, 1.0 asked"),
    ):
        with pytest.raises(LetheError, match=line):
            open_study(tmp_path / "s", parse([]), settings(*words))
    lines = config_text(parse([])).splitlines()
    dropped = {name.split(".")[-1] for name in new} | {"keep", "save_steps", "comparison", "shard", "max_memory"}
    text = "\n".join(line for line in lines if line.split(":")[0].strip() not in dropped)
    assert len(lines) - len(text.splitlines()) == len(dropped) + 4  # two of them are there for each stage and for pretraining
    assert parse(["--config", write(tmp_path, text)]) == parse([])
