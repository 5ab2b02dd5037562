"""Text simplification, WikiAuto in the form of Continual-T0 (see data/tasks/generation.py). The sentence itself goes along for SARI."""

import re

from data.tasks.generation import ANSWER_KIND, HUB, RAW, SOURCE_FILE, TEST_SHARE, pair, read_raw, restored  # noqa: F401
from metrics.text import collapse

MAX_NEW_TOKENS = 80
FOLDERS = ("simplification", "wiki_auto", "simp")

# The sentence in Continual-T0's prompts: in quotes at the end, or before a line "===".
_PROMPTS = (re.compile(r'[^"]*: "(.*)"', re.S), re.compile(r"(.*?)\n\n===\n\n.*", re.S))


def to_alpaca(row: dict) -> dict | str:
    """original: src_info's own sentence, else what is quoted in the prompt, else the whole of it."""
    made = pair(row)
    if isinstance(made, str):
        return made
    info = row["src_info"] if isinstance(row["src_info"], dict) else {}
    told = next((info[key] for key in ("normal_sentence", "original") if isinstance(info.get(key), str)), "")
    found = next(filter(None, (prompt.fullmatch(made["input"]) for prompt in _PROMPTS)), None)
    return made | {"original": restored(told) or (found[1].strip() if found else made["input"])}


def question(row: dict) -> str:
    """The sentence: the same one comes in several prompts."""
    return collapse(row["original"])
