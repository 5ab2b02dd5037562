"""The configuration of a study: typed YAML files and command-line flags.

Order: the defaults below < `--config` file < flags.  Every leaf has a dotted name (`training.stage1.epochs`) and every
unique tail of it is a flag too (`--lora_rank`, `--rank`, `--stage1.epochs`); a stage leaf alone (`--epochs`)
sets both stages.  `-`, `_` and `.` mean the same in flags.  Unknown names and bad values raise LetheError in one line.
"""

import dataclasses
from typing import Any, get_args

import yaml

from study.environment import default_model
from study.errors import LetheError
from study.flags import CONFIGS, build, help_text, load_yaml, read_flags, read_tree, read_yaml
from study.plan import nearest
from study.seed_words import is_seed_style, translate
from study.settings import DECODING, OPTIMIZERS, OUT, Config, EvalConfig, StageConfig

TRAIN_EXAMPLES = """\
Fine-tune a Llama on one task after another and see what it forgets.

  python train.py                                     the built-in study: nano, three tasks, both stages, three arms
  torchrun train.py --stage 1                         one LoRA adapter per task
  torchrun train.py --stage 2 --mask bottom10         every ordered pair of tasks, this arm
  python train.py --config configs/masking.yaml --model meta-llama/Llama-3.2-1B-Instruct
  python train.py --datasets mine=path/to/file.jsonl --stage 1
  python train.py --mask bottom10 --inspect 3         show kept and dropped tokens, train nothing
  python train.py --compare_optimizers                AdamW against Muon, at several learning rates
  python train.py --sequence a,b,c --rehearsal none,ssr          three tasks in sequence, with and without rehearsal
  python train.py --corpus text.txt --model nano --fresh         pretrain a model of nano's shape
  python train.py --config configs/growth.yaml                   a grown model against one from scratch, both pretrained here
  python train.py --datasets_folder DIR --chunk 1 --mmlu DIR     fine-tune on each file, score MMLU before and after

Order: defaults < --config FILE < flags. Without --config, the nano model takes configs/nano.yaml, or
configs/optimizers.yaml with --compare_optimizers.
The same command again continues what is unfinished."""
EVAL_EXAMPLES = """\
Score what was trained, fill the retention matrix, draw it.

  python eval.py                                      the newest study: missing cells, tables, plots
  python eval.py --root out/nano --tasks gsm8k
  python eval.py --root out/nano --replot             tables and plots only
  python eval.py --model DIR --adapter DIR --tasks gsm8k,svamp
  python eval.py --model DIR --mmlu DIR --harness hellaswag,arc_easy"""
TITLES = {
    "": "Study: what runs, and where it goes",
    "max_train": "Data",
    "inspect": "Instead of training",
    "study": "Optimizer study",
    "datasets_folder": "A batch of data sets, and general ability before and after each",
    "full": "What is trained, and on what",
    "shard": "Several processes, checkpoints",
    "model": "Model",
    "lora": "LoRA",
    "training": "Training (both stages; --stage2.epochs sets one)",
    "optimizer": "Optimizer",
    "masking": "Masking",
    "evaluation": "Evaluation",
    "rehearsal": "Rehearsal, in a sequence",
    "pretraining": "Pretraining (--corpus)",
    "growth": "Growth: a model that grew against one that did not (configs/growth.yaml)",
}


def parse(argv: list[str], program: str = "train") -> Any:
    """Command line -> Config (program "train") or EvalConfig ("eval").  --help prints and exits."""
    if program == "eval":
        return parse_eval(argv)
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(Config, TRAIN_EXAMPLES, TITLES))
        raise SystemExit(0)
    given, files = read_flags(list(argv), Config)
    asked = {name: value for hits, value, _ in given for name in hits}
    told = default_model() if "datasets_folder" in asked and "model.name" not in asked else None
    if not files and asked.get("model.name", told[0] if told else "nano") == "nano":
        optimizers = asked.get("compare_optimizers") == "true" or "comparison" in asked or asked.get("study") == "optimizers"
        files = [str(CONFIGS / ("optimizers.yaml" if optimizers else "nano.yaml"))]
    layers, notes = [[(["model.name"], *told)]] if told else [], []
    for path in files:
        tree = load_yaml(path)
        layer, said = translate(tree, path, Config) if is_seed_style(tree) else (read_tree(tree, path, Config), [])
        layers.append(layer)
        notes += [f"{path}: {line}" for line in said]
    config = build(Config, [*layers, given])
    named = {name for layer in layers for hits, _, _ in layer for name in hits} | set(asked)
    if told and config.model.name == told[0]:
        notes.append(f"model      {told[0]} (from {told[1]}; --model wins over it)")
    if config.datasets_folder or config.study == "batch":
        config = _as_batch(config, asked, named)
    if config.sequence or config.study in ("sequences", "growth"):
        config = _as_sequences(config, asked, named)
    elif config.pretraining.corpus or config.study == "pretraining":
        config = _as_pretraining(config, asked, named)
    if "comparison" in asked and "compare_optimizers" not in asked:
        config = dataclasses.replace(config, compare_optimizers=True)
    if config.compare_optimizers or config.study == "optimizers":
        config = _as_optimizer_study(config, asked, named)
    _refuse_conflicts(config)
    object.__setattr__(config, "sources", tuple(files))
    object.__setattr__(config, "notes", tuple(notes))
    if config.arms:
        object.__setattr__(config, "arms", _check_arms(config.arms, ", ".join(files)))
    if config.evaluation.decoding:
        object.__setattr__(config.evaluation, "decoding", _check_decoding(config.evaluation.decoding, Config, "evaluation.", files))
    parse_seeds(config)
    return config


