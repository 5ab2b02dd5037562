"""Reading a configuration: flags and YAML files -> the typed leaves of nested dataclasses.

Each leaf is declared with `opt(default, help, limit)`; jsonargparse converts and checks the values, and what it finds
wrong is told in one line.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator
from dataclasses import field
from math import inf
from pathlib import Path
from typing import Any, Literal

import yaml

from study.errors import LetheError
from study.plan import nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALIASES = {"output_dir": "out", "model": "model.name", "optimizer": "optimizer.name", "lr": "learning_rate", "rehearsal": "rehearsal.arms"}
# Of the rehearsal's; the evaluation has them under its whole name, --evaluation.temperature.
ALIASES |= {name: f"rehearsal.{name}" for name in ("temperature", "top_p", "repetition_penalty")}

# limits: (test, words); NaN fails every one of them
POSITIVE = (lambda v: 0 < v < inf, "above 0")
FROM_ZERO = (lambda v: 0 <= v < inf, "0 or more")
FRACTION = (lambda v: 0 <= v < 1, "at least 0 and below 1")
SOME_TEXT = (lambda v: bool(v.strip()), "some text")


def opt(default: Any, help: str, limit: tuple | None = None) -> Any:
    """A leaf: its default, its line in --help, and which values it takes."""
    return field(default=default, metadata={"help": help, "limit": limit})


def leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
    """Dotted name -> (type, field) of every leaf of a (nested) configuration class, in order."""
    found, hints = {}, typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= leaves(hints[f.name], f"{prefix}{f.name}.")
        elif f.init:
            found[prefix + f.name] = (hints[f.name], f)
    return found


def flags_of(cls: type) -> dict[str, list[str]]:
    """Flag -> the leaves it sets: each unique tail of a leaf's name, `_` for `.`; a stage leaf sets both stages."""
    names = list(leaves(cls))
    table: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        tails = ["_".join(parts[k:]) for k in range(len(parts))]
        if parts[0] == "training":
            tails.append(f"training_{parts[-1]}")
        for tail in tails:
            table.setdefault(tail, []).append(name)
    for tail, hits in table.items():
        if tail in names:
            table[tail] = [tail]
        elif len(hits) > 1:
            stages = [h for h in hits if h.startswith("training.")]
            table[tail] = stages if stages else hits
    for alias, target in ALIASES.items():
        target = target.replace(".", "_")
        if alias not in names and target in table:
            table[alias] = table[target]
    return table


def resolve(key: str, table: dict[str, list[str]], shown: str, where: str = "") -> list[str]:
    """The leaves that `key` (`_`-joined) sets; LetheError with the nearest name when there is none or no single one."""
    hits = table.get(key)
    if hits is None:
        close = difflib.get_close_matches(key, [*table, "help", "config"], n=1)
        hint = f"; did you mean {_show(close[0], table, where)}?" if close else "; --help lists them all"
        raise LetheError(f"{where}unknown {'key' if where else 'flag'} {shown}{hint}")
    if len(hits) > 1 and not all(h.startswith("training.") for h in hits):
        raise LetheError(f"{where}{shown} could be {' or '.join(hits)}; give the whole name")
    return hits


def _show(key: str, table: dict[str, list[str]], where: str) -> str:
    return (table[key][0] if len(table[key]) == 1 else key) if where and key in table else f"--{key}"


def read_flags(argv: list[str], cls: type) -> tuple[list[tuple[list[str], Any, str]], list[str]]:
    """Split the command line into [(leaves, text, flag)] and the list of --config files."""
    table, types = flags_of(cls), leaves(cls)
    given, configs, position = [], [], 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise LetheError(f"'{word}' is not a flag; flags look like --seed 1 (--help lists them)")
        flag, has_value, value = word.partition("=")
        key = flag[2:].replace("-", "_").replace(".", "_")
        negated = key.startswith("no_") and key not in table and key[3:] in table
        hits = ["config"] if key == "config" else resolve(key[3:] if negated else key, table, flag)
        if hits != ["config"] and types[hits[0]][0] is bool:
            if not has_value:
                ahead = argv[position].lower() if position < len(argv) else ""
                value = "true"
                if ahead in ("true", "false", "yes", "no"):
                    value, position = ahead, position + 1
            value = {"yes": "true", "no": "false"}.get(value.lower(), value.lower())
            value = {"true": "false", "false": "true"}.get(value, value) if negated else value
        elif negated:
            resolve(key, table, flag)
        elif not has_value:
            if position == len(argv) or argv[position].startswith("--"):
                raise LetheError(f"{flag} needs a value")
            value, position = argv[position], position + 1
        if hits == ["config"]:
            configs.append(value)
        else:
            given.append((hits, value, flag))
    return given, configs


def load_yaml(path: str | Path) -> dict:
    """A YAML file as nested dicts; LetheError names the file, and the line that is no YAML."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [str(p) for p in sorted(CONFIGS.glob("*.yaml"))]
        hint = nearest(path.name, [Path(p).name for p in known])
        raise LetheError(f"no configuration file {path}{hint and hint + ' (in configs/)'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LetheError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise LetheError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise LetheError(f"{path}: a configuration is a list of 'key: value' lines, not a {type(tree).__name__}")
    return tree


def flatten(tree: dict, whole: Iterable[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts, `_` for `-`; the names in `whole`, and empty dicts, stay dicts."""
    for key, value in tree.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict) and value and name not in whole:
            yield from flatten(value, whole, name + ".")
        else:
            yield name, value


