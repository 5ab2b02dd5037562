"""ASSET: sentence simplification with ten references (arXiv 2005.00481, CC BY-NC 4.0). 2000 valid, which is trained on, 359 test."""

from pathlib import Path

from data.tasks import need_raw
from data.tasks.generation import restored
from study.errors import LetheError

ANSWER_KIND = "text"
MAX_NEW_TOKENS = 80
REFERENCES = 10
FOLDERS = ("asset", "dataset")
RAW = "asset.valid.orig, asset.test.orig and the .simp.0 to .simp.9 of each, of facebookresearch/asset"
HUB = None


def read_raw(folder: Path) -> dict[str, list[dict]]:
    return {split: _rows(folder, f"asset.{name}") for split, name in (("train", "valid"), ("test", "test"))}


def _rows(folder: Path, name: str) -> list[dict]:
    files = [need_raw(folder, f"{name}.{part}") for part in ("orig", *(f"simp.{n}" for n in range(REFERENCES)))]
    # Not splitlines: a sentence may hold other separators than the newline.
    columns = [file.read_text(encoding="utf-8").removesuffix("\n").split("\n") for file in files]
    for file, column in zip(files, columns, strict=True):
        if len(column) != len(columns[0]):
            raise LetheError(f"{file}: {len(column)} lines, but {files[0].name} has {len(columns[0])}; get the whole file")
    return [
        {"original": original, "references": references, "where": f"{files[0]}:{n}"}
        for n, (original, *references) in enumerate(zip(*columns, strict=True), 1)
    ]


def to_alpaca(row: dict) -> dict | str:
    """The first reference is trained on."""
    original, references = restored(row["original"]), [text for text in map(restored, row["references"]) if text]
    if not original or not references:
        return f"no {'reference' if original else 'sentence'}"
    return {
        "instruction": "Rewrite this text so that it is easier to understand.",
        "input": original,
        "output": references[0],
        "references": references,
        "original": original,
    }
