"""The words of an earlier study: the config.yaml of "Catastrophic Forgetting Study" (AdamW against Muon), read as it is.

Each key that means something here sets the leaf of that meaning; each other one is named once, with the reason, and is
no error.  Such a file asks for an optimizer study: its first data set, then its second, all settings equal but the optimizer.
"""

from typing import Any

from study.errors import LetheError
from study.flags import flags_of, flatten, resolve

SAME = {  # its key -> our leaf (a stage leaf alone sets both stages)
    "model.name": "model.name",
    "model.lora_rank": "lora.rank",
    "model.lora_alpha": "lora.alpha",
    "model.lora_dropout": "lora.dropout",
    "model.target_modules": "lora.targets",
    "optimizer.type": "optimizer.name",
    "evaluation.batch_size": "evaluation.batch_size",
    "evaluation.max_new_tokens": "evaluation.max_new_tokens",
    "logging.log_interval": "log_steps",
    "logging.eval_interval": "eval_steps",
    "logging.save_interval": "save_steps",
    "device": "device",
}
SAME |= {f"optimizer.adamw.{key}": f"optimizer.{key}" for key in ("beta1", "beta2", "eps")}
SAME |= {f"optimizer.muon.{key}": f"optimizer.{key}" for key in ("momentum", "nesterov", "ns_steps", "muon_scale", "muon_factors")}
for _stage in ("training.stage1", "training.stage2"):
    SAME |= {f"{_stage}.{key}": f"{_stage}.{key}" for key in ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_steps")}
    SAME[f"{_stage}.gradient_accumulation_steps"] = f"{_stage}.gradient_accumulation"

UNUSED = {  # reason -> the keys without meaning here
    "decoding is greedy; --evaluation.temperature and the flags beside it say otherwise": (
        "evaluation.temperature", "evaluation.do_sample", "evaluation.top_p", "evaluation.top_k",
    ),
    "every test item is scored; --max_test N limits them": ("evaluation.replay_samples",),
    "Muon has one momentum (optimizer.momentum); what it leaves to AdamW has AdamW's beta1, beta2 and eps": (
        "optimizer.muon.beta1", "optimizer.muon.beta2", "optimizer.muon.eps", "optimizer.muon.mu",
    ),
    "these folders lie in the study folder; --output_dir says where that is": (
        "logging.log_dir", "logging.tensorboard_dir", "logging.save_dir",
    ),
}  # fmt: skip


def is_seed_style(tree: dict) -> bool:
    """True for a file in those words: it has training.stageN.dataset, optimizer.type or model.use_lora."""
    names = {name for name, _ in flatten(tree)}
    return not names.isdisjoint({"training.stage1.dataset", "training.stage2.dataset", "optimizer.type", "model.use_lora"})


def translate(tree: dict, path: str, cls: type) -> tuple[list[tuple[list[str], Any, str]], list[str]]:
    """A file in those words -> (layer as read_yaml makes it, notes: one line per reason for which keys are not used).

    cls: the configuration class. Keys of our own are taken too. Bad values of known keys raise LetheError, in `build`
    or, for the two switches, here.
    """
    table, layer, unused, notes = flags_of(cls), [], {}, []
    found = dict(flatten(tree, {"arms", "comparison", "evaluation.decoding"}))

    def put(leaf: str, value: Any, name: str) -> None:
        layer.append((table[leaf.replace(".", "_")], value, f"{path}: {name}"))

    def switch(name: str) -> bool:
        value = found.pop(name)
        if not isinstance(value, bool):
            raise LetheError(f"{path}: {name} must be true or false, not {value!r}")
        return value

    put("study", "optimizers", "optimizer.type")
    datasets = [found.pop(f"training.stage{n}.dataset", None) for n in (1, 2)]
    if any(datasets):
        put("datasets", ",".join(str(name) for name in datasets if name), "training.stage1.dataset")
    if "model.use_lora" in found:
        put("full", not switch("model.use_lora"), "model.use_lora")
    if "mixed_precision" in found:
        put("dtype", "auto" if switch("mixed_precision") else "float32", "mixed_precision")
    lengths = {name: found.pop(name) for name in ("training.stage1.max_length", "training.stage2.max_length") if name in found}
    if lengths:
        name, longest = max(lengths.items(), key=lambda item: item[1] if isinstance(item[1], (int, float)) else float("inf"))
        put("max_length", longest, name)
        if len(set(map(str, lengths.values()))) > 1:
            notes.append(f"max_length is one for both stages: {longest}, the longer")
    reasons = {key: reason for reason, keys in UNUSED.items() for key in keys}
    for name, value in found.items():
        if name in reasons:
            unused.setdefault(reasons[name], []).append(name)
        elif name in SAME:
            put(SAME[name], value.lower() if name == "optimizer.type" and isinstance(value, str) else value, name)
        else:
            try:
                layer.append((resolve(name.replace(".", "_"), table, f"'{name}'", f"{path}: "), value, f"{path}: {name}"))
            except LetheError as error:
                hint = str(error).rpartition("; ")[2]
                unused.setdefault(hint if hint.startswith("did you mean") else "no such setting here", []).append(name)
    notes += [f"not used: {', '.join(keys)} ({reason})" for reason, keys in unused.items()]
    return layer, notes
