"""Merges an adapter into its base and writes a Hugging Face folder, with a parity report.

    python -m lora.merge --model DIR --adapter DIR --out DIR [--dtype bfloat16]

The sum is taken in float32 and rounded once. The report compares, on a fixed text, the logits of base + adapter with those
of the written folder read back: largest and mean difference, and how often the argmax agrees.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from lora.adapter import load_adapter
from lora.layers import merge_adapter
from lora.states import save_model
from model.checkpoint import find_model, load_model, read_json
from model.tokenizer import load_tokenizer
from study.errors import LetheError, run_command
from study.folder import write_error, write_json

PROBE = (
    "A train leaves the station at noon with 48 passengers. At the first stop 19 get off and 7 get on. How many are on it then? "
    "First 48 - 19 = 29 stay, then 29 + 7 = 36. The river runs from the hills to the sea, and the town lies where it bends."
)


def merge(model: str, adapter: str, out: str | Path, dtype: str = "auto") -> dict:
    """Writes the merged folder and returns the parity report. dtype: of the written weights, "auto" for the base's own."""
    source, out = find_model(model), Path(out)
    if (Path(adapter) / "model.safetensors").is_file() and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise LetheError(f"{adapter} holds whole weights, not an adapter (a run of --full): it is a model folder as it is")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise LetheError(f"--out {out} is not empty; give a new folder")
    config = read_json(source / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32" if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise LetheError(f"--dtype {name!r} is unknown; known: auto, float32, bfloat16, float16")
    probe = torch.tensor([load_tokenizer(source).encode(PROBE)])
    llama = load_model(source)  # float32, for the sum
    load_adapter(llama, adapter)
    before = _logits(llama, probe)
    merge_adapter(llama)
    making = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # renamed when it is whole
    try:
        save_model(llama, source, making, getattr(torch, name))
        del llama
        after = _logits(load_model(making), probe)
        difference = (before - after).abs()
        report = {
            "tokens": probe.shape[1],
            "dtype": name,
            "max_logit_difference": difference.max().item(),
            "mean_logit_difference": difference.mean().item(),
            "argmax_agreement": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
            "model": model,
            "adapter": adapter,
        }
        write_json(making / "merge_report.json", report)
        os.replace(making, out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return report


@torch.inference_mode()
def _logits(model, probe: torch.Tensor) -> torch.Tensor:
    return model(probe)[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: a folder, a hub id or 'nano'")
    parser.add_argument("--adapter", required=True, help="a folder with adapter_model.safetensors")
    parser.add_argument("--out", required=True, help="a new folder for the merged model")
    parser.add_argument("--dtype", default="auto", help="of the written weights: auto (the base's own), float32, bfloat16, float16")
    args = parser.parse_args(argv)

    def work() -> None:
        report = merge(args.model, args.adapter, args.out, args.dtype)
        print(json.dumps(report, indent=2))
        same = round(report["argmax_agreement"] * report["tokens"])
        print(f"wrote {args.out}: the likeliest token is that of base + adapter at {same} of {report['tokens']} positions", file=sys.stderr)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
