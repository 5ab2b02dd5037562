"""The configuration of a study: typed YAML files and command-line flags.

Order: the defaults below < `--config` file < flags.  Every leaf has a dotted name (`training.stage1.epochs`) and every
unique tail of it is a flag too (`--lora_rank`, `--rank`, `--stage1.epochs`); a stage leaf alone (`--epochs`)
sets both stages.  `-`, `_` and `.` mean the same in flags.  Unknown names and bad values raise LetheError in one line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from study.errors import LetheError
from study.flags import (
    CONFIGS,
    FRACTION,
    FROM_ZERO,
    POSITIVE,
    SOME_TEXT,
    build,
    help_text,
    opt,
    read_flags,
    read_yaml,
)
from study.plan import nearest

OPTIMIZERS = Literal["adamw"]
DEVICE = (lambda v: v in ("auto", "cpu", "cuda") or v[:5] == "cuda:" and v[5:].isdecimal(), "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class ModelConfig:
    name: str = opt("nano", "built-in 'nano', a Hugging Face Llama folder, or a hub id", SOME_TEXT)


@dataclass(frozen=True)
class LoraConfig:
    rank: int = opt(16, "rank of the two factors", POSITIVE)
    alpha: float = opt(16.0, "scale is alpha / rank", POSITIVE)
    dropout: float = opt(0.05, "dropout on the adapter's input", FRACTION)
    targets: list[str] | str = opt("all", "'all' linears, or names: q_proj,v_proj")
    rslora: bool = opt(False, "scale by alpha / sqrt(rank)")


@dataclass(frozen=True)
class StageConfig:
    epochs: float = opt(3.0, "passes over the task", POSITIVE)
    max_steps: int | None = opt(None, "stop after so many optimizer steps", POSITIVE)
    learning_rate: float = opt(1e-4, "peak learning rate", POSITIVE)
    batch_size: int = opt(16, "times gradient_accumulation: examples in a step", POSITIVE)
    gradient_accumulation: int = opt(4, "times batch_size: examples in a step", POSITIVE)
    warmup_ratio: float = opt(0.1, "share of the steps spent warming up", (lambda v: 0 <= v <= 1, "from 0 to 1"))
    scheduler: Literal["cosine", "linear", "constant"] = opt("cosine", "the curve after warm-up")
    weight_decay: float = opt(0.0, "decoupled weight decay", FROM_ZERO)
    max_grad_norm: float = opt(1.0, "clip the gradient norm (0: never)", FROM_ZERO)
    gradient_checkpointing: bool = opt(False, "recompute activations, to save memory")
    log_steps: int = opt(10, "one logged line per so many steps", POSITIVE)
    eval_steps: int | None = opt(None, "score a few test items every so many steps", POSITIVE)


@dataclass(frozen=True)
class TrainingConfig:
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    name: OPTIMIZERS = opt("adamw", "which optimizer: adamw")
    beta1: float = opt(0.9, "decay of the first moment", FRACTION)
    beta2: float = opt(0.999, "decay of the second moment", FRACTION)
    eps: float = opt(1e-8, "added to the denominator", POSITIVE)


@dataclass(frozen=True)
class MaskingConfig:
    threshold: float = opt(30.0, "highest: drop tokens of a perplexity above this", (lambda v: v >= 0, "0 or more"))
    group_size: int = opt(4, "bottom10: tokens in a window", POSITIVE)
    overlap_ratio: float = opt(0.2, "bottom10: overlap of neighbouring windows", FRACTION)
    ratio: float = opt(0.1, "bottom10: share of the windows to drop", (lambda v: 0 < v < 1, "between 0 and 1"))
    direction: Literal["low_ppl", "low_confidence"] = opt("low_ppl", "bottom10: which end of the windows to drop")
    reference: Literal["start", "base", "online"] = opt("start", "the model whose perplexities decide")
    match: str = opt("highest", "lowest, random: drop as many as this arm does")
    normalize: Literal["kept", "all"] = opt("kept", "divide the loss by the kept or by all completion tokens")
    mask_end: bool = opt(False, "let the end-of-turn token be dropped too")
    tau: float = opt(0.75, "soft: width of the weight exp(-((ppl - 1) / tau)^2)", POSITIVE)


@dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = opt(64, "prompts decoded together", POSITIVE)
    max_new_tokens: int | None = opt(None, "longest answer (default: the task's own)", POSITIVE)
    tasks: str | None = opt(None, "score these tasks only")
    eval_items: int = opt(64, "test items scored at every eval_steps", POSITIVE)


@dataclass(frozen=True)
class Config:
    """One study.  `sources` names the YAML files that were read; it is no leaf."""

    datasets: str | None = opt(None, "tasks: a,b | name=file.jsonl | all (default: all under --data_root)")
    data_root: str = opt("data", "where the data folders lie")
    pairs: str | None = opt(None, "stage-2 pairs: a:b,c:d (default: every ordered pair)")
    stage: int | None = opt(None, "1 or 2 (default: both)", (lambda v: v in (1, 2), "1 or 2"))
    mask: str | None = opt(None, "arms, see masking/weights.py (default: none,bottom10,highest)")
    out: str = opt("out/{model}", "study folder; may contain {model} and {timestamp}", SOME_TEXT)
    seed: int = opt(0, "seed of everything random", FROM_ZERO)
    seeds: str | None = opt(None, "several seeds: 0,1,2")
    device: str = opt("auto", "auto | cpu | cuda | cuda:N", DEVICE)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "compute type")
    template: Literal["auto", "llama3", "llama3-bare", "plain"] = opt("auto", "prompt template")
    max_length: int = opt(2048, "longest example in tokens", POSITIVE)
    micro_tokens: int | None = opt(None, "most tokens in one pass of a step (default: 16384 on CUDA, 4096 on CPU)", POSITIVE)
    max_train: int | None = opt(None, "train on at most so many rows of a task", POSITIVE)
    max_test: int | None = opt(None, "score at most so many rows of a task", POSITIVE)
    strict: bool = opt(False, "a bad record is an error")
    inspect: int | None = opt(None, "show kept and dropped tokens of so many examples, train nothing", POSITIVE)
    print_config: bool = opt(False, "print what would run, train nothing")
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    arms: dict[str, dict] | None = opt(None, "YAML only: stage-2 settings of one arm, {bottom10: {learning_rate: 2e-5}}")
    sources: tuple = field(default=(), init=False, repr=False, compare=False)


@dataclass(frozen=True)
class EvalConfig:
    root: str | None = opt(None, "study folder (default: the newest under out/)")
    model: str | None = opt(None, "score this model, without a study")
    adapter: str | None = opt(None, "adapter folder to put on --model")
    tasks: str | None = opt(None, "score these tasks only: a,b")
    datasets: str | None = opt(None, "like train.py: a,b | name=file.jsonl | all")
    data_root: str = opt("data", "where the data folders lie")
    max_test: int | None = opt(None, "score at most so many rows of a task", POSITIVE)
    batch_size: int = opt(64, "prompts decoded together", POSITIVE)
    max_new_tokens: int | None = opt(None, "longest answer (default: the task's own)", POSITIVE)
    device: str = opt("auto", "auto | cpu | cuda | cuda:N", DEVICE)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "compute type")
    template: Literal["auto", "llama3", "llama3-bare", "plain"] = opt("auto", "prompt template")
    out: str | None = opt(None, "where the results of --model go", SOME_TEXT)
    replot: bool = opt(False, "draw again from the stored results, score nothing")
    no_merge: bool = opt(False, "with --adapter: score once more with the adapter beside the weights, and say what differs")
    sources: tuple = field(default=(), init=False, repr=False, compare=False)


TRAIN_EXAMPLES = """\
Fine-tune a Llama on one task after another and see what it forgets.

  python train.py                                     the built-in study: nano, three tasks, both stages, three arms
  torchrun train.py --stage 1                         one LoRA adapter per task
  torchrun train.py --stage 2 --mask bottom10         every ordered pair of tasks, this arm
  python train.py --config configs/masking.yaml --model meta-llama/Llama-3.2-1B-Instruct
  python train.py --datasets mine=path/to/file.jsonl --stage 1
  python train.py --mask bottom10 --inspect 3         show kept and dropped tokens, train nothing

