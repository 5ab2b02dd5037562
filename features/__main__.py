"""Features of data sets, cheap beside the training whose harm they may foretell, as one CSV.

    python -m features --data_folder DIR --model_path M --output_csv features.csv
    python -m features --single_dataset FILE --model_path M

One row for each data set, written as it is done; the same command again goes on with what is missing, changed or failed.
features/README.md says what each column means. Then: python -m features.predict, python -m features.relate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from features.dataset import clean_name, dataset_files, file_digest, load_sample
from features.embedding import EMBEDDING_COLUMNS, embedding_features
from features.likelihood import LIKELIHOOD_COLUMNS, likelihood_features
from features.outcomes import Parser
from features.probe import PROBE_COLUMNS, RATE, load_retain, probe_features
from features.table import Table
from features.text import TEXT_COLUMNS, text_features
from model.checkpoint import fill, find_model, load_config
from model.llama import Llama
from model.subject import Subject, load_subject, resolve
from model.tokenizer import load_tokenizer
from study.environment import default_model
from study.errors import LetheError, is_out_of_memory, run_command
from study.folder import append_jsonl, read_json, write_json
from study.logging import format_table

COLUMNS = (*TEXT_COLUMNS, *LIKELIHOOD_COLUMNS, *EMBEDDING_COLUMNS, *PROBE_COLUMNS)
DEFINITIONS = 1  # raise it when a column comes to mean something else: tables of both do not mix
REPO = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# What to do


def parse(argv: list[str]) -> argparse.Namespace:
    lines = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m features", description=__doc__, formatter_class=lines, allow_abbrev=False)
    what = parser.add_argument_group("what")
    what.add_argument("--data_folder", type=Path, metavar="DIR", help="every .json, .jsonl and .parquet file in it and below")
    what.add_argument("--single_dataset", type=Path, metavar="FILE", help="one file; its features are printed")
    what.add_argument("--model_path", "--model", metavar="M", help="nano, a Hugging Face Llama folder or a hub id (MODEL_NAME, or nano)")
    what.add_argument("--output_csv", type=Path, metavar="F", help="default: out/features.csv; of a single data set: none")
    what.add_argument("--restart", action="store_true", help="make the table anew, whatever stands in it")
    how = parser.add_argument_group("what the numbers depend on: a table holds rows of one such choice")
    how.add_argument("--sample_size", type=_whole(0), default=100, metavar="N", help="records drawn from each data set; 0: all (100)")
    how.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the draw and of the probe (0)")
    how.add_argument("--probe_steps", type=_whole(1), default=20, metavar="N", help="optimizer steps of the probe training (20)")
    how.add_argument("--learning_rate", "--lr", type=_above_zero, default=RATE, metavar="X", help=f"of the probe ({RATE:g})")
    how.add_argument("--no_probe", action="store_true", help="train no probes; their columns stay empty")
    how.add_argument("--retain", type=Path, metavar="FILE", help="records whose loss the probe watches; default: built-in general texts")
    how.add_argument("--template", default="auto", metavar="T", help="auto, llama3, llama3-bare, plain, response")
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    run = parser.add_argument_group("how it runs")
    run.add_argument("--batch_size", type=_whole(1), default=1, metavar="N", help="examples in a pass: changes memory, not the numbers (1)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    run.add_argument("--salvage", action="store_true", help="of a file that is cut off, take its whole leading rows")
    run.add_argument("--isolate", action="store_true", help="a process for each data set, so that a crash costs one row")
    run.add_argument("--timeout", type=_above_zero, metavar="SECONDS", help="with --isolate: the most for one data set, loading included")
    run.add_argument("--row_json", type=Path, help=argparse.SUPPRESS)  # --isolate: where its process writes the row
    run.add_argument("--dataset_name", help=argparse.SUPPRESS)
    args = parser.read(argv)
    if (args.data_folder is None) == (args.single_dataset is None):
        raise LetheError("give --data_folder DIR or --single_dataset FILE" + (", not both" if args.data_folder else ""))
    if args.timeout and not args.isolate:
        raise LetheError("--timeout needs --isolate: only a process of its own can be stopped")
    if args.model_path is None:
        args.model_path, where = default_model() or ("nano", "")
        if where and not args.row_json:
            print(f"model      {args.model_path} ({where})")
    return args


def _whole(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return number


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def settings_of(args: argparse.Namespace) -> dict:
    """What the numbers depend on, beside the data; the model by its fingerprint, for which no weight is kept in memory."""
    folder = find_model(args.model_path)
    with torch.device("meta"):
        model = Llama(load_config(folder))
    fill(model, folder, lambda name, tensor: None)
    probe = {"probe_steps": args.probe_steps, "learning_rate": args.learning_rate}
    probe["retain"] = file_digest(args.retain)[:16] if args.retain else "built-in"
    return {
        "model": model.fingerprint, "tokenizer and template": load_tokenizer(args.model_path, args.template).fingerprint,
        "dtype": resolve(args.device, args.dtype)[1], "sample_size": args.sample_size, "seed": args.seed,
        **({"probe": "none"} if args.no_probe else probe), "definitions": DEFINITIONS,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# One data set


class Worker:
    """The model, loaded when the first data set needs it, and again only after a failure that may have left it changed."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.subject, self.retain, self.seconds = args, None, None, 0.0

    def ready(self) -> Subject:
        if self.subject is None:
            begun = time.perf_counter()
            args = self.args
            self.subject = load_subject(args.model_path, args.device, args.dtype, args.template)
            if not args.no_probe:
                self.retain = load_retain(args.retain, self.subject)
            self.seconds += time.perf_counter() - begun
        return self.subject

    def row(self, name: str, path: Path) -> tuple[dict, dict[str, float]]:
        """(the row of a data set, seconds of its parts). What fails is told in the row: status, reason, empty cells."""
        args, seconds, said = self.args, {}, []
        row = {"dataset_name": name, "status": "error", "reason": ""}

        @contextlib.contextmanager
        def timed(part: str):
            begun = time.perf_counter()
            yield
            seconds[part] = round(time.perf_counter() - begun, 3)

        try:
            with timed("read"):
                sample = load_sample(path, args.sample_size, args.seed, args.salvage, name)
        except LetheError as error:
            return row | {"reason": _told(error, path), "content_hash": _digest(path)}, seconds
        row |= {"content_hash": sample.digest, "dataset_num_items": sample.items, "dataset_total_chars": sample.chars}
        subject = self.ready()
        probe = dict(steps=args.probe_steps, batch_size=args.batch_size, seed=args.seed, learning_rate=args.learning_rate)
        parts = {
            "text": lambda: text_features(sample, subject.tokenizer),
            "likelihood": lambda: likelihood_features(subject, sample, args.batch_size),
            "embedding": lambda: embedding_features(subject, sample, args.batch_size),
            "probe": lambda: {} if args.no_probe else probe_features(subject, sample, retain=self.retain, **probe),
        }
        try:
            for part, features in parts.items():
                with timed(part):
                    found = features()
                said.append(found.pop("reason", ""))
                row |= found
        except Exception as error:  # whatever it is, the other data sets go on
            self.subject = None
            if is_out_of_memory(error):
                error = f"out of memory ({args.batch_size} examples in a pass: --batch_size)"
            elif not isinstance(error, LetheError):
                traceback.print_exc()
                error = f"{type(error).__name__}: {error}"
            return row | {"reason": f"{part}: {_told(error, path)}"}, seconds
        return row | {"status": "ok", "reason": "; ".join(filter(None, [sample.note, *said]))}, seconds


