"""MMLU by the letters' likelihood against transformers: items per minute, and how far the two are apart.

    python benchmarks/mmlu.py                                               # the CPU configuration, random tokens
    python benchmarks/mmlu.py --data data/mmlu --tokenizer path/to/llama    # the released files and a real tokenizer
    python benchmarks/mmlu.py --preset 1b                                   # the shape of Llama-3.2-1B on CUDA, bfloat16
    python benchmarks/mmlu.py --toy                                         # seconds, to see that everything runs

Both sides load the same folder of seeded random weights and read the same ids: five solved examples, the question, four letters.
Ours runs a subject's examples once and the questions after them; transformers reads whole prompts, one at a time, or eight at a
time sorted by length and padded on the left, and makes the logits of the last token alone. Contenders take turns in one process,
round by round. Random tokens have about the lengths of the released rows (an own part of 72 tokens in the middle, examples of 430).

The items are of few subjects: a released one has 246 on average, and the more it has, the more there is to share.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import SHAPES, Shape, finish, machine_lines, shown, spread  # noqa: E402
from benchmarks.decode import take_turns, write_model  # noqa: E402
from data.questions import as_questions  # noqa: E402
from data.tasks.mmlu import load_mmlu  # noqa: E402
from model import load_model, load_tokenizer  # noqa: E402
from model.choices import Question, score_options  # noqa: E402
from study.errors import LetheError, run_command  # noqa: E402
from study.logging import format_table  # noqa: E402

REFERENCE, OURS = "transformers 1", "ours"


@dataclass(frozen=True)
class Settings:
    shape: Shape
    device: str
    dtype: str
    items: int
    subjects: int
    rounds: int
    shrink: int = 1  # random tokens' lengths are divided by it
    seed: int = 0


PRESETS = {
    "cpu": Settings(SHAPES["cpu"], "cpu", "float32", 200, 5, 3),
    "1b": Settings(SHAPES["1b"], "cuda", "bfloat16", 2000, 8, 3),
    "toy": Settings(SHAPES["toy"], "cpu", "float32", 12, 3, 2, shrink=8),
}


def random_questions(settings: Settings) -> list[Question]:
    """Questions of random tokens, those of a subject with one beginning, and four letters each."""
    g = torch.Generator().manual_seed(settings.seed)
    vocabulary, letters = settings.shape.vocabulary, [[number] for number in (7, 11, 13, 17)]

    def ids(median: int, spread: float) -> list[int]:
        length = median / settings.shrink * math.exp(spread * torch.randn((), generator=g).item())
        return torch.randint(0, vocabulary, (max(2, round(length)),), generator=g).tolist()

    starts = [ids(430, 0.6) for _ in range(settings.subjects)]
    return [Question(starts[k % len(starts)] + ids(72, 0.7), letters, str(k % len(starts))) for k in range(settings.items)]


def released_questions(settings: Settings, data: str, tokenizer: str, shots: int) -> list[Question]:
    """Of the released files: subjects drawn from the seed, as many items of each as there are wanted."""
    items = load_mmlu(data, shots).items
    subjects = sorted({item.subject for item in items})
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    chosen = [subjects[i] for i in order[: settings.subjects]]
    each = -(-settings.items // len(chosen))
    found = [item for subject in chosen for item in [item for item in items if item.subject == subject][:each]]
    return as_questions(found[: settings.items], load_tokenizer(tokenizer), 4096)[0]


@torch.inference_mode()
def peer_score(peer, questions: list[Question], batch: int) -> torch.Tensor:
    """(items, options) log-probabilities of the options' tokens, one each, by whole prompts through transformers."""
    found = torch.zeros(len(questions), len(questions[0].options), dtype=torch.float64)
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    for at in range(0, len(order), batch):
        chunk = order[at : at + batch]
        prompts, longest = [questions[i].prompt for i in chunk], len(questions[chunk[0]].prompt)
        more = {}
        if batch > 1:
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
            more = {"attention_mask": mask.to(peer.device), "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(peer.device)}
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]).to(peer.device)
        logprobs = peer(ids, logits_to_keep=1, use_cache=False, **more).logits[:, -1].float().log_softmax(-1).double().cpu()
        for i, row in zip(chunk, logprobs, strict=True):
            found[i] = row[[option[0] for option in questions[i].options]]
    return found