Order: defaults < --config FILE < flags. Without --config, the nano model takes configs/nano.yaml.
The same command again continues what is unfinished."""
EVAL_EXAMPLES = """\
Score what was trained, fill the retention matrix, draw it.

  python eval.py                                      the newest study: missing cells, tables, plots
  python eval.py --root out/nano --tasks gsm8k
  python eval.py --root out/nano --replot             tables and plots only
  python eval.py --model DIR --adapter DIR --tasks gsm8k,svamp"""
TITLES = {
    "": "Study",
    "model": "Model",
    "lora": "LoRA",
    "training": "Training (both stages; --stage2.epochs sets one)",
    "optimizer": "Optimizer",
    "masking": "Masking",
    "evaluation": "Evaluation",
}


def parse(argv: list[str], program: str = "train") -> Any:
    """Command line -> Config (program "train") or EvalConfig ("eval").  --help prints and exits."""
    if program == "eval":
        return parse_eval(argv)
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(Config, TRAIN_EXAMPLES, TITLES))
        raise SystemExit(0)
    given, files = read_flags(list(argv), Config)
    asked = next((value for hits, value, _ in reversed(given) if hits == ["model.name"]), "nano")
    if not files and asked == "nano":
        files = [str(CONFIGS / "nano.yaml")]
    config = build(Config, [read_yaml(path, Config) for path in files] + [given])
    object.__setattr__(config, "sources", tuple(files))
    if config.arms:
        object.__setattr__(config, "arms", _check_arms(config.arms, ", ".join(files)))
    parse_seeds(config)
    return config


def parse_eval(argv: list[str]) -> EvalConfig:
    """Command line of eval.py -> EvalConfig; the same rules as parse."""
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(EvalConfig, EVAL_EXAMPLES, {"": "Flags"}))
        raise SystemExit(0)
    given, files = read_flags(list(argv), EvalConfig)
    config = build(EvalConfig, [read_yaml(path, EvalConfig) for path in files] + [given])
    if config.adapter and not config.model:
        raise LetheError("--adapter needs --model: the model that the adapter was trained on")
    if config.no_merge and not config.adapter:
        raise LetheError("--no_merge needs --adapter: it compares an adapter merged into the weights with the same beside them")
    if config.out and not config.model:
        if config.root:
            raise LetheError("--root and --out both name a study; give one of them (with --model, --out takes the results)")
        config = dataclasses.replace(config, root=config.out, out=None)
    if config.root and config.model:
        raise LetheError("--root scores a study and --model a single model; give one of them")
    object.__setattr__(config, "sources", tuple(files))
    return config


def _check_arms(arms: dict[str, dict], where: str) -> dict[str, dict]:
    """Type the per-arm settings: leaves of a stage, and max_train."""
    known = [f.name for f in dataclasses.fields(StageConfig)] + ["max_train"]
    checked: dict[str, dict] = {}
    for arm, settings in arms.items():
        if not isinstance(settings, dict):
            raise LetheError(f"{where}: arms.{arm} must be a mapping such as {{learning_rate: 2e-5}}")
        layer = []
        for key, value in settings.items():
            if key not in known:
                raise LetheError(f"{where}: arms.{arm}: unknown key '{key}'{nearest(str(key), known)}")
            name = key if key == "max_train" else f"training.stage2.{key}"
            layer.append(([name], value, f"{where}: arms.{arm}.{key}"))
        typed = build(Config, [layer])
        checked[arm] = {k: getattr(typed if k == "max_train" else typed.training.stage2, k) for k in settings}
    return checked


def stage_config(config: Config, stage: int, arm: str = "none") -> tuple[StageConfig, int | None]:
    """(the settings, max_train) of one run: those of its stage, with the arm's own from `arms` in stage 2."""
    settings = config.training.stage1 if stage == 1 else config.training.stage2
    own = dict((config.arms or {}).get(arm, {})) if stage == 2 else {}
    max_train = own.pop("max_train", config.max_train)
    return dataclasses.replace(settings, **own), max_train


def parse_seeds(config: Config) -> list[int]:
    """The seeds of the study: --seeds 0,1,2, else --seed alone."""
    if config.seeds is None:
        return [config.seed]
    words = [word.strip() for word in config.seeds.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise LetheError(f"--seeds must be whole numbers with commas between, such as 0,1,2, not '{config.seeds}'")
    return list(dict.fromkeys(int(word) for word in words))


def to_dict(config: Any) -> dict:
    """The leaves as a nested dict, as YAML and JSON take it."""
    tree = dataclasses.asdict(config)
    tree.pop("sources", None)
    return tree


def config_text(config: Any) -> str:
    """The resolved configuration as YAML; `--config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)
