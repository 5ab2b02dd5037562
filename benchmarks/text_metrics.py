"""What copying scores on ASSET: every metric of generated text for the source itself, and for a human's simplification.

    python benchmarks/text_metrics.py --data path/to/asset          # the folder of asset.test.orig and asset.test.simp.0 to .9

The source as its own output has published values (EASSE: SARI 20.73, BLEU 92.81 without case), so a mistake would show. A first
reference is scored against all ten, itself among them, and against the other nine. "evaluate" is Hugging Face's reading of SARI.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import finish, machine_lines  # noqa: E402
from data.tasks import asset  # noqa: E402
from metrics.answers import score_answer  # noqa: E402
from metrics.generation import corpus_bleu  # noqa: E402
from metrics.sari import sari  # noqa: E402
from metrics.summary import summarise  # noqa: E402
from study.errors import run_command  # noqa: E402
from study.logging import format_table  # noqa: E402
from study.text_scores import signature_lines  # noqa: E402


def scored(rows: list[dict], outputs: list[str], references: list[list[str]]) -> tuple[dict[str, float], list[dict]]:
    """({metric: value in %}, the rows of metrics.summary) of these outputs."""
    items = [
        {"output": output, "reference": mine[0], "references": mine, "original": row["original"], "group": "", "answer_nll": 0.0,
         **score_answer("text", output, mine[0], mine, row["original"])}
        for row, output, mine in zip(rows, outputs, references, strict=True)
    ]  # fmt: skip
    found = summarise(items)
    values = {row["metric"]: row["value"] for row in found if row["metric"] in ("rouge1", "rouge2", "rougeL", "sari", "sari_easse", "bleu")}
    values["sari (evaluate)"] = sum(
        sari(row["original"], output, mine, "evaluate") for row, output, mine in zip(rows, outputs, references, strict=True)
    ) / len(rows)
    values["bleu, lower case"] = corpus_bleu(outputs, references, lowercase=True).value
    return {metric: 100 * value for metric, value in values.items()}, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of ASSET's files")
    parser.add_argument("--out", help="write the result here too")
    arguments = parser.parse_args()

    def work() -> None:
        rows = [asset.to_alpaca(row) for row in asset.read_raw(arguments.data)["test"]]
        first = [row["references"][0] for row in rows]
        sides = {
            "the source": ([row["original"] for row in rows], [row["references"] for row in rows]),
            "first reference, of ten": (first, [row["references"] for row in rows]),
            "first reference, other nine": (first, [row["references"][1:] for row in rows]),
        }
        results = {name: scored(rows, *side) for name, side in sides.items()}
        metrics = list(next(iter(results.values()))[0])
        print(machine_lines("cpu"))
        print(f"ASSET      {len(rows)} test sentences, values in %\n")
        print(format_table([[name, *(f"{values[m]:.2f}" for m in metrics)] for name, (values, _) in results.items()], ["output", *metrics]))
        print("\n".join(dict.fromkeys(line for _, found in results.values() for line in signature_lines(found))), flush=True)
        finish({"items": len(rows), "values": {name: values for name, (values, _) in results.items()}}, arguments.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