def _as_optimizer_study(config: Config, flags: dict[str, str], named: set[str]) -> Config:
    """The leaves that follow from an optimizer study.  flags: leaves given as flags; named: given at all."""
    if config.compare_optimizers and "optimizer.name" in flags:
        raise LetheError("--optimizer takes one optimizer and --compare_optimizers those of --comparison; give one of them")
    if config.mask not in (None, "none"):
        raise LetheError(f"an optimizer study masks nothing, and --mask {config.mask} is asked; leave out one of them")
    changes: dict[str, Any] = {"study": "optimizers", "mask": "none"}
    if "out" not in named:  # a study of masks may lie in the other folder
        changes["out"] = f"{OUT}_optimizers"
    if config.comparison and "training.stage1.learning_rate" in flags and "comparison" not in flags:  # flags win over files
        changes["comparison"] = {name: [config.training.stage1.learning_rate] for name in config.comparison}
    return dataclasses.replace(config, **changes)


def _as_sequences(config: Config, flags: dict[str, str], named: set[str]) -> Config:
    """The leaves that follow from --sequence.  flags: leaves given as flags; named: given at all."""
    for wrong, line in (
        (not config.sequence, f"study: {config.study} needs --sequence, the tasks in their order: a,b,c"),
        (config.study not in ("masks", "sequences", "growth") or config.compare_optimizers,
         "--sequence is a study of its own; leave out --compare_optimizers"),
        (config.pairs, "--sequence says the order of the tasks; leave out --pairs"),
        (config.stage, "--sequence trains all its stages; leave out --stage"),
        (config.inspect, "--inspect shows what a mask drops between two tasks; leave out --sequence"),
        (config.mask and "," in config.mask, f"--sequence compares ways to rehearse, under one mask: not --mask {config.mask}"),
        (config.arms, "arms: are settings of masks that are compared, and --sequence has one; leave them out"),
        (config.shard == "model" and {"None", "all", "ewc"} & {arm.strip() for arm in str(config.rehearsal.arms).split(",")},
         "ewc needs the gradients of single examples, which --shard model has not; name the other arms with --rehearsal"),
    ):  # fmt: skip
        if wrong:
            raise LetheError(line)
    changes: dict[str, Any] = {"study": "sequences", "mask": config.mask or "none"}
    if "datasets" not in flags:  # a file may name others (configs/nano.yaml does), and say where these lie: name=file.jsonl
        specs = {part.partition("=")[0].strip(): part.strip() for part in (config.datasets or "").split(",")}
        tasks = dict.fromkeys(name.strip() for name in config.sequence.replace(";", ",").split(",") if name.strip())
        changes["datasets"] = ",".join(specs.get(name, name) for name in tasks)
    if "out" not in named:
        changes["out"] = f"{OUT}_{'growth' if config.study == 'growth' else 'sequences'}"
    if config.study == "growth":
        changes["study"] = "growth"
        if "rehearsal.arms" not in named:
            changes["rehearsal"] = dataclasses.replace(config.rehearsal, arms="none")
        if not (config.growth.models or config.pretraining.corpus):
            raise LetheError("study: growth pretrains its models: give --corpus builtin, or a file, or your own models as growth: models")
        if config.growth.models is not None and len(config.growth.models) < 2:
            raise LetheError("growth: models compares two or more; give them as {grown: DIR, naive: DIR}")
        if config.shard == "model" or config.quantize != "none" or config.max_memory:
            raise LetheError("study: growth trains whole models on one device each; leave out --shard model, --quantize and --max_memory")
    elif config.pretraining.corpus:
        raise LetheError("--corpus pretrains, and --sequence fine-tunes; for both add --study growth, for the first leave out --sequence")
    return dataclasses.replace(config, **changes)


