"""The optimizer comparison: which runs it has, and what they show once they are scored."""

from __future__ import annotations

import re
from pathlib import Path

from study.comparison_logs import write_logs
from study.comparison_plots import NAMES, draw_comparison, whisker
from study.comparison_points import (
    STATES,
    Point,
    chosen_of,
    contrast,
    describe,
    matched,
    pairs_of,
    points_of,
    read_study,
    result_rows,
)
from study.errors import LetheError
from study.folder import write_json
from study.plan import Run, parse_pairs
from study.results import filled_table

# What final_results.json says of itself.
ABOUT = {
    "A, B": "the first and the second task; scores are shares of all test items, the unparsed ones wrong",
    "F_abs": "A after stage 1 - A after stage 2; F_rel: / A after stage 1 (null where that is 0); F_base: A base - A after stage 2",
    "L_A, L_B": "A after stage 1 - A base; B after stage 2 - B base",
    "forward_transfer": "B after stage 1 - B base",
    "performance_gap, performance_balance": "|A - B| after stage 2, and 1 - that: they compare two tasks, not two states of one",
    "intervals": "95 %: low, high over test items (paired bootstrap); seed_low, seed_high over seeds (Student); p: sign flips by item",
    "chosen": "the rate with the least dev nll of A after stage 1 + B after stage 2, on rows that are in neither train nor test",
    "paired": "one - other at the chosen rates, on the same items and seeds; only_b, only_a: verdicts that one, the other had right alone",
    "matched_learning": "the least F_abs of each optimizer, between its rates, where both learn B as well as the weaker one does at best",
    "drift": "of the weights after a stage, against the base; kl: KL(base || model) in nats a token on a task's reference answers",
}


def plan_comparison(tasks: list[str], comparison: dict[str, list[float]], pairs: str | None = None) -> list[Run]:
    """All runs in the order of execution, parents before children, the optimizers of one stage side by side.

    comparison: learning rates by optimizer.  pairs: "a:b,c:d"; None: the first task, then the second.  Every optimizer
    and rate has a tree of its own, optimizer/{name}_lr{rate}/{a} and .../{a}_to_{b}: stage 2 goes on with the optimizer
    and rate of its stage 1.  Raises LetheError for fewer than two tasks, unknown ones, and rates that share a folder.
    """
    tasks = list(dict.fromkeys(tasks))
    if len(tasks) < 2 and pairs is None:
        raise LetheError(f"an optimizer comparison needs two tasks, a first and a second; name two with --datasets, not {tasks}")
    for task in tasks:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", task):
            raise LetheError(f"task name '{task}' cannot be a folder; use letters, digits, '_', '-', '.'")
    chosen = parse_pairs(f"{tasks[0]}:{tasks[1]}" if pairs is None else pairs, tasks)
    settings: dict[str, dict] = {}  # arm -> what its runs change
    for name, rates in comparison.items():
        for rate in dict.fromkeys(rates):
            arm = f"{name}_lr{rate:g}"
            if arm in settings:
                raise LetheError(
                    f"comparison: {name}'s learning rates {rates} are not told apart in the folder name {arm}; use fewer digits"
                )
            settings[arm] = {"optimizer.name": name, "learning_rate": rate}
    if not settings:
        raise LetheError("comparison: no learning rate; write comparison: {adamw: [0.001], muon: [0.001]}")
    runs = []
    for first in dict.fromkeys(a for a, _ in chosen):
        runs += [Run(1, arm, first, None, f"optimizer/{arm}/{first}", None, changes=dict(more)) for arm, more in settings.items()]
    for a, b in chosen:
        runs += [Run(2, arm, a, b, f"optimizer/{arm}/{a}_to_{b}", f"optimizer/{arm}/{a}", changes=dict(more))
                 for arm, more in settings.items()]  # fmt: skip
    owners: dict[str, Run] = {}
    for run in runs:
        other = owners.setdefault(run.folder.lower(), run)  # lower: some file systems do not tell A from a
        if other is not run:
            raise LetheError(f"two runs want the folder {run.folder}: {other.task} and {run.task}; rename a task")
    return runs


