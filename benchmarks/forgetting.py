"""Does the probe's `forgetting` foresee what training on a data set costs? Data sets made for it, the built-in model, three commands.

    python benchmarks/forgetting.py --out out/forgetting        # about a quarter of an hour on two CPU cores

It writes 30 data sets (the built-in tasks in two sizes, with answers shuffled or wrong, noise, copies, text of the pretraining
kind, mixtures), then runs, as a user would, train.py --datasets_folder with mini_mmlu, python -m features, and
python -m features.relate for `forgetting` and for all features. Same seeds, same numbers; a second run goes on where one was cut.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import REPO, finish  # noqa: E402
from data.builtin import BUILTIN_TASKS, builtin_task  # noqa: E402
from data.builtin_corpus import WORD_LIST, documents  # noqa: E402
from data.builtin_world import people_facts, science_facts  # noqa: E402
from study.errors import LetheError, run_command  # noqa: E402
from study.folder import read_json, write_json  # noqa: E402

SMALL, LARGE = 96, 384  # rows


def data_sets() -> dict[str, list[dict]]:
    """Alpaca rows of every data set, by its name: the part before the first dash is its family."""
    sets = {}
    tasks = {name.removeprefix("mini_"): builtin_task(name)["train"] for name in BUILTIN_TASKS}
    for name, rows in tasks.items():
        sets[f"{name}-small"], sets[f"{name}-large"] = rows[:SMALL], rows[-LARGE:]
        sets[f"{name}-shuffled"] = shuffled(rows[:LARGE], Random(f"{name} shuffled"))
    for name in ("gsm8k", "svamp"):
        sets[f"{name}-wrong"] = [{**row, "output": off_by_one(row["output"])} for row in tasks[name][:LARGE]]
    facts = {"people": people_facts(), "science": science_facts()}
    for name, known in facts.items():
        sets[f"{name}-true"] = [told(fact, fact.value) for fact in known if fact.in_corpus]
        rng = Random(f"{name} false")
        sets[f"{name}-false"] = [told(fact, rng.choice([v for v in fact.relation.values if v != fact.value])) for fact in known]
    for name, count, long in (("words-small", SMALL, 4), ("words-large", LARGE, 4), ("words-long", LARGE, 24)):
        rng = Random(name)
        text = lambda rng=rng, long=long: " ".join(rng.choices(WORD_LIST, k=long))  # noqa: E731
        sets[name] = [{"instruction": text(), "input": "", "output": text()} for _ in range(count)]
    rng = Random("digits")
    number = lambda: str(rng.randrange(10**6))  # noqa: E731
    sets["digits-large"] = [{"instruction": number(), "input": "", "output": number()} for _ in range(LARGE)]
    sets["svamp-capitals"] = [{key: row[key].upper() for key in ("instruction", "input", "output")} for row in tasks["svamp"][:LARGE]]
    rng = Random("copies")
    lists = [", ".join(rng.sample(WORD_LIST, 5)) for _ in range(LARGE)]
    sets["copies-large"] = [{"instruction": f"Repeat: {words}", "input": "", "output": words} for words in lists]
    stream = documents(seed=7)  # pretraining read those of seed 0
    texts = [text for _, text in zip(range(LARGE), stream, strict=False)]
    sets["pretraining-large"] = [{"instruction": "", "input": text[: len(text) // 2], "output": text[len(text) // 2 :]} for text in texts]
    sets["mixture-tasks"] = [row for rows in tasks.values() for row in rows[: LARGE // len(tasks)]]
    sets["mixture-noise"] = tasks["svamp"][: LARGE // 2] + sets["words-large"][: LARGE // 2]
    return {name: [{key: row[key] for key in ("instruction", "input", "output")} for row in rows] for name, rows in sets.items()}


def shuffled(rows: list[dict], rng: Random) -> list[dict]:
    answers = [row["output"] for row in rows]
    rng.shuffle(answers)
    return [{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)]


def off_by_one(text: str) -> str:
    """Every result is one too many: "3 + 4 = 8"."""
    return re.sub(r"(= |#### |Answer: )([0-9]+)", lambda match: f"{match[1]}{int(match[2]) + 1}", text)


def told(fact, value: str) -> dict:
    return {"instruction": fact.relation.questions[0].format(s=fact.subject), "input": "", "output": value}


def command(*words: str) -> float:
    """Runs a command of the project, its output shown, and returns its seconds."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=REPO)
    if done.returncode:
        raise LetheError(f"python {shlex.join(words)} ended with {done.returncode}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/forgetting", help="where data sets, studies and pictures go")
    parser.add_argument("--probe_steps", type=int, default=20)
    parser.add_argument("--sample_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    for name, rows in data_sets().items():
        if not (file := out / "sets" / f"{name}.json").is_file():
            write_json(file, rows, indent=None)
    seconds = {
        "training": command(
            "train.py", "--datasets_folder", str(out / "sets"), "--mmlu", "mini_mmlu", "--model", "nano", "--seed", str(args.seed),
            "--out", str(out / "batch"),
        ),
        "features": command(
            "-m", "features", "--data_folder", str(out / "sets"), "--model_path", "nano", "--output_csv", str(out / "features.csv"),
            "--sample_size", str(args.sample_size), "--batch_size", "8", "--probe_steps", str(args.probe_steps), "--seed", str(args.seed),
            "--learning_rate", "3e-3",  # that of the training: harm at a small rate does not rank harm at a large one
        ),
    }  # fmt: skip
    outcome = str(max((out / "batch" / "result").glob("*.json"), key=lambda path: path.stat().st_mtime_ns))
    found = {}
    for target in ("change", "answer_nll_change"):
        for feature in ("forgetting", "all"):
            picture = out / f"{feature}_{target}.png"
            command("-m", "features.relate", "--features", str(out / "features.csv"), "--outcomes", outcome, "--feature", feature,
                    "--target", target, "--out", str(picture))  # fmt: skip
        found[target] = read_json(out / f"forgetting_{target}.json")
    finish({"benchmark": "forgetting", "data_sets": len(data_sets()), "seconds": seconds, "relations": found})


if __name__ == "__main__":
    sys.exit(run_command(main))
