"""What a run tells while it runs: TensorBoard, metrics.jsonl, a progress bar on a terminal, plain tables."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from study.folder import append_jsonl, read_jsonl, write_jsonl


class RunLog:
    """The log of one training run: tensorboard/{run folder, / as __} and {run folder}/metrics.jsonl.

    `step` is the optimizer step it continues after (0: from the start); what a killed attempt logged beyond it
    is removed, so that curves do not fold back.  `enabled` False (ranks other than 0) logs nothing.
    """

    def __init__(self, study: str | Path, run_folder: str, step: int = 0, enabled: bool = True):
        self.writer, self.enabled = None, enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second, so only where a run is logged

        self.metrics_path = Path(study) / run_folder / "metrics.jsonl"
        board = Path(study) / "tensorboard" / run_folder.strip("/").replace("/", "__")
        if self.metrics_path.exists():
            kept = [row for row in read_jsonl(self.metrics_path) if step and 0 <= row.get("step", -1) <= step]
            write_jsonl(self.metrics_path, kept)
        if step == 0 and board.exists():
            shutil.rmtree(board)
        self.writer = SummaryWriter(str(board), purge_step=step + 1 if step else None)

    def scalars(self, values: dict[str, float], step: int, **more: Any) -> None:
        """{tag: value} at an optimizer step, to TensorBoard and one line of metrics.jsonl; `more` to the line only."""
        if not self.enabled:
            return
        values = {tag: float(value) for tag, value in values.items() if value is not None}
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        append_jsonl(self.metrics_path, {"step": step, "time": round(time.time(), 3), **values, **more})

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float], step: int = 0) -> None:
        """Settings and final metrics in the HPARAMS tab, written into this same run.

        SummaryWriter.add_hparams would open a second run beside this one (pytorch issue 32651).
        """
        if not self.enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items() if v is not None
        }
        metrics = {k: float(v) for k, v in metrics.items() if v is not None}
        for summary in hparams(plain, metrics):
            self.writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Markdown."""
        if self.enabled:
            self.writer.add_text(tag, text, step)

    def histogram(self, tag: str, values: Any, step: int = 0) -> None:
        """A tensor, array or list of numbers; nothing is written when it is empty."""
        if self.enabled and len(values):
            import numpy

            self.writer.add_histogram(tag, numpy.asarray(values, dtype="float64"), step)

    def picture(self, tag: str, path: str | Path, step: int = 0) -> None:
        """A PNG file."""
        if self.enabled:
            from matplotlib.image import imread

            self.writer.add_image(tag, imread(path)[..., :3], step, dataformats="HWC")

    def flush(self) -> None:
        """What was logged reaches the disk, so that a later kill cannot take it."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Progress:
    """A bar on a terminal; elsewhere nothing but one closing line.  Made by `progress`."""

    def __init__(
        self, work: Iterable | int | None, desc: str, unit: str, enabled: bool, summary: bool, start: int, stream
    ):
        self.work = work if not isinstance(work, int) else None
        self.total = work if isinstance(work, int) else len(work) if hasattr(work, "__len__") else None
        self.desc, self.unit, self.count, self.fields = desc, unit, start, {}
        self.summary, self.stream, self.began, self.closed = summary and enabled, stream, time.perf_counter(), False
        self.bar = None
        if enabled and stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total, desc=desc, unit=unit, initial=start, leave=False, file=stream, dynamic_ncols=True
            )

    def update(self, n: int = 1, **fields: Any) -> None:
        """n more units done; fields (loss=1.23, tok_s=8100) are shown behind the bar."""
        self.count += n
        self.fields |= {name: _cell(value) for name, value in fields.items()}
        if self.bar is not None:
            if fields:
                self.bar.set_postfix(self.fields, refresh=False)
            self.bar.update(n)

    def __iter__(self) -> Iterator:
        try:
            for item in self.work if self.work is not None else range(self.count, self.total or 0):
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
        if self.summary:
            told = "".join(f" | {name} {value}" for name, value in self.fields.items())
            seconds = time.perf_counter() - self.began
            print(f"{self.desc}: {self.count} {self.unit} in {seconds:.1f} s{told}", file=self.stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def progress(
    work: Iterable | int | None,
    desc: str = "",
    unit: str = "steps",
    *,
    enabled: bool = True,
    summary: bool = False,
    start: int = 0,
    stream: Any = None,
) -> Progress:
    """Progress over an iterable (iterate over the result) or a total (call .update, .close, or use `with`).

    `summary` prints one line at the end; without it a run that is not on a terminal stays silent.
    """
    return Progress(work, desc, unit, enabled, summary, start, stream or sys.stderr)


def say(text: str) -> None:
    """A line that a progress bar on the terminal does not swallow."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value != value:
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def format_table(rows: list[list[Any]], headers: list[str]) -> str:
    """Aligned plain text: columns of numbers to the right, words to the left, None as '-'."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [all(cell[:1] in "-+.0123456789±" for cell in column[1:]) for column in columns]

    def line(row: Iterable[str]) -> str:
        pairs = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, cells)])


def memory_gib() -> float:
    """Peak memory of this process in GiB: CUDA's where it is in use, else the resident set's (0.0 where unknown)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