def report_comparison(root: str | Path, quiet: bool = False) -> dict:
    """Writes all results of the comparison in `root` (over its seeds), prints the tables, returns what final_results.json holds.

    logs/ (the files and pictures of seed 001, and frontier.png), tensorboard_logs, and last eval_results_optimizers.json.
    Equal folders give equal bytes.  Raises LetheError where no optimizer and rate has all its states scored on both tasks.
    """
    root = Path(root)
    scored = read_study(root)
    rows, pairs = result_rows(scored), []
    for first, second in pairs_of(scored):
        points = points_of(scored, first, second)
        if points:
            pairs.append(_results_of(points, chosen_of(points)))
    if not pairs:
        raise LetheError(f"{root}: no optimizer has both its stages trained and scored yet; run the same training command again")
    results = {"metric": "exact_match", "about": ABOUT, "pairs": pairs}
    if not quiet:  # first: a folder that cannot be written to still has its table
        print("\n" + comparison_table(results), flush=True)
    write_logs(root, scored, rows)
    pictures = draw_comparison(scored, pairs, root / "logs")
    write_json(root / "logs" / "final_results.json", results)
    write_json(root / "eval_results_optimizers.json", {"results": rows})  # last: what is newer has not been reported
    if not quiet:
        print(f"\nresults    {root / 'logs' / 'final_results.json'}, {root / 'eval_results_optimizers.json'}")
        print(f"pictures   {root / 'logs'}/ ({', '.join(path.stem for path in pictures)})")
        print(f"curves     tensorboard --logdir {root}")
    return results


def _results_of(points: list[Point], chosen: dict[str, Point]) -> dict:
    """One pair of tasks: its points, and the first two optimizers paired at their chosen rates and at matched learning."""
    told = [describe(point, chosen.get(point.optimizer) is point) for point in points]
    names, paired = list(dict.fromkeys(point.optimizer for point in points)), None
    one, other = (names + [None, None])[:2]
    if one in chosen and other in chosen:
        paired = {"one": one, "other": other,
                  "learning_rates": [chosen[one].learning_rate, chosen[other].learning_rate],
                  "differences": contrast(chosen[one], chosen[other])}  # fmt: skip
    together = {"one": one, "other": other, "at": matched(points, one, other)} if other else None
    return {"first": points[0].first, "second": points[0].second, "points": told, "paired": paired, "matched_learning": together}


def comparison_table(results: dict) -> str:
    """The comparison in text, at most 110 columns: every point, the same in other measures, the paired differences."""
    return "\n\n".join(text for pair in results["pairs"] for text in _tables(pair))


def _around(found: dict) -> str:
    """ "49.6 ±3.2" in percent, the wider side of the wider interval."""
    value, low, high = whisker(found)
    return f"{value:.1f} ±{max(high - value, value - low):.1f}"


