"""The study folder: atomic writes, what is done, and where things lie.

study.json holds the identity (model, data, hyper-parameters, seed) and the circumstances (command, versions, commit,
hardware).  The same identity continues the study; another in the same folder is refused with the differences listed.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.config import config_text
from study.errors import LetheError
from study.identity import circumstances, differences
from study.plan import nearest


def write_error(path: Path, error: OSError) -> LetheError:
    """An OSError of a write as one message with its mend."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LetheError(f"no space left for {path}; free some, then run the same command again: what is done is kept")
    mend = "choose a folder that you may write to with --out"
    return LetheError(f"cannot write {path}: {error.strerror or error}; {mend}")


@contextlib.contextmanager
def replacing(path: str | Path):
    """Gives a temporary path beside `path`; when the block ends well it is synced to disk and renamed over `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename stands all the same
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Atomic: readers see the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Atomic, UTF-8."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # a file's name may hold bytes that are no text


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Atomic.  NaN and infinities become null, tensors' and arrays' scalars numbers, paths text."""
    write_text(path, json.dumps(_plain(value), indent=indent, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def read_json(path: str | Path, default: Any = ...) -> Any:
    """A JSON file; `default` where it is missing.  LetheError for a missing (no default) or damaged one."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not ...:
            return default
        raise LetheError(f"no file {path}") from None
    except json.JSONDecodeError as error:
        raise LetheError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}), perhaps cut short; "
            "move it away and run the same command again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LetheError(f"{path}: cannot be read: {error}") from None


def append_jsonl(path: str | Path, *rows: dict) -> None:
    """Append one line per row.  A last line that a kill left half-written is removed first."""
    path = Path(path)
    text = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise write_error(path, error) from error


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a jsonl file ([] where missing); a half-written last line is passed over, any other is an error."""
    path, rows = Path(path), []
    if not path.exists():
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break  # append_jsonl takes it away, whole or not
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise LetheError(f"{path}:{number}: not valid JSON ({error.msg})") from None
    return rows


def is_done(run_dir: str | Path) -> bool:
    """True when the run's manifest, written last of all, says so."""
    manifest = read_json(Path(run_dir) / "run.json", default={})
    return isinstance(manifest, dict) and manifest.get("status") == "done"


@dataclass(frozen=True)
class StudyFolder:
    """An opened study: its path, and study.json as a dict."""

    path: Path
    record: dict

    def dir(self, run_folder: str) -> Path:
        return self.path / run_folder


def open_study(
    path: str | Path, config: Any, identity: dict, extra: dict | None = None, argv: list[str] | None = None
) -> StudyFolder:
    """Make or continue the study at `path` (write config.yaml and study.json); LetheError when it is another study.

    `extra` adds circumstances worth keeping (say, the template); its dicts grow when a study is continued.
    Call it on one process only.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise LetheError(f"{path} is a file; choose a folder with --out")
    identity, now = _plain(identity), circumstances(argv)
    record = read_json(path / "study.json", default=None)
    if record is None:
        record = {"identity": identity, **now, **_plain(extra or {})}
    else:
        if not isinstance(record, dict) or "identity" not in record:
            raise LetheError(f"{path / 'study.json'} is not a study's record; choose another folder with --out")
        lines = differences(record["identity"], identity)
        if lines:
            raise LetheError(
                f"{path} holds another study:\n  "
                + "\n  ".join(lines)
                + "\nchoose another folder with --out, or ask for the same settings to continue it"
            )
        record["identity"]["data"] = {**record["identity"].get("data", {}), **identity["data"]}
        for key, value in _plain(extra or {}).items():  # a selection must not forget the tasks of an earlier one
            both = isinstance(value, dict) and isinstance(record.get(key), dict)
            record[key] = {**record[key], **value} if both else value
        again = {key: now[key] for key in ("command", "commit", "started")}
        record["continued"] = [*record.get("continued", []), again][-20:]
    if not (path / "config.yaml").is_file():  # what later commands selected stands in study.json
        write_text(path / "config.yaml", config_text(config))
    try:
        write_json(path / "study.json", record)
    except LetheError:
        if "continued" not in record:  # else the folder may be read-only, and there may be nothing to do
            raise
    return StudyFolder(path, record)


@contextlib.contextmanager
def one_at_a_time(path: str | Path) -> Iterator[None]:
    """Within it no other process of this project writes `path`; waits until that is so. Where there are no locks there is no waiting."""
    path = Path(path)
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_use(path: str | Path) -> Iterator[None]:
    """Within it no other command may train or score in this study folder; LetheError where one does.

    The lock is the kernel's, so that a command that is killed leaves none. Where the folder cannot be written to, or its file
    system has no locks, there is none.
    """
    try:
        import fcntl

        handle = os.open(Path(path) / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise LetheError(f"{path} is in use by another command ({who}); wait for it, or choose another folder with --out") from None
        except OSError:
            pass
        else:
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def expand_out(template: str, model_name: str) -> Path:
    """--out with {model} (the last part of the model's name) and {timestamp} (20260131_142500) filled in."""
    model = re.sub(r"[^\w.+-]", "_", os.path.basename(str(model_name).rstrip("/\\"))) or "model"
    known = {"model": model, "timestamp": time.strftime("%Y%m%d_%H%M%S")}

    def fill(match: re.Match) -> str:
        if match[1] not in known:
            raise LetheError(f"--out: unknown {{{match[1]}}}{nearest(match[1], known)}")
        return known[match[1]]

    return Path(re.sub(r"\{(\w*)\}", fill, template)).expanduser()


def seed_folders(path: str | Path) -> list[Path]:
    """The trees of a study: seed0/, seed1/ ... where it has several seeds, else the folder itself."""
    path = Path(path)
    seeds = [p for p in path.glob("seed*") if re.fullmatch(r"seed\d+", p.name) and p.is_dir()]
    return sorted(seeds, key=lambda p: int(p.name[4:])) or [path]


def newest_study(root: str | Path = "out") -> Path:
    """The study under `root` (up to three levels down) that was begun or continued last."""
    root = Path(root)
    found = [p for depth in ("", "*/", "*/*/", "*/*/*/") for p in root.glob(depth + "study.json")]
    found = [p for p in found if "batch" not in read_json(p, default={})] or found  # a batch has its own table
    if not found:
        raise LetheError(f"no study under {root}/; train one first (python train.py) or name one with --root")
    newest = max(found, key=lambda p: p.stat().st_mtime_ns).parent
    newest = newest.parent if re.fullmatch(r"seed\d+", newest.name) and newest != root else newest
    return newest.parent if (newest.parent / "growth.json").is_file() else newest  # of several models


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Atomic: all rows, a line each."""
    write_text(path, "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows))
