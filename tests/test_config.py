"""study/config.py: flags, YAML, order of precedence, and errors that fit in one line."""

import dataclasses

import pytest

from study.config import Config, config_text, parse, parse_eval, parse_seeds, stage_config
from study.errors import LetheError
from study.flags import CONFIGS, leaves


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
    sample = {int: "1", float: "0.5", bool: "true", str: "cpu", int | None: "1", str | None: "a:b"}
    for name, (kind, field) in leaves(Config).items():
        if name in ("arms", "seeds"):
            continue
        text = sample.get(kind, field.default)
        value = parse(["--config", write(tmp_path, config_text(parse([f"--{name}", str(text)])))])
        for part in name.split("."):
            value = getattr(value, part)
        assert value == field.default or str(value).lower() in (text, f"{text}.0"), name


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
        (["--optimizer", "muonn"], "one of adamw"),
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
        "stage1: {epochs: 9}\nmasking: {threshold: .inf}\n",
    )
    config = parse(["--config", path])
    assert config.datasets == "a,b" and parse_seeds(config) == [3] and config.out == "2026" and config.max_length == 64
    assert config.training.stage1.epochs == 9 and config.training.stage2.epochs == 3 and config.masking.threshold == float("inf")
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
    assert stop.value.code == 0 and "--learning_rate" in page and len(page.splitlines()) < 100
    assert max(len(line) for line in page.splitlines()) <= 130
    with pytest.raises(SystemExit):
        parse_eval(["--help"])
    assert "--replot" in capsys.readouterr().out


def test_eval_takes_out_as_the_study_unless_a_model_is_scored():
    assert (parse_eval(["--out", "out/x"]).root, parse_eval(["--out", "out/x"]).out) == ("out/x", None)
    scored = parse_eval(["--model", "nano", "--out", "scores"])
    assert (scored.root, scored.out) == (None, "scores")
    with pytest.raises(LetheError, match="both name a study"):
        parse_eval(["--out", "out/x", "--root", "out/y"])
