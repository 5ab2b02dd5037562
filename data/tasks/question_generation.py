"""Question generation, ELI5 in the form of Continual-T0 (see data/tasks/generation.py)."""

from data.tasks.generation import ANSWER_KIND, HUB, RAW, SOURCE_FILE, TEST_SHARE, pair, read_raw  # noqa: F401

MAX_NEW_TOKENS = 64
FOLDERS = ("question_generation", "eli5", "inqQG")


def to_alpaca(row: dict) -> dict | str:
    return pair(row)