def _as_pretraining(config: Config, flags: dict[str, str], named: set[str]) -> Config:
    """The leaves that follow from --corpus.  flags: leaves given as flags; named: given at all."""
    for leaf in ("datasets", "pairs", "mask", "stage", "inspect", "compare_optimizers", "datasets_folder", "quantize", "max_memory",
                 "seeds", "training.stage1.learning_rate", "training.stage1.epochs", "optimizer.name"):  # fmt: skip
        if leaf in flags:
            mend = {"training.stage1.learning_rate": "--pretraining.learning_rate", "training.stage1.epochs": "--tokens",
                    "optimizer.name": "--pretraining.optimizer"}.get(leaf)  # fmt: skip
            told = f"give {mend} instead" if mend else "leave it out"
            raise LetheError(f"--corpus pretrains, and --{leaf.removesuffix('.name').split('.')[-1]} is of fine-tuning; {told}")
    if not config.pretraining.corpus:
        raise LetheError("study: pretraining needs --corpus: builtin, or text or token files")
    if config.shard != "none":
        raise LetheError(f"pretraining shares out each step's rows; leave out --shard {config.shard}")
    if config.pretraining.shape and not config.pretraining.fresh:
        raise LetheError("--shape changes the shape of --model, whose weights then do not fit; add --fresh")
    changes = {"study": "pretraining", **({} if "out" in named else {"out": f"{OUT}_pretrained"})}
    return dataclasses.replace(config, **changes)


def _as_batch(config: Config, flags: dict[str, str], named: set[str]) -> Config:
    """The leaves that follow from --datasets_folder.  flags: leaves given as flags; named: given at all."""
    if not config.datasets_folder:
        raise LetheError("study: batch needs --datasets_folder, the folder of the data sets")
    for leaf, why in (
        ("datasets", "takes its data sets from the folder"), ("pairs", "has one stage"), ("mask", "masks nothing"),
        ("compare_optimizers", "has one optimizer"), ("comparison", "has one optimizer"),
        ("inspect", "masks nothing"), ("resume_stage1", "finds each newest checkpoint itself"),
        ("resume_stage2", "has one stage"), ("evaluation.tasks", "scores no task"),
        ("max_test", "scores no task, and --max_samples limits --mmlu"),
    ):  # fmt: skip
        if leaf in flags and flags[leaf] not in ("false", "none"):
            raise LetheError(f"--datasets_folder {why}; leave out --{leaf.split('.')[-1]}")
    if config.stage == 2:
        raise LetheError("--datasets_folder has one stage; leave out --stage 2")
    if not (config.evaluation.mmlu or config.evaluation.harness):
        what = "scores general ability before and after each data set"
        raise LetheError(f"--datasets_folder {what}: give --mmlu FOLDER (or mini_mmlu), or --harness")
    changes: dict[str, Any] = {"study": "batch", "mask": "none", "stage": None}
    if "out" not in named:
        changes["out"] = f"{OUT}_batch"
    return dataclasses.replace(config, **changes)


def _refuse_conflicts(config: Config) -> None:
    """Settings that contradict each other, told in one line before anything is loaded."""
    arms, resumed = optimizer_arms(config), config.resume_stage1 or config.resume_stage2
    shown = "--resume_stage1" if config.resume_stage1 else "--resume_stage2"
    for wrong, line in (
        (config.full and config.quantize != "none", f"--full trains the weights that --quantize {config.quantize} freezes; leave out one"),
        (config.full and config.max_memory, "--full trains the weights that --max_memory keeps away; use --shard model"),
        (config.shard == "model" and any(stage.eval_steps for stage in (config.training.stage1, config.training.stage2)),
         "--shard model has no whole model to score between steps; leave out --eval_steps"),
        (config.shard == "model" and not config.full, "--shard model is for --full; give it too, or use --shard runs"),
        (arms and config.stage, f"an optimizer study trains both stages; leave out --stage {config.stage}"),
        (arms and config.inspect, "--inspect shows what a mask drops, and an optimizer study masks nothing; leave it out"),
        (arms and config.arms, "arms: are settings of masks, and an optimizer study has none; leave them out"),
        (resumed and arms and len(arms) > 1, f"{shown} names one run's checkpoint, and there are {len(arms or [])} optimizers and rates; "
         "without it the same command continues each from its newest"),
        (resumed and config.seeds and len(parse_seeds(config)) > 1, f"{shown} names one run's checkpoint, and there are several seeds; "
         "without it the same command continues each from its newest"),
        (resumed and config.skip_training, f"{shown} trains and --skip_training does not; give one of them"),
        (config.resume_stage2 and config.stage == 1, "--resume_stage2 goes on with stage 2, and --stage 1 ends before it; leave out one"),
        (config.rehearsal.arms and config.study not in ("sequences", "growth"),
         "--rehearsal names arms of a sequence; give its tasks: --sequence a,b,c"),
        (config.chunk and not config.datasets_folder, "--chunk chooses among the sub-folders of --datasets_folder; give that too"),
        (config.strict and config.salvage, "--strict makes a cut file an error, --salvage takes its rows before the cut; give one of them"),
        (config.inspect and config.skip_training, "--inspect and --skip_training: give one of them"),
    ):  # fmt: skip
        if wrong:
            raise LetheError(line)


