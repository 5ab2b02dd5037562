"""Source and target texts as Continual-T0 keeps them (arXiv 2205.12393); three tasks are made of such files.

    python -m data.prepare simplification --source DIR --eval_size 0.01

raw: a folder of {"src": [...], "tgt": [... text, or a list of texts], "src_info": [...]}; "train" or "test" in a file's name
decides its split (a name with both: train), and a file with neither is left out, which a line says. flat: one file
{"train": [...], "eval": [...], "test": [...]} of {"input", "output", "src_info", "index"}, given as it is or alone in its folder.

src carries its instruction already ("Simplify this text: …") and is the input as it stands. Of several targets the first is
the answer and all are references. Penn Treebank brackets (-LRB- and the like) are restored.
"""

from pathlib import Path

from data.tasks import MissingRaw
from study.errors import LetheError
from study.folder import read_json
from study.logging import say

ANSWER_KIND = "text"
TEST_SHARE = 0.1  # where no file is a test
RAW = 'JSON files {"src", "tgt", "src_info"} with train or test in their names, or one file {"train", "eval", "test"}'
HUB = None
SOURCE_FILE = True  # --source FILE means this file, not its folder

_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]"}


def read_raw(source: Path) -> dict[str, list[dict]]:
    """{split: [{"src", "tgt", "src_info", "where"}]} of a folder, or of one file in either form."""
    splits: dict[str, list[dict]] = {}
    flat, aside = [], []
    for path in [source] if source.is_file() else sorted(source.glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict):
            aside.append((path, "no object of either form"))
        elif "src" in content and "tgt" in content:
            split = next((name for name in ("train", "test") if name in path.name), None)
            if split:
                splits.setdefault(split, []).extend(_columns(content, path))
            else:
                aside.append((path, "neither train nor test in its name"))
        elif "train" in content:
            flat.append((path, content))
        else:
            aside.append((path, "no object of either form"))
    if len(flat) + bool(splits) > 1:
        raise LetheError(f"{flat[0][0]}: other data lies beside it; give the one file that is meant by --source")
    for path, content in flat:
        splits = {name: _rows(content[name], f"{path}:{name}") for name in ("train", "eval", "test") if content.get(name)}
    if "train" not in splits:
        raise MissingRaw(f"{source}: no file of training rows; it should hold {RAW}")
    for path, reason in aside:
        say(f"{path} is left out: {reason}")
    return splits


def _columns(content: dict, path: Path) -> list[dict]:
    columns = [content["src"], content["tgt"], content.get("src_info") or [None] * len(content["src"])]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{len(column)} {name}" for column, name in zip(columns, ("src", "tgt", "src_info"), strict=True))
        raise LetheError(f"{path}: {lengths}: these lists must be equally long; get the whole file")
    rows = enumerate(zip(*columns, strict=True), 1)
    return [{"src": src, "tgt": tgt, "src_info": info, "where": f"{path}:{n}"} for n, (src, tgt, info) in rows]


def _rows(rows: list, where: str) -> list[dict]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LetheError(f'{where}: not a list of {{"input", "output"}}')
    return [
        {"src": row.get("input"), "tgt": row.get("output"), "src_info": row.get("src_info"), "where": f"{where}:{n}"}
        for n, row in enumerate(rows, 1)
    ]


def pair(row: dict) -> dict | str:
    """The row of src and tgt, or why there is none."""
    targets = row["tgt"] if isinstance(row["tgt"], list) else [row["tgt"]]
    if not all(isinstance(text, str) for text in (row["src"], *targets)):
        return "src or tgt is not text"
    source, targets = restored(row["src"]), [text for text in map(restored, targets) if text]
    if not source or not targets:
        return f"no {'tgt' if source else 'src'}"
    return {"instruction": "", "input": source, "output": targets[0]} | ({"references": targets} if len(targets) > 1 else {})


def restored(text: str) -> str:
    """The text with its brackets, without outer white space."""
    for escape, bracket in _BRACKETS.items():
        text = text.replace(escape, bracket)
    return text.strip()
