"""What will training on a data set do? python -m features.predict --features F.csv --outcomes RESULT.json [--new G.csv]

Learns an outcome (--target) of data sets from their features, with LightGBM. Data sets of one family (--group; by default the name
without what follows its first number or _chunk, _part ...) are never on both sides of a split. Judged on data sets that were not
learned from: one split from 200 rows on, five folds below. Baselines on the same rows stand beside it: the size alone, the initial
loss alone, ridge, the mean. The interval is split conformal with the finite-sample rank: a new data set of the same kind lies in it
with --coverage. The saved predictor (model.txt, LightGBM's text, and model.json) is fitted anew on all rows; a new data set with a
feature outside what these showed is refused by name, unless --extrapolate.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from features.judge import Judged, Problem, flags, judge, parts_of, pose
from features.outcomes import NAME, Parser, Table, load, plain, read_table
from features.regression import Range, beyond, conformal_width, fit_trees, intervals, least_calibration, lightgbm, ranges
from metrics.statistics import Z, wilson_interval
from study.errors import LetheError, run_command
from study.folder import read_json, write_json, write_text
from study.logging import format_table

MANY = 200  # rows from which one split has test rows enough


@dataclass
class Predictor:
    """LightGBM's trees and what is needed beside them. half: half the interval's width; settings: hashes of the features' settings."""

    trees: object
    target: str
    scale: float
    unit: str
    coverage: float
    half: float
    ranges: dict[str, Range]
    settings: list[str]

    def save(self, folder: Path, **more) -> None:
        """folder/model.txt and, last, model.json."""
        text = self.trees.model_to_string()
        write_text(folder / "model.txt", text)
        kept = {key: value for key, value in vars(self).items() if key not in ("trees", "ranges", "half")}
        kept["half"] = None if math.isinf(self.half) else self.half
        kept["ranges"] = {name: asdict(span) for name, span in self.ranges.items()}
        write_json(folder / "model.json", kept | {"model_sha256": hashlib.sha256(text.encode()).hexdigest()} | more)

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """LetheError where a file is missing, damaged, or not of the other."""
        folder = Path(folder)
        about = read_json(folder / "model.json")
        try:
            text = (folder / "model.txt").read_text(encoding="utf-8")
            spans = {name: Range(**span) for name, span in about["ranges"].items()}
            half = math.inf if about["half"] is None else float(about["half"])
            rest = [about[key] for key in ("target", "scale", "unit", "coverage")]
            whole = about["model_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise LetheError(f"{folder}: no predictor ({error!r}); --features F.csv --out {folder} makes one") from None
        if not whole:
            raise LetheError(f"{folder}: model.txt is not the one that model.json was written with; make the predictor again")
        return cls(lightgbm().Booster(model_str=text), *rest, half, spans, list(about.get("settings", [])))

    def predict(self, table: Table, extrapolate: bool = False) -> list[dict]:
        """A dict a row: dataset_name, predicted, low, high (NaN where refused), outside: what the training rows never showed."""
        missing = [name for name in self.ranges if name not in table.numbers]
        if missing:
            raise LetheError(f"{table.path}: no column of numbers called {', '.join(missing)}, which the predictor was fitted with")
        x = np.stack([table.numbers[name] for name in self.ranges], axis=1)
        hashes, found = table.words.get("settings_hash", [""] * len(table)), []
        for name, row, value, settings in zip(table.words[NAME], x, self.trees.predict(x).tolist(), hashes, strict=True):
            outside = beyond(row, self.ranges)
            if self.settings and settings not in self.settings:
                outside.append("the features were made with other settings")
            told = value if extrapolate or not outside else math.nan
            found.append({NAME: name, "predicted": told, "low": told - self.half, "high": told + self.half, "outside": "; ".join(outside)})
        return found


def fit(problem: Problem, coverage: float, seed: int) -> Predictor:
    """The predictor to keep: of all rows, split into train, validation and calibration only."""
    joined, generator = problem.joined, np.random.default_rng(seed)
    train, validation, calibration = parts_of(problem, np.arange(len(problem.y)), coverage, generator)
    trees = fit_trees(problem.x, problem.y, problem.features, train, validation, seed)
    half = conformal_width(problem.y[calibration] - trees.predict(problem.x[calibration]), coverage)
    spans = ranges(problem.x, problem.features, trees.feature_importance("gain"))
    settings = sorted({word for word in joined.table.words.get("settings_hash", []) if word})
    return Predictor(trees, joined.target, joined.scale, joined.unit, coverage, half, spans, settings)


def noise(problem: Problem) -> float:
    """RMSE that the outcomes' own 95 % intervals leave to a perfect predictor; NaN where they have none."""
    half = (problem.joined.high - problem.joined.low) / 2
    half = half[np.isfinite(half)]
    return float(np.sqrt(((half / Z) ** 2).mean())) if len(half) else math.nan


def held(judged: Judged, truth: np.ndarray, level: float) -> tuple[int, int]:
    """(test rows inside their interval, test rows)."""
    inside = np.abs(truth - np.array(judged.fits["trees"])) <= np.array(judged.half[level])
    return int(inside.sum()), len(inside)


def calibration_tables(problem: Problem, judged: Judged) -> tuple[list[list], list[list]]:
    """([asked, half width, inside, n, share, low, high], a row a coverage); ([from, to, n, mean predicted, mean true], by prediction)."""
    truth, predicted, scale = problem.y[judged.rows], np.array(judged.fits["trees"]), problem.joined.scale
    levels = []
    for level in judged.half:
        inside, n = held(judged, truth, level)
        low, high = wilson_interval(inside, n)
        levels.append([level, float(np.mean(judged.half[level])) * scale, inside, n, inside / n, low, high])
    bins = []
    for rows in np.array_split(np.argsort(predicted, kind="stable"), max(1, min(5, len(truth) // 6))):
        some = predicted[rows] * scale
        bins.append([float(some.min()), float(some.max()), len(rows), float(some.mean()), float(truth[rows].mean() * scale)])
    return levels, bins


def table_of(rows: list[list], heads: list[str]) -> str:
    """A CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([heads, *[[plain(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]])
    return file.getvalue()


def report(problem: Problem, judged: Judged, found: dict, coverage: float, folds: int) -> str:
    """All that is printed of how good it is."""
    joined, truth = problem.joined, problem.y[judged.rows]
    scale, unit, families = joined.scale, joined.unit and f" {joined.unit}", len(set(problem.groups))
    train, validation, calibration = judged.sizes
    lines = [f"{len(problem.y)} data sets of {families} families, {len(problem.features)} features; {joined.target}: "
             f"mean {problem.y.mean() * scale:.2f}{unit}, standard deviation {problem.y.std() * scale:.2f}"]  # fmt: skip
    lines += [f"  {note}" for note in joined.notes + problem.left_out]
    split = "one split" if folds == 1 else f"{folds} folds"
    use = f"{train} to fit, {validation} to stop, {calibration} to calibrate"
    lines.append(f"{split}, no family on both sides: {len(truth)} test rows; {use}")
    if families < 10:
        lines.append(f"  only {families} families: every interval here is rough")
    if not math.isnan(floor := noise(problem) * scale):
        lines.append(f"  the outcomes' own 95 % intervals leave an RMSE of {floor:.2f}{unit} to a perfect predictor")

    def cell(triple: tuple, times: float = 1.0, digits: int = 2) -> str:
        value, low, high = (x * times for x in triple)
        return "-" if math.isnan(value) else f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    heads = ["fit", f"RMSE,{unit}" if unit else "RMSE", "R2", "r"] + (["within 1", "2", "3 points"] if unit else [])
    rows = [[name, cell(one["rmse"], scale), cell(one["r2"]), cell(one["pearson"])]
            + ([f"{one[f'acc{k}'][0]:.2f}" for k in (1, 2, 3)] if unit else []) for name, one in found.items()]  # fmt: skip
    lines += ["", format_table(rows, heads), "in brackets: 95 %, bootstrap over families", verdict(found, scale, unit), ""]
    inside, n = held(judged, truth, coverage)
    low, high = wilson_interval(inside, n)
    half = np.array(judged.half[coverage]) * scale
    if np.isinf(half).all():
        needed = least_calibration(coverage)
        lines.append(f"no finite interval: {100 * coverage:g} % needs {needed} calibration rows, and there are {calibration}")
    else:
        asked = f"asked to hold {100 * coverage:g} % ({100 * np.mean(judged.due):.1f} as ranks are whole)"
        share = f"{100 * inside / n:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"interval of ±{half.mean():.2f}{unit}, {asked}: held {inside} of {n}, {share}")
    levels, bins = calibration_tables(problem, judged)
    lines += [format_table([[f"{row[0]:g}", *row[1:]] for row in levels], ["asked", "half width", "inside", "of", "share", "low", "high"])]
    lines += ["", format_table(bins, ["predicted from", "to", "n", "mean predicted", "mean true"])] if bins else []
    out = np.array([bool(words) for words in judged.outside])
    if out.any():
        error = np.abs(truth - np.array(judged.fits["trees"])) * scale
        beside = f", of the others {error[~out].mean():.2f}" if not out.all() else ""
        lines.append(f"\n{out.sum()} of {n} test rows would be refused as new ones: a feature is outside what their training rows showed")
        lines.append(f"  their mean error is {error[out].mean():.2f}{unit}{beside}")
    lines += [f"LEAK? {words}" for words in flags(problem, judged)]
    return "\n".join(lines)


def verdict(found: dict, scale: float, unit: str) -> str:
    """The trees against the best of the others, by RMSE on the same rows."""
    best = min((name for name in found if name != "trees"), key=lambda name: found[name]["rmse"][0])
    less, low, high = (scale * value for value in found[best]["rmse_less"])
    if low > 0:
        return f"the trees' RMSE is {less:.2f}{unit} smaller than that of the best baseline, {best} (95 %: {low:.2f} to {high:.2f})"
    if high < 0:
        return f"the best baseline, {best}, is nearer than the trees: by {-less:.2f}{unit} of RMSE (95 %: {-high:.2f} to {-low:.2f})"
    return f"the trees cannot be told from the best baseline, {best}: its RMSE is {less:+.2f}{unit} (95 %: {low:+.2f} to {high:+.2f})"


def write_all(out: Path, problem: Problem, judged: Judged, found: dict, predictor: Predictor, about: dict) -> None:
    """Tables, pictures, then the predictor; about: the settings that model.json keeps of the judgement."""
    from features.pictures import importance_figure, predicted_figure  # matplotlib takes a second
    from study.plots import _save

    joined, coverage, flagged = problem.joined, predictor.coverage, flags(problem, judged)
    truth, predicted, half = problem.y[judged.rows], np.array(judged.fits["trees"]), np.array(judged.half[coverage])
    low, high = (predicted - half).tolist(), (predicted + half).tolist()
    names, families = ([values[k] for k in judged.rows] for values in (joined.names, problem.groups))
    columns = (names, families, judged.fold, truth.tolist(), predicted.tolist(), low, high, judged.outside)
    heads = [NAME, "family", "fold", joined.target, "predicted", "low", "high", "outside"]
    write_text(out / "predictions.csv", table_of([list(row) for row in zip(*columns, strict=True)], heads))
    levels, bins = calibration_tables(problem, judged)
    write_text(out / "calibration.csv", table_of(levels, ["asked", "half_width", "inside", "n", "share", "low", "high"]))
    gain, shuffled = np.array([span.gain for span in predictor.ranges.values()]), np.array(judged.importance)
    _save(importance_figure(problem.features, gain, shuffled * joined.scale, joined), out / "importance.png")
    _save(predicted_figure(joined, truth, predicted, half, coverage, found["trees"]), out / "predicted.png")
    by_fold = dict(zip(problem.features, shuffled.T.tolist(), strict=True))
    about |= {"rows": len(problem.y), "families": len(set(problem.groups)), "scores": found, "noise": noise(problem), "by_prediction": bins}
    about |= {"shuffled_importance": by_fold, "flags": flagged, "left_out": joined.notes + problem.left_out}
    predictor.save(out, judgement=about)


def predict_new(predictor: Predictor, path: str, out: Path, extrapolate: bool) -> None:
    table = read_table(path)
    rows = predictor.predict(table, extrapolate)
    scale, unit = predictor.scale, predictor.unit and f", {predictor.unit}"
    heads = [NAME, "predicted", "low", "high", "outside"]
    write_text(out / "predictions_new.csv", table_of([list(row.values()) for row in rows], heads))
    shown = []
    for row in rows:
        cells = [row[key] * scale for key in heads[1:4]]
        shown.append([row[NAME], *(["refused"] * 3 if math.isnan(cells[0]) else [f"{cell:.2f}" for cell in cells])])
    for note in table.notes:
        print(f"  {note}")
    print(format_table(shown, ["data set", f"{predictor.target}{unit}", f"low, {100 * predictor.coverage:g} %", "high"]))
    for row in rows:
        if row["outside"]:
            print(f"{'BEYOND THE TRAINING ROWS' if extrapolate else 'refused'}: {row[NAME]}: {row['outside']}")
    refused = sum(math.isnan(row["predicted"]) for row in rows)
    print(f"wrote {out / 'predictions_new.csv'}")
    if refused == len(rows):
        raise LetheError(f"all {refused} data sets of {path} lie outside what the predictor saw; --extrapolate predicts all the same")


def main(argv: list[str] | None = None) -> None:
    words = "What training on a data set will do, from its features."
    parser = Parser(prog="python -m features.predict", allow_abbrev=False, description=words)
    parser.add_argument("--features", metavar="F.csv", help="the table of python -m features")
    parser.add_argument("--outcomes", metavar="FILE", nargs="+", help="result JSON or CSV; without: the target is a column of F.csv")
    parser.add_argument("--target", default="overall_accuracy", help="overall_accuracy (default), change, ...")
    parser.add_argument("--group", metavar="COLUMN", help="data sets with the same value stay together; default: the family, by name")
    parser.add_argument("--drop", metavar="A,B", default="", help="columns that are not to be used")
    parser.add_argument("--coverage", type=float, default=0.86, help="of the interval (default: 0.86)")
    parser.add_argument("--folds", type=int, default=0, help=f"1: one split; default: 1 from {MANY} rows on, else 5")
    parser.add_argument("--seed", type=int, default=36)
    parser.add_argument("--out", metavar="DIR", help="default: out/predictor, or the folder of --model")
    parser.add_argument("--new", metavar="G.csv", help="features of data sets to predict")
    parser.add_argument("--model", metavar="DIR", help="a predictor that was made before; with --new alone")
    parser.add_argument("--extrapolate", action="store_true", help="predict also beyond the range of the training rows; flagged")
    args = parser.read(sys.argv[1:] if argv is None else argv)
    if args.model:
        if args.features or args.outcomes or not args.new:
            raise LetheError("--model DIR predicts the data sets of --new G.csv; to fit a predictor give --features and no --model")
        return predict_new(Predictor.load(args.model), args.new, Path(args.out or args.model), args.extrapolate)
    if not args.features:
        raise LetheError("which features? --features F.csv --outcomes RESULT.json fits a predictor, --model DIR --new G.csv uses one")
    if not 0 < args.coverage < 1 or args.folds < 0:
        raise LetheError(f"--coverage must lie between 0 and 1, --folds be 1 or more, not {args.coverage:g} and {args.folds}")
    lightgbm()
    problem = pose(load(args.features, args.outcomes, args.target), args.group, [name for name in args.drop.split(",") if name])
    folds, out = args.folds or (1 if len(problem.y) >= MANY else 5), Path(args.out or "out/predictor")
    judged = judge(problem, folds, args.coverage, args.seed)
    groups = [problem.groups[k] for k in judged.rows]
    points = problem.joined.scale if problem.joined.unit else None
    fits = {name: np.array(values) for name, values in judged.fits.items()}
    found = intervals(problem.y[judged.rows], fits, groups, points, args.seed)
    found["mean"]["pearson"] = (math.nan,) * 3  # over folds it varies only because each leaves its own test rows out
    print(report(problem, judged, found, args.coverage, folds))
    predictor = fit(problem, args.coverage, args.seed)
    write_all(out, problem, judged, found, predictor, {"folds": folds, "seed": args.seed})
    print(f"\nwrote {out}/: predictions.csv, calibration.csv, importance.png, predicted.png, model.txt, model.json")
    if args.new:
        predict_new(predictor, args.new, out, args.extrapolate)


if __name__ == "__main__":
    sys.exit(run_command(main))
