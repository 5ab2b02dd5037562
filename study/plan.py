"""The plan of a study: which runs there are, in which order, in which folders.  Pure functions, no tensors."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from study.errors import LetheError

DEFAULT_ARMS = ("none", "bottom10", "highest")


@dataclass(frozen=True)
class Run:
    """One training run.  `folder` is relative to the study; `parent` is the folder whose adapter it continues."""

    stage: int
    arm: str
    first: str
    second: str | None
    folder: str
    parent: str | None
    changes: dict = field(default_factory=dict, hash=False)  # leaves of the configuration that are this run's own
    order: str = ""  # of a sequence (study/sequence.py): which one
    past: tuple[str, ...] = ()  # the tasks before this one
    policy: str | None = None  # the token mask, where the arms of the study are other than masks

    def __post_init__(self):
        object.__setattr__(self, "past", tuple(self.past))  # JSON gives a list

    @property
    def mask(self) -> str:
        """The token mask of this run: its arm, unless the arms of the study are other than masks."""
        return self.policy or ("none" if self.changes else self.arm)

    @property
    def task(self) -> str:
        """The task that this run trains on."""
        return self.second or self.first


def title_of(run: Run) -> str:
    """ "gsm8k > svamp  mask_highest": tasks, and the arm where there can be several."""
    if run.order:
        return f"{' > '.join((*run.past, run.first))}  {run.arm}"
    tasks, arm = " > ".join(filter(None, (run.first, run.second))), run.arm if run.changes else arm_label(run.arm)
    return f"{tasks}  {arm}" if run.changes or run.second else tasks


def nearest(word: str, known) -> str:
    """ "; did you mean X?" or the list of what is known, to be put behind an error."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) or [k for k in known if k.lower() == word.lower()]
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are {', '.join(known)}" if known else ""


def arm_folder(arm: str) -> str:
    """Where an arm's stage-2 runs lie in the study folder."""
    return {"none": "lora_transfer", "bottom10": "mask/bottom10_group"}.get(arm, f"mask/{arm}")


def arm_label(arm: str) -> str:
    """The arm's name in file names and tables: lora_transfer, mask_bottom10, mask_highest."""
    return "lora_transfer" if arm == "none" else f"mask_{arm}"


def parse_arms(text: str | None, known: Iterable[str]) -> list[str]:
    """--mask "a,b" -> arms in the order given, each once; None -> the default three. known: the policies there are."""
    known = list(known)
    arms = list(DEFAULT_ARMS) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    if not arms:
        raise LetheError("--mask names no arm; known are " + ", ".join(known))
    for arm in arms:
        if arm not in known:
            raise LetheError(f"--mask: unknown arm '{arm}'{nearest(arm, known)}")
    return list(dict.fromkeys(arms))


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms each once, the default ones first."""
    arms = dict.fromkeys(arms)
    return [arm for arm in DEFAULT_ARMS if arm in arms] + sorted(arm for arm in arms if arm not in DEFAULT_ARMS)


def parse_pairs(text: str | None, tasks: list[str]) -> list[tuple[str, str]]:
    """--pairs "a:b,c:d" -> [(a, b), (c, d)], each once; None -> every ordered pair of tasks."""
    if text is None:
        return [(a, b) for a in tasks for b in tasks if a != b]
    pairs = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        names = [name.strip() for name in part.split(":")]
        if len(names) != 2 or not all(names):
            raise LetheError(f"--pairs: '{part}' is not a pair; write first:second, for example gsm8k:svamp")
        for name in names:
            if name not in tasks:
                raise LetheError(f"--pairs: '{name}' is not among the tasks of this study{nearest(name, tasks)}")
        if names[0] == names[1]:
            raise LetheError(f"--pairs: '{part}' has the same task twice")
        pairs.append((names[0], names[1]))
    if not pairs:
        raise LetheError("--pairs is empty; write first:second, for example gsm8k:svamp")
    return list(dict.fromkeys(pairs))


def plan_runs(
    tasks: list[str],
    arms: Iterable[str] = DEFAULT_ARMS,
    pairs: str | None = None,
    stage: int | None = None,
    second_alone: bool = False,
) -> list[Run]:
    """All runs in the order of execution, parents before children, the arms of one pair side by side.

    stage 1: one run per task (of the pairs, where pairs are given); 2: the stage-1 parents, then every pair under
    every arm; None: both.  second_alone: stage 1 on the second tasks too, which some masks compare with.  Raises
    LetheError for unknown tasks, and for names that no folder can carry.
    """
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise LetheError("no task to train on; name some with --datasets")
    for task in tasks:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", task):
            raise LetheError(f"task name '{task}' cannot be a folder; use letters, digits, '_', '-', '.'")
    selected, pairs = pairs is not None, parse_pairs(pairs, tasks)
    if stage not in (None, 1, 2):
        raise LetheError(f"--stage is 1 or 2, not {stage}")
    if stage == 2 and not pairs:
        raise LetheError(f"stage 2 needs a second task beside '{tasks[0]}'; name two with --datasets")
    in_pairs = {a for a, _ in pairs} | ({b for _, b in pairs} if stage != 2 or second_alone else set())
    wanted = [task for task in tasks if task in in_pairs] if selected or stage == 2 else tasks
    runs = [Run(1, "none", task, None, f"lora_base/{task}", None) for task in wanted]
    if stage != 1:
        runs += [Run(2, arm, a, b, f"{arm_folder(arm)}/{a}_to_{b}", f"lora_base/{a}") for a, b in pairs for arm in arms]
    owners: dict[str, Run] = {}
    for run in runs:
        other = owners.setdefault(run.folder.lower(), run)  # lower: some file systems do not tell A from a
        if other != run:
            raise LetheError(
                f"two runs want the folder {run.folder}: {other.first}, {other.second} and {run.first}, "
                f"{run.second}; rename a task"
            )
    return runs


def plan_batch(names: list[str]) -> list[Run]:
    """One stage-1 run for each data set of a batch."""
    return [Run(1, "none", name, None, f"lora_base/{name}", None) for name in names]


def cells_to_score(runs: list[Run], tasks: list[str]) -> list[tuple[Run | None, str]]:
    """(run, task) to score; run None is the base.  Base, stage 1 and sequences on every task, stage 2 on its two."""
    tasks = list(dict.fromkeys(tasks))
    cells: list[tuple[Run | None, str]] = [(None, task) for task in tasks]
    for run in runs:
        cells += [(run, task) for task in (tasks if run.stage == 1 or run.order else (run.first, run.second))]
    return cells


def numbered(runs: list, names: list[str]) -> dict:
    """{run: "  3/12 its name"}, all of one width."""
    wide = max(map(len, names), default=0)
    return {run: f"{number:3d}/{len(runs)} {name:{wide}s}" for number, (run, name) in enumerate(zip(runs, names, strict=True), 1)}