def optimizer_arms(config: Config) -> list[tuple[str, float]] | None:
    """(optimizer, learning rate of stage 1) of each arm of an optimizer study; None for a study of masks."""
    if config.study != "optimizers":
        return None
    rate = config.training.stage1.learning_rate
    if not config.compare_optimizers:
        return [(config.optimizer.name, rate)]
    comparison = config.comparison or {name: [rate] for name in get_args(OPTIMIZERS)}
    return [(name, rate) for name, rates in comparison.items() for rate in dict.fromkeys(rates)]


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration of one run: `changes` gives leaves by their dotted names.

    "learning_rate" is stage 1's, and stage 2's follows in the proportion that the two have in `config`.
    """
    for name, value in changes.items():
        if name == "learning_rate":
            one, two = (stage.learning_rate for stage in (config.training.stage1, config.training.stage2))
            config = _with(config, "training.stage1.learning_rate", value)
            config = _with(config, "training.stage2.learning_rate", two if value == one else value * (two / one))
        else:
            config = _with(config, name, value)
    return config


def _with(tree: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    return dataclasses.replace(tree, **{head: _with(getattr(tree, head), rest, value) if rest else value})


def parse_eval(argv: list[str]) -> EvalConfig:
    """Command line of eval.py -> EvalConfig; the same rules as parse."""
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(EvalConfig, EVAL_EXAMPLES, {"": "Flags"}))
        raise SystemExit(0)
    given, files = read_flags(list(argv), EvalConfig)
    config = build(EvalConfig, [read_yaml(path, EvalConfig) for path in files] + [given])
    if config.adapter and not config.model:
        raise LetheError("--adapter needs --model: the model that the adapter was trained on")
    if config.quantize != "none" and not config.model:
        raise LetheError("--quantize goes with --model; a study is scored on the base that it was trained on")
    if config.no_merge and not config.adapter:
        raise LetheError("--no_merge needs --adapter: it compares an adapter merged into the weights with the same beside them")
    own = [name for name in (*DECODING, "decoding") if getattr(config, name) != getattr(EvalConfig, name)]
    if own and not config.model:
        raise LetheError(f"--{own[0]} goes with --model; how a study's outputs are decoded is part of it, see its config.yaml")
    if config.decoding:
        object.__setattr__(config, "decoding", _check_decoding(config.decoding, EvalConfig, "", files))
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


def _check_decoding(decoding: dict[str, dict], cls: type, section: str, files: list[str]) -> dict[str, dict]:
    """Type the settings of single tasks; section: the dotted name of where such leaves stand in cls."""
    checked: dict[str, dict] = {}
    for task, settings in decoding.items():
        shown = f"{', '.join(files)}: {section}decoding.{task}"
        if not isinstance(settings, dict):
            raise LetheError(f"{shown} must be a mapping such as {{num_beams: 5}}")
        for key in settings:
            if key not in DECODING:
                raise LetheError(f"{shown}: unknown key '{key}'{nearest(str(key), DECODING)}")
        typed = build(cls, [[([section + key], value, f"{shown}.{key}") for key, value in settings.items()]])
        found = typed.evaluation if section else typed
        checked[str(task)] = {key: getattr(found, key) for key in settings}
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
    return {f.name: tree[f.name] for f in dataclasses.fields(config) if f.init}


def config_text(config: Any) -> str:
    """The resolved configuration as YAML; `--config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)
