"""study/seed_words.py: an earlier study's config.yaml, as it stands."""

import dataclasses

import pytest

from study.config import config_text, optimizer_arms, parse
from study.errors import LetheError
from study.flags import CONFIGS, load_yaml
from study.seed_words import is_seed_style

README_BLOCKS = """\
model:
  name: "meta-llama/Llama-3.2-1B"  # Default accessible model
  use_lora: true                   # Enable LoRA adapters
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.1
  target_modules: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
training:
  stage1:
    dataset: "gsm8k"
    epochs: 3
    batch_size: 4
    learning_rate: 2e-4
    weight_decay: 0.01
    max_length: 1024

  stage2:
    dataset: "aqua_rat"
    epochs: 3
    batch_size: 4
    learning_rate: 2e-4
    weight_decay: 0.01
    max_length: 1024
optimizer:
  type: "adamw"  # Options: "adamw", "muon"
  adamw:
    beta1: 0.9
    beta2: 0.999
    eps: 1e-8
  muon:
    beta1: 0.9
    beta2: 0.999
    eps: 1e-8
    mu: 0.01  # Muon-specific parameter
"""
REST = """\
evaluation: {batch_size: 8, max_new_tokens: 512, temperature: 0.1, do_sample: true, replay_samples: 100}
logging:
  log_dir: ./logs
  tensorboard_dir: ./tensorboard_logs
  save_dir: ./checkpoints
  log_interval: 11
  eval_interval: 101
  save_interval: 501
device: auto
mixed_precision: true
"""


def read(tmp_path, text, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(["--config", str(path), *flags])


def test_the_whole_file(tmp_path):
    more = README_BLOCKS.replace("    weight_decay", "    gradient_accumulation_steps: 5\n    warmup_steps: 99\n    weight_decay")
    config = read(tmp_path, more + REST)
    assert (config.study, config.datasets, config.mask, config.pairs) == ("optimizers", "gsm8k,aqua_rat", "none", None)
    assert (config.model.name, config.full, config.max_length) == ("meta-llama/Llama-3.2-1B", False, 1024)
    assert (config.device, config.dtype, config.out) == ("auto", "auto", "out/{model}_optimizers")
    lora = config.lora
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.targets), lora.targets[0]) == (16, 32, 0.1, 7, "q_proj")
    one = config.training.stage1
    assert one == config.training.stage2 and (one.epochs, one.batch_size, one.gradient_accumulation) == (3, 4, 5)
    assert (one.learning_rate, one.weight_decay, one.warmup_steps) == (2e-4, 0.01, 99)
    assert (one.log_steps, one.eval_steps, one.save_steps) == (11, 101, 501)
    assert (config.optimizer.name, config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (config.evaluation.batch_size, config.evaluation.max_new_tokens) == (8, 512)
    assert optimizer_arms(config) == [("adamw", 2e-4)]


def test_each_key_without_meaning_is_named_once_with_its_reason(tmp_path):
    notes = read(tmp_path, README_BLOCKS + REST).notes
    unused = [f"optimizer.muon.{key}" for key in ("beta1", "beta2", "eps", "mu")]
    unused += ["evaluation.temperature", "evaluation.do_sample", "evaluation.replay_samples"]
    unused += ["logging.log_dir", "logging.tensorboard_dir", "logging.save_dir"]
    words = " ".join(notes).replace(",", " ").split()
    assert [words.count(name) for name in unused] == [1] * len(unused)
    assert len(notes) == 4 and all("config.yaml: not used: " in note and note.endswith(")") and "\n" not in note for note in notes)
    assert any("greedy" in note for note in notes) and any("--output_dir" in note for note in notes)
    named = {word for word in words if "." in word and word.split(".")[0] in ("model", "training", "optimizer", "evaluation", "logging")}
    assert named <= {*unused, "optimizer.momentum)", "(optimizer.momentum)"}  # nothing that is used is named as unused


def test_other_values(tmp_path):
    text = (
        README_BLOCKS.replace("use_lora: true", "use_lora: false")
        .replace('type: "adamw"', 'type: "Muon"')
        .replace("mu: 0.01", "momentum: 0.8")
    )
    text = text.replace("beta1: 0.9", "beta1: 0.7", 1).replace("max_length: 1024", "max_length: 512", 1)
    text += "mixed_precision: false\ndevice: cpu\nmax_train: 9\nmasking: {tau: 0.5}\nevaluation: {top_p: 1}\n"
    config = read(tmp_path, text)
    assert config.full and config.dtype == "float32" and config.device == "cpu" and config.max_length == 1024
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.beta1) == ("muon", 0.8, 0.7)
    assert config.max_train == 9 and config.masking.tau == 0.5  # words of our own beside them
    assert sum("max_length is one for both stages: 1024" in note for note in config.notes) == 1
    assert not any("max_length" in note for note in read(tmp_path, README_BLOCKS).notes)