def read_tree(tree: dict, path: str | Path, cls: type) -> list[tuple[list[str], Any, str]]:
    """Nested dicts as [(leaves, value, "file: key")]; `model: X` and tails of names are understood as in flags."""
    table, types = flags_of(cls), leaves(cls)
    sections = {".".join(n.split(".")[:k]) for n in types for k in range(1, n.count(".") + 1)} | {"stage1", "stage2"}
    whole = {shown for name, (kind, _) in types.items() if _is_mapping(kind) for shown in (name, name.rpartition(".")[2])}
    for name, value in tree.items():  # a section that is none, before what lies in it
        name = str(name).replace("-", "_")
        if isinstance(value, dict) and name not in {*sections, *whole}:
            resolve(name, table, f"'{name}'", f"{path}: ")
    return [
        (resolve(name.replace(".", "_"), table, f"'{name}'", f"{path}: "), value, f"{path}: {name}")
        for name, value in flatten(tree, whole)
        if value not in (None, {}) or name not in sections
    ]


def read_yaml(path: str | Path, cls: type) -> list[tuple[list[str], Any, str]]:
    """A YAML file as read_tree gives it."""
    return read_tree(load_yaml(path), path, cls)


def _is_mapping(kind: Any) -> bool:
    return any(typing.get_origin(part) is dict for part in (kind, *typing.get_args(kind)))


def build(cls: type, layers: list[list[tuple[list[str], Any, str]]]) -> Any:
    """Lay the layers over the defaults (later over earlier; within one, one stage over both) and type them."""
    types = leaves(cls)
    values, origin = {}, {}
    for layer in layers:
        for hits, value, shown in sorted(layer, key=lambda entry: -len(entry[0])):
            for name in hits:
                values[name], origin[name] = _prepare(value, types[name][0], name), shown
    return _make(cls, {name: _typed(value, types[name], origin[name]) for name, value in values.items()})


def _prepare(value: Any, kind: Any, name: str) -> Any:
    """YAML niceties: lists for comma-separated leaves, numbers for text leaves; 'a,b' for list leaves."""
    if name.endswith("lora.targets") and isinstance(value, str) and value != "all":
        return [part.strip() for part in value.split(",") if part.strip()]
    if name == "comparison" and isinstance(value, dict):  # one rate needs no list
        return {key: rates if isinstance(rates, list) else [rates] for key, rates in value.items()}
    if kind in (str, str | None):
        if isinstance(value, list):
            return ",".join(str(part) for part in value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    return value


def _typed(value: Any, leaf: tuple[Any, dataclasses.Field], shown: str) -> Any:
    """One value, checked and converted by jsonargparse, then held to the leaf's own limit."""
    kind, limit = leaf[0], leaf[1].metadata.get("limit")
    wrong = LetheError(f"{shown} must be {_words(kind)}, not {value!r}")
    parts = (kind, *typing.get_args(kind))
    if isinstance(value, bool) and bool not in parts or value is None and type(None) not in parts:
        raise wrong
    if kind in (str, str | None) and isinstance(value, str):
        result = None if kind is not str and value in ("null", "") else value
    else:
        from jsonargparse import ArgumentParser  # its import takes 0.1 s, so only where needed

        parser = ArgumentParser(exit_on_error=False)  # one leaf at a time, so that an error is about this leaf
        parser.add_argument("--value", type=kind)
        try:
            result = parser.parse_object({"value": value}).value
        except Exception:  # jsonargparse raises several kinds, all with a page of text
            options = [o for o in typing.get_args(kind) if isinstance(o, str)]
            near = difflib.get_close_matches(str(value), options, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise LetheError(f"{wrong}{hint}") from None
    if result is not None and limit is not None:
        fits, words = limit
        if not fits(result):
            raise LetheError(f"{shown} must be {words}, not {value!r}")
    return result


def _words(kind: Any) -> str:
    parts = [p for p in typing.get_args(kind) if p is not type(None)]
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(parts)
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if _is_mapping(kind):
        values = typing.get_args(parts[0])[1]
        named = {int: "a mapping of names to whole numbers, such as {num_hidden_layers: 4}", str: "a mapping of names to folders"}
        rates = "a mapping of optimizers to learning rates, such as {adamw: [1e-3, 3e-3]}"
        return rates if float in typing.get_args(values) else named.get(values, "a mapping of names to settings")
    return " or ".join(known.get(p, "a list of names") for p in parts) if parts else known[kind]


def _make(cls: type, typed: dict[str, Any], prefix: str = "") -> Any:
    hints, arguments = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _make(hints[f.name], typed, f"{prefix}{f.name}.")
        elif prefix + f.name in typed:
            arguments[f.name] = typed[prefix + f.name]
    return cls(**arguments)


def help_text(cls: type, examples: str, titles: dict[str, str]) -> str:
    """The page of --help: common commands, then the flags with their defaults.

    titles: headings by section (that of the leaves outside of any: ""), and by the leaf that a part of a section begins with.
    """
    lines, section, table = [examples], None, flags_of(cls)
    for name, (kind, f) in leaves(cls).items():
        if name.startswith("training.stage2") or f.metadata["help"].startswith("YAML only"):
            continue
        head, _, leaf = name.rpartition(".")
        head = head.split(".")[0]
        if head != section or name in titles:
            lines += ["", titles.get(name) or titles[head]]
            if section is None:
                lines.append(f"  {'--config FILE':26s} a YAML file, for example configs/nano.yaml")
            section = head
        flag = head if leaf == "name" else f"lora_{leaf}" if head == "lora" else leaf
        flag = flag if name in table.get(flag, []) else name
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        choices = f": {' | '.join(typing.get_args(kind))}" if typing.get_origin(kind) is Literal else ""
        lines.append(f"  --{flag:24s} {f.metadata['help']}{choices}{default}")
    return "\n".join(lines)