def _tables(pair: dict) -> list[str]:
    first, second, points = pair["first"], pair["second"], pair["points"]
    n = [points[0]["states"]["base"][task]["n"] for task in (first, second)]
    seeds = sorted({len(point["seeds"]) for point in points})
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    head = f"A = {first} ({n[0]} test items), then B = {second} ({n[1]})\nexact match in %, 95 % intervals, seeds: {over}"
    main, more = [], []
    for point in points:
        who = [point["optimizer"], f"{point['learning_rate']:g}" + ("*" if point["chosen"] else "")]
        at = [point["states"][state] for state in STATES]
        a, b = ([f"{100 * state[task]['exact_match']:.1f}" for state in at] for task in (first, second))
        drift = point["drift"]["after_stage2"]
        size = drift.get("relative_frobenius")
        main.append([*who, *a, *b, *(_around(point["intervals"][what]) for what in ("F_abs", "L_B")),
                     drift.get("kl", {}).get(second), "-" if size is None else f"{100 * size:.2f}"])  # fmt: skip
        flexible = [f"{100 * at[k][task]['flexible_match']:.1f}" for k, task in ((1, first), (2, first), (2, second))]
        nll = [f"{at[k][task]['answer_nll']:.3f}" for k, task in ((1, first), (2, first), (2, second))]
        kept = "-" if point["F_rel"] is None else f"{100 * point['F_rel']:.1f}"
        f1 = [f"{100 * at[2][task]['f1']:.1f}" if "f1" in at[2][task] else "-" for task in (first, second)]
        seed = [f"{100 * point[name]:.1f}" for name in ("F_base", "forward_transfer", "performance_gap")]
        more.append([*who, *flexible, *nll, kept, *seed, *f1])
    headers = ["optimizer", "rate", "A base", "A st.1", "A st.2", "B base", "B st.1", "B st.2", "lost F_abs", "learned L_B"]
    notes = "st.1, st.2: after stage 1, 2. KL to the base on B in nats a token; dW: change of the weights, relative"
    if any(point["chosen"] for point in points):
        notes += "\n* the optimizer's rate with the least loss on rows kept from training and test"
    tables = [f"{head}\n" + filled_table(_told(main), [*headers, "KL", "dW %"]) + "\n" + notes]
    headers = ["optimizer", "rate", "A1 flex", "A2 flex", "B2 flex", "A1 nll", "A2 nll", "B2 nll", "F_rel", "F_base", "fwd", "gap"]
    words = "The same in other measures (1, 2: after stage 1, 2; fwd: forward transfer; gap says nothing of forgetting)"
    tables.append(f"{words}\n" + filled_table(more, [*headers, "A2 F1", "B2 F1"]))
    if pair["paired"] and pair["paired"]["differences"]:
        tables.append(_paired_table(pair["paired"]))
    if pair["matched_learning"]:
        tables.append(_matched_line(pair["matched_learning"]))
    return tables


def _told(rows: list[list]) -> list[list[str]]:
    return [["-" if value is None else f"{value:.3f}" if isinstance(value, float) else value for value in row] for row in rows]


def _known(value: float | None) -> bool:
    return value is not None and value == value  # a file has null where there was NaN


def _paired_table(paired: dict) -> str:
    rows = []
    for name, found in paired["differences"].items():
        scale, digits = (1, ".3f") if name.endswith("nll") else (100, ".1f")
        value, low, high = (f"{scale * found[part]:+{digits}}" for part in ("difference", "low", "high"))
        seeds, exact = _known(found["seed_low"]), _known(found["p"])
        around = f"{scale * found['seed_low']:+{digits}} to {scale * found['seed_high']:+{digits}}" if seeds else "-"
        p = found["p"] if exact else found["p_bootstrap"]
        alone = f"{found['only_b']} / {found['only_a']}" if exact else "-"
        rows.append([name, value, f"{low} to {high}", around, f"{p:.4f}" if p >= 1e-4 else "<0.0001", alone])
    one, other = (NAMES.get(paired[key], paired[key]) for key in ("one", "other"))
    rates = "{:g} and {:g}".format(*paired["learning_rates"])
    headers = ["", "difference", "95 % over items", "95 % over seeds", "p", "up / down"]
    head = f"{one} - {other} at the chosen rates ({rates}) on the same items; up / down: scores one side had alone\n"
    return head + "p: exact, by item (one seed: McNemar's), for nll by the bootstrap\n" + filled_table(rows, headers)


def _matched_line(found: dict) -> str:
    names, at = [NAMES.get(found[key], found[key]) for key in ("one", "other")], found["at"]
    if at is None:
        return f"At matched learning: {names[0]} and {names[1]} nowhere learn B equally well, or not at all; add rates to the sweep"
    level, one, other, gap, low, high = (100 * at[key] for key in ("learning", found["one"], found["other"], "difference", "low", "high"))
    line = (f"At matched learning ({level:+.1f} points on B): {names[0]} loses {one:.1f}, {names[1]} {other:.1f} points of A;\n"
            f"difference {gap:+.1f} (95 % over items {low:+.1f} to {high:+.1f}")  # fmt: skip
    return line + (")" if at["resolved"] > 0.95 else f"; in {at['resolved']:.0%} of the rounds only did the two meet)")
