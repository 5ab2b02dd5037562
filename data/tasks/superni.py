"""Ten tasks of Super-NaturalInstructions (arXiv 2204.07705), as Self-Synthesized Rehearsal chose them (arXiv 2403.01244, Apache-2.0).

    python -m data.prepare superni_qa --source DIR

DIR holds that project's split files, JSON lines despite .json: {key}.train.json (2000 rows), {key}.eval.json (500) and
{key}.train.smp001.json (20 of the training rows, kept as the 1 % for rehearsal and as demonstrations); or the original file
of the task, tasks/task024_cosmosqa_answer_generation.json and so on of allenai/natural-instructions, which is split here.
Where the training file is absent, its 200-row sample {key}.train.smp01.json is trained on, and a line says so.

The prompt is the project's full_prompt: definition, blank line, input. Eight tasks are free text (kind "text": ROUGE-L is what
to read, exact match is the whole output); of sa and pos the answer is one of two labels (kind "short"). The project scores
all ten by ROUGE-L; for a single word that is exact match.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data.tasks import find_raw, missing, need_raw, rows_of
from study.errors import LetheError
from study.folder import read_json
from study.logging import say

TRAIN, EVAL, EXTRA, REPLAY = 2000, 500, 20, 20  # rows of the split; the project keeps EXTRA aside and so do we
# The project drops instances above 500 Llama 2 tokens of definition and input, or 128 of output. Preparing data has no
# tokenizer, so here the limits are characters: what its own files stay below (2116 and 489) with a little room.
MOST_PROMPT, MOST_OUTPUT = 2200, 512


@dataclass(frozen=True)
class SuperNI:
    """One of the tasks, with what data.prepare and data.folder ask of a task file."""

    key: str
    original: str  # its file in Natural Instructions, without .json
    labels: tuple[str, ...] = ()  # of a classification

    FOLDERS = ("superni", "split", "tasks")
    HUB = None

    @property
    def RAW(self) -> str:
        return f"{self.key}.train.json, {self.key}.eval.json and {self.key}.train.smp001.json of SSR, or {self.original}.json"

    @property
    def ANSWER_KIND(self) -> str:
        return "short" if self.labels else "text"

    @property
    def MAX_NEW_TOKENS(self) -> int:
        return 8 if self.labels else 128

    def read_raw(self, folder: Path) -> dict[str, list[dict]]:
        """Rows of train, test and replay. Raises MissingRaw without the files of either form."""
        if not find_raw(folder, f"{self.key}.eval.json") and (whole := find_raw(folder, f"{self.original}.json")):
            return self.split(whole)
        test = rows_of(need_raw(folder, f"{self.key}.eval.json", f"{self.original}.json"))
        train = need_raw(folder, f"{self.key}.train.json", f"{self.key}.train.smp01.json")
        rows = {"train": rows_of(train), "test": test}
        if ".smp01." in train.name:
            say(f"{self.key}.train.json is not in {folder}: its sample {train.name} is the training set, {len(rows['train'])} rows")
        if kept := find_raw(folder, f"{self.key}.train.smp001.json"):
            rows["replay"] = rows_of(kept)
        return {name: self._in_turn(part) for name, part in rows.items()}

    def split(self, path: Path) -> dict[str, list[dict]]:
        """The original form {"Definition", "Instances": [{"input", "output": [...]}]}, filtered and split as the project does.

        The first reference counts. Of what is not too long, numpy's legacy generator of seed 0 draws 2000 rows for train, 500
        for test and 20 that stay unused; of a classification half of each per label. The last 20 of train are the replay.
        Filtered by characters and not by Llama 2 tokens, the rows drawn are not the project's own.
        """
        task = read_json(path)
        try:
            definition, instances = task["Definition"], list(task["Instances"])
            definition = (definition if isinstance(definition, str) else definition[0]).strip()
        except (TypeError, KeyError, IndexError, AttributeError):
            raise LetheError(f'{path}: no task of Natural Instructions, which has "Definition" and "Instances"') from None
        rows = [_instance(one, definition, f"{path}:{number}") for number, one in enumerate(instances, 1)]
        good = [row for row in rows if isinstance(self.to_alpaca(row), dict)]
        groups = [[row for row in good if row["output"] == label] for label in self.labels] or [good]
        parts: dict[str, list[dict]] = {"train": [], "test": [], "replay": []}
        draw = np.random.RandomState(0)
        for label, group in zip(self.labels or ("",), groups, strict=True):
            train, test, extra, replay = (count // len(groups) for count in (TRAIN, EVAL, EXTRA, REPLAY))
            if len(group) < train + test + extra:
                which = f"instances labelled {label!r}" if label else "instances"
                raise LetheError(f"{path}: {len(group)} usable {which}; the split needs {train + test + extra}")
            drawn = [group[i] for i in draw.choice(len(group), train + test + extra, replace=False)]
            for name, found in zip(parts, (drawn[:train], drawn[train : train + test], drawn[train - replay : train]), strict=True):
                parts[name] += found
        parts = {name: self._in_turn(part) for name, part in parts.items()}
        parts["train"] += [row for row in rows if not isinstance(self.to_alpaca(row), dict)]  # data.prepare tells why not
        return parts

    def to_alpaca(self, row: dict) -> dict | str:
        """The project's full_prompt is the instruction, blank line and all; a label must be one of the task's."""
        if reason := row.get("reason") or missing(row, "full_prompt", "output"):
            return reason
        output = row["output"].strip()
        if self.labels and output not in self.labels:
            return f"label {output!r} is not one of {', '.join(self.labels)}"
        return {"instruction": row["full_prompt"].strip(), "input": "", "output": output}

    def _in_turn(self, rows: list[dict]) -> list[dict]:
        """The labels by turns: the files have one label after the other, and --max_train takes the first rows."""
        if not self.labels:
            return rows
        groups = [[row for row in rows if row.get("output") == label] for label in self.labels]
        mixed = [row for turn in zip_longest(*groups) for row in turn if row is not None]
        return mixed + [row for row in rows if row.get("output") not in self.labels]


def _instance(one: object, definition: str, where: str) -> dict:
    """{"full_prompt", "output", "where"} of an instance, or {"reason", "where"}."""
    made, reason = {"where": where}, "no input and output"
    if isinstance(one, dict):
        output = one.get("output")
        made |= {"input": one.get("input"), "output": output[0] if isinstance(output, list) and output else output}
        reason = missing(made, "input", "output")
    if reason:
        return {"where": where, "reason": reason}
    prompt, output = f"{definition}\n\n{made['input'].strip()}", made["output"].strip()
    for what, text, most in (("definition and input", prompt, MOST_PROMPT), ("output", output, MOST_OUTPUT)):
        if len(text) > most:
            return {"where": where, "reason": f"{what} above {most} characters"}
    return {"where": where, "full_prompt": prompt, "output": output}


TASKS = {
    f"superni_{task.key}": task
    for task in (
        SuperNI("qa", "task024_cosmosqa_answer_generation"),
        SuperNI("qg", "task074_squad1.1_question_generation"),
        SuperNI("sa", "task1312_amazonreview_polarity_classification", ("positive", "negative")),
        SuperNI("sum", "task511_reddit_tifu_long_text_summarization"),
        SuperNI("trans", "task1219_ted_translation_en_es"),
        SuperNI("dsg", "task574_air_dialogue_sentence_generation"),
        SuperNI("expl", "task192_hotpotqa_sentence_generation"),
        SuperNI("para", "task177_para-nmt_paraphrasing"),
        SuperNI("pe", "task064_all_elements_except_first_i"),
        SuperNI("pos", "task346_hybridqa_classification", ("True", "False")),
    )
}
