"""The leaves of the configuration: what can be set, with its type, its default, its line in --help and its limits."""

import re
from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

from study.flags import FRACTION, FROM_ZERO, POSITIVE, SOME_TEXT, opt

OPTIMIZERS = Literal["adamw", "muon"]
RATES = (
    lambda v: v and all(k in get_args(OPTIMIZERS) and rates and all(0 < rate < inf for rate in rates) for k, rates in v.items()),
    "adamw or muon or both, each with learning rates above 0",
)
MEMORY = (
    lambda v: bool(re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?\s*(([KMGT]i?)?B)?", v.strip(), re.I)),
    "an amount above 0, such as 6GiB or 500MB, or a number of GiB",
)
OUT = "out/{model}"
FINITE = (lambda v: -inf < v < inf, "a finite number")
# How outputs are decoded, see model/decoding.py: leaves of the evaluation, and what `decoding` may set for a task.
DECODING = ("num_beams", "length_penalty", "no_repeat_ngram_size", "temperature", "top_p", "top_k", "repetition_penalty")
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
    warmup_steps: int | None = opt(None, "so many steps of warm-up, whatever warmup_ratio says", FROM_ZERO)
    scheduler: Literal["cosine", "linear", "constant"] = opt("cosine", "the curve after warm-up")
    weight_decay: float = opt(0.0, "decoupled weight decay", FROM_ZERO)
    max_grad_norm: float = opt(1.0, "clip the gradient norm (0: never)", FROM_ZERO)
    gradient_checkpointing: bool = opt(False, "recompute activations, to save memory")
    log_steps: int = opt(10, "one logged line per so many steps", POSITIVE)
    eval_steps: int | None = opt(None, "score a few test items every so many steps", POSITIVE)
    save_steps: int = opt(100, "a checkpoint every so many steps; the same command goes on from the newest", POSITIVE)


@dataclass(frozen=True)
class TrainingConfig:
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    name: OPTIMIZERS = opt("adamw", "muon: matrices by Muon, all else by AdamW")
    beta1: float = opt(0.9, "AdamW: decay of the first moment", FRACTION)
    beta2: float = opt(0.999, "AdamW: decay of the second moment", FRACTION)
    eps: float = opt(1e-8, "AdamW: added to the denominator", POSITIVE)
    momentum: float = opt(0.95, "Muon: decay of its momentum", FRACTION)
    nesterov: bool = opt(True, "Muon: look ahead (--no_nesterov: do not)")
    ns_steps: int = opt(5, "Muon: Newton-Schulz iterations", POSITIVE)
    muon_scale: Literal["match_rms_adamw", "original"] = opt("match_rms_adamw", "how large Muon's steps are")
    muon_factors: Literal["both", "A", "B"] = opt("both", "which LoRA factors Muon takes; AdamW takes the other")


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
    mmlu: str | None = opt(None, "a column of general ability: mini_mmlu, or the folder or file of MMLU", SOME_TEXT)
    shots: int | None = opt(None, "solved examples before a question (default: MMLU 5 by letter, 0 by generate)", FROM_ZERO)
    mmlu_by: Literal["letter", "generate"] = opt("letter", "what decides: the likelihood of the letters, or a generated answer")
    harness: str | None = opt(None, "more columns, of lm-evaluation-harness: hellaswag,arc_easy", SOME_TEXT)
    harness_path: str | None = opt(None, "folder of your own lm-evaluation-harness tasks (YAML)", SOME_TEXT)
    max_samples: int | None = opt(None, "score at most so many items of each of these columns", POSITIVE)
    num_beams: int = opt(1, "beams of a search; 1: greedy, or drawn", POSITIVE)
    length_penalty: float = opt(1.0, "beams: a hypothesis is worth its log-probability / length^this", FINITE)
    no_repeat_ngram_size: int = opt(0, "never so many tokens in a row a second time; 0: as it comes", FROM_ZERO)
    temperature: float = opt(0.0, "of drawing; 0: nothing is drawn", FROM_ZERO)
    top_p: float = opt(1.0, "of drawing: the likeliest tokens that have this together", (lambda v: 0 < v <= 1, "above 0, at most 1"))
    top_k: int = opt(0, "of drawing: so many likeliest tokens; 0: all", FROM_ZERO)
    repetition_penalty: float = opt(1.0, "makes what was said less likely; 1: does not", POSITIVE)
    decoding: dict[str, dict] | None = opt(None, "YAML only: a task's own decoding in place of these, {simp: {num_beams: 5}}")


@dataclass(frozen=True)
class RehearsalConfig:
    arms: str | None = opt(None, "arms of a sequence, see study/sequence.py: none,random,ssr … (default: all)")
    share: float = opt(0.1, "rows of each earlier task, as a share of what was trained on", (lambda v: 0 < v <= 1, "above 0, at most 1"))
    relabel: Literal["once", "every_stage"] = opt("once", "ssr, self_output: when a model writes the answers anew")
    floor: float | None = opt(None, "leave out answers of a lower mean log-probability, in nats a token")
    equal: Literal["rows", "steps"] = opt("rows", "what arms share: the new task's rows and passes, or the steps of a stage")
    demos: int = opt(20, "ssr: demonstrations that the base is shown some of", (lambda v: v >= 2, "2 or more"))
    pool: float = opt(3.0, "ssr: invented rows for each one that is kept", (lambda v: v >= 1, "1 or more"))
    temperature: float = opt(0.9, "ssr: of sampling", POSITIVE)
    top_p: float = opt(0.6, "ssr: of sampling", (lambda v: 0 < v <= 1, "above 0, at most 1"))
    repetition_penalty: float = opt(1.2, "ssr: of sampling; 1: none", POSITIVE)
    clusters: int = opt(20, "kmeans, ssr: clusters that rows are taken from", POSITIVE)
    l2_coefficient: float = opt(0.01, "l2: how strongly parameters are held", FROM_ZERO)
    ewc_coefficient: float = opt(0.01, "ewc: the same, times each one's Fisher information, which may be 1e-8", FROM_ZERO)
    fisher_samples: int = opt(200, "ewc: examples that its weights are estimated on", POSITIVE)


@dataclass(frozen=True)
class PretrainingConfig:
    corpus: str | None = opt(None, "pretrain on this: builtin, a text or token file, or a folder (data/corpus.py)", SOME_TEXT)
    tokens: int = opt(10_000_000, "train on so many tokens; a shorter corpus is passed over again", POSITIVE)
    fresh: bool = opt(False, "from random weights of --model's shape, not from its weights")
    shape: dict[str, int] | None = opt(None, "fresh weights of another shape: '{num_hidden_layers: 4, hidden_size: 128}'")
    row_length: int = opt(256, "tokens in a row, none of which sees another row", (lambda v: v >= 2, "2 or more"))
    rows_per_step: int = opt(16, "rows in an optimizer step", POSITIVE)
    held_out: int = opt(64, "rows kept out of training; the loss on them is logged", POSITIVE)
    optimizer: OPTIMIZERS = opt("muon", "of pretraining")
    learning_rate: float = opt(8e-3, "peak learning rate (muon: of the matrices)", POSITIVE)
    adamw_rate: float = opt(3e-3, "muon: peak learning rate of embedding, head and norms, which AdamW takes", POSITIVE)
    weight_decay: float = opt(0.01, "decoupled weight decay (muon: of the matrices)", FROM_ZERO)
    adamw_beta2: float = opt(0.95, "AdamW: decay of the second moment", FRACTION)
    warmup_steps: int = opt(50, "steps of warm-up (at most a tenth of all)", FROM_ZERO)
    scheduler: Literal["cosine", "linear", "constant"] = opt("cosine", "the curve after warm-up")
    final_rate: float = opt(0.05, "where the curve ends, as a share of the peak", (lambda v: 0 <= v <= 1, "from 0 to 1"))
    max_grad_norm: float = opt(1.0, "clip the gradient norm (0: never)", FROM_ZERO)
    log_steps: int = opt(20, "one logged line per so many steps", POSITIVE)
    eval_steps: int = opt(50, "the loss on the held-out rows every so many steps", POSITIVE)
    save_steps: int = opt(200, "a checkpoint every so many steps", POSITIVE)


@dataclass(frozen=True)
class GrowthConfig:
    models: dict[str, str] | None = opt(None, "compare these, pretrain none: '{grown: DIR, naive: DIR}'")
    source_tokens: int = opt(2_000_000, "tokens that the small model is trained on before it grows", POSITIVE)
    factor: int = opt(2, "the small model has the layers of the large one divided by this", (lambda v: v >= 2, "2 or more"))
    order: str = opt("stack", "how layers are copied: stack, interpolate, gradual, partial:12-34*3-5 (model/growth.py)", SOME_TEXT)
    zero_init: bool = opt(False, "new layers begin as nothing, so that growth changes no output")
    noise: float = opt(0.0, "mix so much noise into the copied weights", (lambda v: 0 <= v <= 1, "from 0 to 1"))


@dataclass(frozen=True)
class Config:
    """One study.  `sources` names the YAML files that were read, `notes` says what of them is not used; both are no leaves."""

    datasets: str | None = opt(None, "tasks: a,b | name=file.jsonl | all (default: all under --data_root)")
    data_root: str = opt("data", "where the data folders lie")
    pairs: str | None = opt(None, "stage-2 pairs: a:b,c:d (default: every ordered pair; optimizers: the first two tasks)")
    stage: int | None = opt(None, "1 or 2 (default: both)", (lambda v: v in (1, 2), "1 or 2"))
    mask: str | None = opt(None, "arms, see masking/weights.py (default: none,bottom10,highest)")
    out: str = opt(OUT, "study folder, with {model} or {timestamp} (optimizers: out/{model}_optimizers)", SOME_TEXT)
    seed: int = opt(0, "seed of everything random", FROM_ZERO)
    seeds: str | None = opt(None, "several seeds: 0,1,2")
    max_train: int | None = opt(None, "train on at most so many rows of a task", POSITIVE)
    max_test: int | None = opt(None, "score at most so many rows of a task", POSITIVE)
    max_length: int = opt(2048, "longest example in tokens", POSITIVE)
    template: Literal["auto", "llama3", "llama3-bare", "plain", "response"] = opt("auto", "prompt template, see model/tokenizer.py")
    train_on_source: bool = opt(False, "the prompt's tokens carry loss too")
    strict: bool = opt(False, "a bad record is an error")
    salvage: bool = opt(False, "of a data file that is cut off, train on the rows before the cut")
    inspect: int | None = opt(None, "show kept and dropped tokens of so many examples, train nothing", POSITIVE)
    print_config: bool = opt(False, "print what would run, train nothing")
    skip_training: bool = opt(False, "train nothing: score what is trained, draw tables and pictures")
    study: Literal["masks", "optimizers", "batch", "sequences", "pretraining", "growth"] = opt("masks", "what its arms are")
    compare_optimizers: bool = opt(False, "run every optimizer and rate of --comparison, not --optimizer alone")
    comparison: dict[str, list[float]] | None = opt(None, "'{adamw: [1e-3, 3e-3], muon: [3e-3]}' (default: both at one rate)", RATES)
    datasets_folder: str | None = opt(None, "fine-tune on each file of a folder (or one file), score --mmlu before and after", SOME_TEXT)
    chunk: str | None = opt(None, "which sub-folder of --datasets_folder: 1, 001 or chunk_001", SOME_TEXT)
    sequence: str | None = opt(None, "train one task after another: a,b,c; several orders: 'a,b,c;c,a,b'", SOME_TEXT)
    full: bool = opt(False, "train all weights, no LoRA")
    quantize: Literal["none", "nf4", "int8"] = opt("none", "LoRA on a quantised base (nf4 needs bitsandbytes)")
    max_memory: str | None = opt(None, "6GiB: layers of the base beyond this wait in host memory", MEMORY)
    device: str = opt("auto", "auto | cpu | cuda | cuda:N", DEVICE)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "compute type")
    micro_tokens: int | None = opt(None, "most tokens in one pass of a step (default: 16384 on CUDA, 4096 on CPU)", POSITIVE)
    shard: Literal["none", "runs", "model"] = opt("none", "what torchrun's processes share: each step (none), runs, a --full model")
    keep: int = opt(2, "newest checkpoints that stay in a run", POSITIVE)
    resume_stage1: str | None = opt(None, "go on from this checkpoint folder (default: the newest whole one is found)", SOME_TEXT)
    resume_stage2: str | None = opt(None, "the same for stage 2", SOME_TEXT)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    arms: dict[str, dict] | None = opt(None, "YAML only: stage-2 settings of one arm, {bottom10: {learning_rate: 2e-5}}")
    sources: tuple = field(default=(), init=False, repr=False, compare=False)
    notes: tuple = field(default=(), init=False, repr=False, compare=False)


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
    template: Literal["auto", "llama3", "llama3-bare", "plain", "response"] = opt("auto", "prompt template, see model/tokenizer.py")
    quantize: Literal["none", "nf4", "int8"] = opt("none", "with --model: the linears of the base in 4 or 8 bits")
    max_memory: str | None = opt(None, "6GiB: layers of the base beyond this wait in host memory", MEMORY)
    out: str | None = opt(None, "where the results of --model go", SOME_TEXT)
    replot: bool = opt(False, "draw again from the stored results, score nothing")
    mmlu: str | None = opt(None, "a column of general ability: mini_mmlu, or the folder or file of MMLU", SOME_TEXT)
    shots: int | None = opt(None, "solved examples before a question (default: MMLU 5 by letter, 0 by generate)", FROM_ZERO)
    mmlu_by: Literal["letter", "generate"] = opt("letter", "what decides: the likelihood of the letters, or a generated answer")
    harness: str | None = opt(None, "more columns, of lm-evaluation-harness: hellaswag,arc_easy", SOME_TEXT)
    harness_path: str | None = opt(None, "folder of your own lm-evaluation-harness tasks (YAML)", SOME_TEXT)
    max_samples: int | None = opt(None, "score at most so many items of each of these columns", POSITIVE)
    num_beams: int = opt(1, "beams of a search; 1: greedy, or drawn", POSITIVE)
    length_penalty: float = opt(1.0, "beams: a hypothesis is worth its log-probability / length^this", FINITE)
    no_repeat_ngram_size: int = opt(0, "never so many tokens in a row a second time; 0: as it comes", FROM_ZERO)
    temperature: float = opt(0.0, "of drawing; 0: nothing is drawn", FROM_ZERO)
    top_p: float = opt(1.0, "of drawing: the likeliest tokens that have this together", (lambda v: 0 < v <= 1, "above 0, at most 1"))
    top_k: int = opt(0, "of drawing: so many likeliest tokens; 0: all", FROM_ZERO)
    repetition_penalty: float = opt(1.0, "makes what was said less likely; 1: does not", POSITIVE)
    decoding: dict[str, dict] | None = opt(None, "YAML only: a task's own decoding in place of these, {simp: {num_beams: 5}}")
    seed: int = opt(0, "of drawing", FROM_ZERO)
    probabilistic: bool = opt(False, "a study of several seeds: their adapters as an ensemble, and LoRA dropout left on; calibration")
    mc_samples: int = opt(8, "with --probabilistic: passes with dropout on (0: none)", FROM_ZERO)
    mc_dropout: float | None = opt(None, "with --probabilistic: the rate in these (default: the adapter's own)", FRACTION)
    no_merge: bool = opt(False, "with --adapter: score once more with the adapter beside the weights, and say what differs")
    sources: tuple = field(default=(), init=False, repr=False, compare=False)