def test_flags_win_and_the_old_ones_are_understood(tmp_path):
    config = read(tmp_path, README_BLOCKS, "--model", "nano", "--optimizer", "muon", "--output-dir", "o", "--datasets", "a,b", "--full")
    assert (config.model.name, config.out, config.datasets, config.full) == ("nano", "o", "a,b", True)
    assert optimizer_arms(config) == [("muon", 2e-4)]
    assert optimizer_arms(read(tmp_path, README_BLOCKS, "--compare-optimizers")) == [("adamw", 2e-4), ("muon", 2e-4)]
    assert read(tmp_path, README_BLOCKS, "--resume-stage1", "./c").resume_stage1 == "./c"
    assert read(tmp_path, README_BLOCKS, "--resume-stage2=./c").resume_stage2 == "./c"
    assert read(tmp_path, README_BLOCKS, "--skip-training").skip_training


def test_the_study_comes_back_from_its_own_config(tmp_path):
    for flags in ([], ["--compare-optimizers"], ["--optimizer", "muon", "--lr", "3e-3"]):
        config = read(tmp_path, README_BLOCKS + REST, *flags)
        again = read(tmp_path, config_text(config))
        assert again == config and optimizer_arms(again) == optimizer_arms(config) and again.notes == ()


def test_only_such_files_are_read_so(tmp_path):
    for text in ("training: {stage2: {dataset: gsm8k}}", "optimizer: {type: muon}", "model: {use_lora: true}"):
        assert read(tmp_path, text).study == "optimizers"
    for path in CONFIGS.glob("*.yaml"):
        assert not is_seed_style(load_yaml(path)) and parse(["--config", str(path)]).notes == ()
    for text in ("model: {lora_rank: 4}", "evaluation: {do_sample: true}", "mixed_precision: true"):
        with pytest.raises(LetheError, match="unknown key"):
            read(tmp_path, text)


def test_unknown_keys_of_such_a_file_are_named_and_no_error(tmp_path):
    base = read(tmp_path, README_BLOCKS)
    config = read(tmp_path, README_BLOCKS + "wandb: {project: x}\nmax_trian: 3\n")
    assert dataclasses.replace(config) == dataclasses.replace(base)
    added = [note.partition(": not used: ")[2] for note in config.notes if note not in base.notes]
    assert added == ["wandb.project (no such setting here)", "max_trian (did you mean max_train?)"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("lora_rank: 16", "lora_rank: many", "model.lora_rank must be a whole number, not 'many'"),
        ('type: "adamw"', 'type: "adamuon"', "optimizer.type must be one of adamw, muon"),
        ("use_lora: true", "use_lora: 1", "model.use_lora must be true or false, not 1"),
        ("max_length: 1024", "max_length: long", "training.stage1.max_length must be a whole number"),
        ("epochs: 3", "epochs: -1", "training.stage1.epochs must be above 0"),
        ("model:", "device: mps\nmodel:", "device must be auto, cpu, cuda"),
    ],
)
def test_bad_values_are_named_in_the_words_of_the_file(tmp_path, old, new, words):
    with pytest.raises(LetheError) as error:
        read(tmp_path, README_BLOCKS.replace(old, new, 1))
    assert words in str(error.value) and "config.yaml" in str(error.value) and "\n" not in str(error.value)
