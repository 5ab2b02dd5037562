"""notebooks/results.ipynb, run cell by cell without Jupyter in toy studies of every kind; and environment.yml."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from test_comparison import build
from test_sequence import study as study_of_sequences

import study.report
from study.batch_result import rows, save
from study.comparison import report_comparison
from study.folder import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from study.plan import Run, plan_runs
from study.reliability import cell_rows
from study.report import report, report_growth

REPO = Path(__file__).parent.parent
NOTEBOOK = REPO / "notebooks" / "results.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
SECTIONS = ("masks", "optimizers", "sequences", "batches", "growth", "general ability", "probabilistic")


@pytest.fixture
def run_notebook(monkeypatch, capsys):
    """(root, folder it is started in) -> its names, the figures shown, and what each cell printed."""
    monkeypatch.setattr(Figure, "_repr_png_", None, raising=False)  # what the notebook sets is taken back

    def run(root, started="."):
        monkeypatch.chdir(REPO / started)
        monkeypatch.setenv("LETHE_STUDY", str(root))
        figures, told = [], {}
        names = {"display": figures.append}
        capsys.readouterr()
        for name, source in CODE.items():
            exec(compile(source, f"cell {name}", "exec"), names)
            told[name] = capsys.readouterr().out
        for figure in figures:
            assert isinstance(figure, Figure) and any(axes.has_data() for axes in figure.axes)
        assert figures[0]._repr_png_().startswith(b"\x89PNG")
        return names, figures, told

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """The report's own, and TensorBoard's."""
    for name in ("draw_all", "draw_sequences"):
        monkeypatch.setattr(study.report, name, lambda *_: [])
    for name in ("draw_general", "draw_growth", "log_pictures"):
        monkeypatch.setattr(study.report, name, lambda *_: None)
    monkeypatch.setattr("study.comparison.draw_comparison", lambda *_: [])


def skipped(told) -> set[str]:
    return {line.split(":")[0] for text in told.values() for line in text.splitlines() if line.endswith(": none in this study")}


def forgotten_by_hand(root: Path) -> dict[tuple[str, str], list[int]]:
    """{(run's folder, task): lines that were right before the run and are wrong after it}, from the files alone."""
    found = {}
    for manifest in root.glob("**/run.json"):
        run = json.loads(manifest.read_text())["run"]
        tree = Path(str(manifest.parent).removesuffix(run["folder"]))
        for file in manifest.parent.glob("eval/*.jsonl"):
            earlier = tree / (run["parent"] or "base") / "eval" / file.name
            if earlier.is_file():
                sides = [[json.loads(line) for line in path.read_text().splitlines()] for path in (earlier, file)]
                verdicts = [[item.get("exact_match", item.get("correct")) for item in side] for side in sides]
                found[str(manifest.parent), file.stem] = [k for k, both in enumerate(zip(*verdicts, strict=True)) if both == (True, False)]
    return found


def check_items(names, root: Path) -> None:
    by_hand = forgotten_by_hand(root)
    listed = {(str(move["tree"] / move["run"].folder), move["task"]): move["forgotten"] for move in names["moves"]}
    assert listed == by_hand and sum(map(len, by_hand.values())) > 0
    most = names["most"][0]
    assert len(most["forgotten"]) == max(map(len, by_hand.values())) == len(names["forgotten"])
    before, after = map(read_jsonl, most["files"])
    assert names["forgotten"] == [(before[k], after[k]) for k in most["forgotten"]]


def verdicts(shares, n: int = 40, seed: int = 0, **more) -> list[list[dict]]:
    """The same n questions in several states, of which a share is right."""
    draw = np.random.default_rng(seed)
    return [
        [{"subject": "law", "question": f"question {k}", "options": ["x", "y"], "gold": "A", "extracted": "A" if right else "B",
          "correct": bool(right), "answer_nll": 1.0, **more} for k, right in enumerate(draw.random(n) < share)]
        for share in shares
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The files


def test_the_notebook_is_valid_and_clean():
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert whole["nbformat"] == 4 and whole["nbformat_minor"] >= 5 and whole["metadata"]["kernelspec"]["language"] == "python"
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(0 < len(name) <= 64 and name.replace("-", "").isalnum() for name in ids)
    for cell in CELLS:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {} and "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert CELLS[0]["cell_type"] == "markdown" and list(CODE)[0] == "root" and '"out/nano"' in CODE["root"]


def test_the_environment_of_conda():
    found = yaml.safe_load((REPO / "environment.yml").read_text())
    assert found["name"] == "lethe" and found["channels"] == ["conda-forge"] and "python>=3.11" in found["dependencies"]
    (pip,) = (part["pip"] for part in found["dependencies"] if isinstance(part, dict))
    files = [line.removeprefix("-r ") for line in pip if line.startswith("-r ")]
    assert files == ["requirements.txt", "requirements-extra.txt"] and all((REPO / name).is_file() for name in files)
    assert "jupyter" in pip and "pip" in found["dependencies"]


# ----------------------------------------------------------------------------------------------------------------------
# Every kind of study


def masks(root: Path, seed: int) -> None:
    """What training leaves of a study of masks with a column of general ability, and of its evaluation over seeds."""
    tasks, draw = ("a", "b"), np.random.default_rng(seed)
    runs = plan_runs(list(tasks), ["none", "highest"])
    column = dict(zip(["base", *(run.folder for run in runs)], verdicts([0.8] * (1 + len(runs)), seed=seed), strict=True))
    for folder, run in [("base", None), *((run.folder, run) for run in runs)]:
        for task in tasks:
            share = 0.1 if run is None else 0.9 if task == run.task else 0.5
            items = [{"prompt": f"{task} {k}", "output": "so 1", "gold": "1", "extracted": "1", "exact_match": bool(right), "group": "",
                      "flexible_match": True, "string_match": False, "rougeL": 0.5, "correct": bool(right), "answer_nll": 1.0}
                     for k, right in enumerate(draw.random(30) < share)]  # fmt: skip
            write_jsonl(root / folder / "eval" / f"{task}.jsonl", items)
        write_jsonl(root / folder / "eval" / "mini_mmlu.jsonl", column[folder])
        if run:
            mask = {"dropped_share": 0.0 if run.arm == "none" else 0.25}
            write_json(root / folder / "run.json", {"status": "done", "run": run.__dict__, "mask": mask})
    write_json(root / "study.json", {
        "identity": {"settings": {"study": "masks", "seed": seed}}, "tasks": dict.fromkeys(tasks, {}), "columns": {"mini_mmlu": {}},
        "kinds": dict.fromkeys(tasks, "number"), "model": "toy", "command": "python train.py --model toy",
        "commit": {"hash": "0123abcd", "dirty": True}, "hardware": {"cpu": "a CPU", "cores": 2, "gpus": []},
    })  # fmt: skip


@pytest.mark.parametrize("seeds", [(0,), (3, 4)])
def test_masks_general_ability_and_calibration(seeds, tmp_path, run_notebook, no_pictures):
    root = tmp_path / "toy"
    for seed in seeds:
        masks(root / f"seed{seed}" if len(seeds) > 1 else root, seed)
    report(root, quiet=True)
    runs, draw, gold = plan_runs(["a", "b"], ["none", "highest"]), np.random.default_rng(0), np.arange(50) % 3
    scored = [row for run in (None, *runs) for task in ("a", "b")
              for row in cell_rows(run, task, {"deterministic": draw.dirichlet([1, 1, 1], (2, 50))}, {}, gold)]  # fmt: skip
    write_json(root / "probabilistic_results.json", {"results": scored})
    names, figures, told = run_notebook(root, "notebooks" if len(seeds) > 1 else ".")
    head = told["find"]
    assert "masks, general ability, probabilistic" in head and f"seeds      {', '.join(map(str, seeds))}" in head
    for words in ("model      toy", "python train.py --model toy", "0123abcd, with changes", "cpu a CPU, cores 2"):
        assert words in head
    assert skipped(told) == {"optimizers", "sequences", "batches", "growth"}
    line = next(line for line in told["masks-code"].splitlines() if line.startswith("mask_highest"))
    assert line.split()[-2:] == ["25.0", "2"], "the share of tokens dropped, the pairs"
    # bars, two arms with three heat maps each, the scatter; the column; four runs of stage 2; the items
    assert len(figures) == 1 + 6 + 1 + 1 + 4 + 1 and "deterministic" in told["probabilistic-code"]
    assert "General ability: mini_mmlu" in told["general-code"]
    check_items(names, root)
    assert {name: len(found) for name, found in names["points"].items()} == {"none": 2 * len(seeds), "highest": 2 * len(seeds)}
    for found in names["by_run"].values():  # the point of a run of stage 2, counted again
        run = found[0]["run"]
        if run.stage == 2:
            count = {move["task"]: move for move in found}
            own, first = count[run.second], count[run.first]
            point = 100 * len(own["learned"]) / (own["items"] - own["right"]), 100 - 100 * len(first["forgotten"]) / first["right"]
            assert any(point == pytest.approx(other) for other in names["points"][run.arm])
    assert told["items-show"].count("question") == 3 and "before " in told["items-show"]


def test_optimizers(tmp_path, run_notebook, no_pictures):
    build(tmp_path / "toy", n=40)
    write_json(tmp_path / "toy/study.json", read_json(tmp_path / "toy/study.json") | {"commit": None})  # as outside a checkout
    report_comparison(tmp_path / "toy", quiet=True)
    names, figures, told = run_notebook(tmp_path / "toy")
    assert skipped(told) == set(SECTIONS) - {"optimizers"} and "commit     not known" in told["find"]
    assert len(figures) == 4 + 1 and "lost F_abs" in told["optimizers-code"] and len(names["points"]) == 4
    check_items(names, tmp_path)


def sequences(root: Path, seed: int = 0) -> None:
    runs = study_of_sequences(root, seed=seed)
    states = verdicts([0.9, 0.8, 0.6, 0.5, 0.7])
    for folder, items in zip(("base", *(run.folder for run in runs)), states, strict=True):
        write_jsonl(root / folder / "eval" / "mini_mmlu.jsonl", items)
    write_json(root / "study.json", read_json(root / "study.json") | {"columns": {"mini_mmlu": {}}})


def test_sequences_and_fg(tmp_path, run_notebook, no_pictures):
    for seed in (0, 1):
        sequences(tmp_path / "toy" / f"seed{seed}", seed)
    report(tmp_path / "toy", quiet=True)
    names, figures, told = run_notebook(tmp_path / "toy")
    assert skipped(told) == {"masks", "optimizers", "batches", "growth", "probabilistic"}
    assert "Sequences of 3 stages" in told["sequences-code"] and "General forgetting FG" in told["general-code"]
    assert len(figures) == 3 + 1 + 1 and set(names["points"]) == {"none"}, "mtl goes on from nothing"
    check_items(names, tmp_path)
    second = next(move for move in names["moves"] if (move["run"].folder, move["task"]) == ("sequence/none/a,b,c/2_b", "a"))
    assert second["forgotten"] == [8, 9] and second["right"] == 10  # of 20 items 50 % are right after stage 1, then 40 %


@pytest.mark.parametrize("of_a_chunk", [False, True])
def test_a_batch(of_a_chunk, tmp_path, run_notebook):
    root, (base, good, bad) = tmp_path / "out", verdicts([1.0, 1.0, 0.0], n=6)
    good[2]["correct"] = good[5]["correct"] = False
    tree, runs = root / "chunk_001", []
    write_jsonl(tree / "base/eval/mini_mmlu.jsonl", base)
    for name, items in (("good", good), ("bad", bad)):
        run = Run(1, "none", name, None, f"lora_base/{name}", None)
        write_json(tree / run.folder / "run.json", {"status": "done", "run": run.__dict__, "examples": 9})
        write_jsonl(tree / run.folder / "eval/mini_mmlu.jsonl", items)
        runs.append((name, tmp_path / f"{name}.json", run.folder))
    write_json(tree / "lora_base/cut/failed.json", {"reason": "cut.json:3: the file is cut off"})
    runs.append(("cut", tmp_path / "cut.json", "lora_base/cut"))
    write_json(tree / "study.json", {"identity": {"settings": {"study": "batch", "seed": 0}}, "tasks": {}, "batch": {}, "model": "toy"})
    for chunk in ("chunk_001", "chunk_0010"):
        header = {"folder_name": chunk, "timestamp": "20260131_142500", "total_files": 4, "max_samples": None}
        save(root / f"result/batch_mmlu_results_20260131_142500_{chunk}.json", header, rows(tree, runs, "mini_mmlu"))
    names, figures, told = run_notebook(tree if of_a_chunk else root)
    assert skipped(told) == set(SECTIONS) - {"batches"}
    assert told["batches-code"].count("3 of 4 data sets") == (1 if of_a_chunk else 2) and "the file is cut off" in told["batches-code"]
    assert len(figures) == (1 if of_a_chunk else 2) + 1
    assert {move["run"].task: move["forgotten"] for move in names["moves"]} == {"good": [2, 5], "bad": [0, 1, 2, 3, 4, 5]}
    check_items(names, tmp_path)
    kept = sorted(kept for _, kept in names["points"]["none"])
    assert kept == pytest.approx([0, 100 * 4 / 6]), "what a data set teaches is not tested: both are on the benchmark"


def test_growth(tmp_path, run_notebook, no_pictures):
    root = tmp_path / "toy"
    for name in ("grown", "naive"):
        sequences(root / name)
        report(root / name, quiet=True)
    for name, before in (("source", 0.0), ("grown", 4e9), ("naive", 0.0)):
        write_json(root / "models" / name / "pretraining.json", {
            "tokens_per_step": 100, "flops_per_token": 1e7, "flops_before": before, "flops": before + 1e10, "layers": 2,
            "parameters": 1000, "tokens": 1000, "held_out_nll": 2.0, "seconds": 1.0})  # fmt: skip
        append_jsonl(root / "models" / name / "metrics.jsonl", *({"step": k, "eval/nll": 4.0 - k / 5} for k in (1, 5, 10)))
    told = {"command": "python train.py --config configs/growth.yaml", "commit": {"hash": "4567", "dirty": False}}
    write_json(root / "growth.json", {"models": {"grown": "models/grown", "naive": "models/naive"}, **told})
    report_growth(root)
    names, figures, told = run_notebook(root)
    assert skipped(told) == set(SECTIONS) - {"growth", "general ability"}
    assert "model      grown, naive" in told["find"] and "configs/growth.yaml" in told["find"] and "commit     4567\n" in told["find"]
    assert "speed-up" in told["growth-code"] and "grown - naive" in told["growth-code"]
    assert told["general-code"].count("General forgetting FG") == 2 and len(figures) == 1 + 2 + 1
    check_items(names, root)


@pytest.mark.parametrize("started", [".", "notebooks"])
def test_without_a_study_every_section_says_so(started, tmp_path):
    """A process of its own, which finds the code by itself."""
    code = f"import json; names = {{}}; [exec(source, names) for source in json.loads({json.dumps(json.dumps(list(CODE.values())))})]"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"LETHE_STUDY": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO / started, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no result file: run python train.py" in done.stdout and skipped({"": done.stdout}) == set(SECTIONS)