def our_score(model, questions: list[Question]) -> torch.Tensor:
    return torch.tensor([[option.logprob for option in row] for row in score_options(model, questions)], dtype=torch.float64)


def run(settings: Settings, arguments: argparse.Namespace) -> dict:
    device, dtype = settings.device, getattr(torch, settings.dtype)
    if arguments.data:
        questions = released_questions(settings, arguments.data, arguments.tokenizer, arguments.shots)
        if max(map(max, (question.prompt for question in questions))) >= settings.shape.vocabulary:
            raise LetheError(f"{arguments.tokenizer}: its vocabulary is larger than that of the shape {arguments.preset}")
    else:
        questions = random_questions(settings)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(settings.shape, Path(folder), settings.seed)
        model, peer = load_model(weights, dtype, device), None
        if not arguments.alone:
            from transformers import LlamaForCausalLM

            peer = LlamaForCausalLM.from_pretrained(weights, dtype=dtype).to(device).eval()
    lengths = [len(question.prompt) for question in questions]
    what = f"{len(questions)} items of {settings.subjects} subjects, {arguments.data or 'random tokens'}, prompts of "
    what += f"{min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average"
    print(machine_lines(device))
    print(f"model      {settings.shape}, {device}, {settings.dtype}\nitems      {what}", flush=True)

    contenders: dict[str, Callable] = {OURS: lambda: our_score(model, questions)}
    for batch in (1, 8) if peer is not None else ():
        contenders[f"transformers {batch}"] = lambda batch=batch: peer_score(peer, questions, batch)
    times, scores = take_turns(contenders, settings.rounds, device)
    truth = scores[REFERENCE if peer is not None else OURS]
    figures, rows = {}, []
    for name, seconds in times.items():
        rates = [60 * len(questions) / each for each in seconds]
        same = int((scores[name].argmax(-1) == truth.argmax(-1)).sum())
        figures[name] = {"items_per_minute": spread(rates), "seconds": spread(seconds), "same_argmax": same}
        figures[name]["largest_difference"] = (scores[name] - truth).abs().max().item()
        told = f"{statistics.median(seconds):.2f}", f"{figures[name]['largest_difference']:.1e}", f"{same} of {len(truth)}"
        rows.append([name, shown(rates), *told])
    print("\n" + format_table(rows, ["", "items/min", "seconds", "largest difference", "same answer"]))
    result = {"preset": arguments.preset, "settings": {**settings.__dict__, "shape": settings.shape.__dict__}, "data": arguments.data}
    result |= {"shots": arguments.shots, "prompt_tokens": sum(lengths), "contenders": figures}
    if peer is not None:
        rate = {name: of["items_per_minute"]["median"] for name, of in figures.items()}
        result["ratio"], result["ratio_batched"] = (rate[OURS] / rate[f"transformers {batch}"] for batch in (1, 8))
        result["largest_difference"], result["same_argmax"] = figures[OURS]["largest_difference"], figures[OURS]["same_argmax"]
        print(f"\nours over transformers, one at a time: {result['ratio']:.1f}x; eight at a time: {result['ratio_batched']:.1f}x")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--toy", action="store_true", help="the smallest preset")
    parser.add_argument("--data", help="the released MMLU files; random tokens without it")
    parser.add_argument("--tokenizer", help="a model folder, whose tokenizer reads --data")
    parser.add_argument("--shots", type=int, default=5, help="solved examples before a question of --data")
    parser.add_argument("--items", type=int, help="instead of the preset's")
    parser.add_argument("--subjects", type=int, help="instead of the preset's")
    parser.add_argument("--rounds", type=int, help="instead of the preset's")
    parser.add_argument("--device", help="instead of the preset's")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--threads", type=int, help="of PyTorch on CPU")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.preset = "toy" if arguments.toy else arguments.preset
    names = ("items", "subjects", "rounds", "device")
    changes = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    settings = replace(PRESETS[arguments.preset], **changes)

    def work() -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise LetheError("this machine has no CUDA device")
        if bool(arguments.data) != bool(arguments.tokenizer):
            raise LetheError("--data and --tokenizer go together: the released rows need a real tokenizer")
        finish({"benchmark": "mmlu", **run(settings, arguments)}, arguments.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
