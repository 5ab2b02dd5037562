"""Two models, one grown and one from scratch, after the same sequence of tasks."""

from pathlib import Path


def report_growth(root: Path) -> None:
    pass