def _digest(path: Path) -> str:
    """Of the file's content, "" where it cannot be read."""
    try:
        return file_digest(path)
    except LetheError:
        return ""


def _told(error: object, path: Path) -> str:
    """On one line, and the same wherever the folder lies."""
    return " ".join(str(error).replace(str(path), path.name).split())


def isolated(name: str, path: Path, args: argparse.Namespace) -> tuple[dict, dict[str, float]]:
    """As Worker.row, in a process of its own: the same command with --single_dataset."""
    failed = {"dataset_name": name, "status": "error", "content_hash": _digest(path)}
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        answer = Path(folder) / "row.json"
        words = [sys.executable, "-m", "features", f"--single_dataset={path}", f"--dataset_name={name}", f"--row_json={answer}"]
        told = ("model_path", "sample_size", "seed", "probe_steps", "learning_rate", "retain", "template", "dtype", "batch_size", "device")
        words += [f"--{flag}={getattr(args, flag)}" for flag in told if getattr(args, flag) is not None]
        words += [f"--{flag}" for flag in ("no_probe", "salvage") if getattr(args, flag)]
        search = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(words, env=os.environ | {"PYTHONPATH": search}, capture_output=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            return failed | {"reason": f"stopped after {args.timeout:g} s (--timeout)"}, {}
        if done.returncode == 0 and answer.is_file():
            return tuple(read_json(answer))
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode < 0:
        ended = f"its process was killed by {signal.Signals(-done.returncode).name}"
        reason = ended + ", perhaps for want of memory" * (done.returncode == -signal.SIGKILL)
    else:
        reason = last[0].removeprefix("error: ") if last else f"its process ended with {done.returncode}"
    return failed | {"reason": _told(reason, path)}, {}


# ----------------------------------------------------------------------------------------------------------------------
# All of them


def run(args: argparse.Namespace) -> None:
    if args.single_dataset:
        files = {args.dataset_name or clean_name(args.single_dataset.stem): args.single_dataset}
    else:
        files = dataset_files(args.data_folder)
    worker = Worker(args)
    if args.row_json:
        write_json(args.row_json, worker.row(*next(iter(files.items()))))
        return
    output = args.output_csv or (Path("out/features.csv") if args.data_folder else None)
    if output is None:
        _show(worker.row(*next(iter(files.items())))[0])
        return
    with contextlib.closing(Table(output, COLUMNS, settings_of(args), args.restart)) as table:
        fill_table(table, files, worker)
        if args.single_dataset:
            _show(table.rows[next(iter(files))])


def fill_table(table: Table, files: dict[str, Path], worker: Worker) -> None:
    """Every row that is missing, of other content, or of an error; progress, and times beside the table."""
    args, log = worker.args, table.path.with_name(table.path.name + ".times.jsonl")
    todo = [name for name, path in files.items() if not table.done(name, _digest(path))]
    kept = len(table.rows.keys() - files.keys())
    others = f"; {kept} rows of other data sets are kept" if kept else ""
    print(f"{len(files)} data sets, {len(files) - len(todo)} of them done before, to {table.path}{others}", flush=True)
    if todo and not args.isolate:
        print(worker.ready().about, flush=True)
    times, failed = {}, []
    for number, name in enumerate(todo, 1):
        print(f"{number:>{len(str(len(todo)))}}/{len(todo)} {name} … ", end="", flush=True)
        begun = time.perf_counter()
        row, parts = isolated(name, files[name], args) if args.isolate else worker.row(name, files[name])
        times[name] = time.perf_counter() - begun
        table.put(row)
        append_jsonl(log, {"dataset_name": name, "status": row["status"], "seconds": round(times[name], 3), "parts": parts})
        failed += [name] if row["status"] != "ok" else []
        usual = [seconds for name, seconds in times.items() if name not in failed] or [0.0]
        left = (len(todo) - number) * sum(usual) / len(usual)
        what = f"{row['dataset_num_items']} items" if row["status"] == "ok" else f"failed: {row['reason']}"
        print(f"{what}  {times[name]:.1f} s" + (f"  ~{_span(left)} left" if number < len(todo) else ""), flush=True)
    if not todo:
        print("nothing to do")
        return
    total, slowest = sum(times.values()), max(times, key=times.get)
    done = {"data_sets": len(todo), "failed": len(failed), "seconds": round(total, 3), "mean": round(total / len(todo), 3),
            "slowest": slowest, "slowest_seconds": round(times[slowest], 3), "loading_seconds": round(worker.seconds, 3)}  # fmt: skip
    append_jsonl(log, done)
    print(f"{len(todo)} data sets in {_span(total)}: {total / len(todo):.1f} s each, slowest {slowest} with {times[slowest]:.1f} s")
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed[:10])}{', …' * (len(failed) > 10)}; their rows say why")


def _show(row: dict) -> None:
    """The row of a single data set; LetheError where it failed."""
    if row["status"] != "ok":
        raise LetheError(row["reason"])
    print(format_table([[name, value if value != "" else None] for name, value in row.items()], ["column", "value"]))


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
