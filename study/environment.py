"""The default model as the environment names it: MODEL_NAME, or a .env file in the folder where the command runs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from study.errors import LetheError

_LINE = re.compile(r"""\s*(?:export\s+)?MODEL_NAME\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))\s*(?:(?<=\s)\#.*)?""", re.VERBOSE)


def default_model(environ: Mapping[str, str] = os.environ, folder: str | Path = ".") -> tuple[str, str] | None:
    """(model, where it was named), from the environment, else from .env; None where neither names one.

    .env holds lines KEY=VALUE, perhaps with export before them, quotes around the value, and comments after a #; the last line for
    MODEL_NAME counts. Nothing else of it is read, and nothing is put into the environment.
    """
    if name := environ.get("MODEL_NAME", "").strip():
        return name, "MODEL_NAME"
    file = Path(folder) / ".env"
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file.is_file() else []
    except OSError as error:
        raise LetheError(f"{file}: cannot be read ({error.strerror or error}); name the model with --model") from None
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    name = next((text.strip() for text in found[-1].groups() if text is not None), "") if found else ""
    return (name, f"MODEL_NAME in {file}") if name else None
