"""Did a cheap feature foresee what training did? python -m features.relate --features F.csv --outcomes RESULT.json --feature forgetting

Spearman's rank correlation between a feature of each data set and the measured outcome, with a bootstrap interval over data sets, a
permutation p and Kendall's tau-b, and a picture with the outcomes' own 95 % intervals. --feature all: every feature, Holm's p.
Nothing is selected: what is printed is what was found, whatever it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from features.outcomes import Joined, Parser, load
from features.ranks import LEAST, Relation, holm, relate
from study.errors import LetheError, run_command
from study.folder import write_json
from study.logging import format_table
from study.plan import nearest


def sentence(one: Relation, target: str) -> str:
    """What the interval says, and no more."""
    if one.rho != one.rho:
        return f"no rank correlation: {one.n} data sets have both ({LEAST} at least), and both must vary"
    if one.low <= 0 <= one.high:
        return "the interval holds 0: on these data sets the feature does not tell the outcome's order"
    return f"data sets with more {one.feature} came out {'higher' if one.rho > 0 else 'lower'} in {target}"


def report(found: list[Relation], joined: Joined) -> str:
    rows = [[one.feature, one.n, one.empty, one.rho, one.low, one.high, one.tau, one.p] + ([one.holm] if len(found) > 1 else [])
            for one in found]  # fmt: skip
    heads = ["feature", "n", "empty", "rho", "low", "high", "tau-b", "p"] + (["Holm p"] if len(found) > 1 else [])
    lines = [f"{len(joined.truth)} data sets with features and {joined.target}"] + [f"  {note}" for note in joined.notes]
    lines += [format_table(rows, heads), "rho: Spearman's, with a 95 % bootstrap interval over data sets; p: permutations of the outcome"]
    if len(found) == 1:
        return "\n".join([*lines, sentence(found[0], joined.target)])
    tested = sum(one.p == one.p for one in found)
    sure = [one.feature for one in found if one.holm < 0.05]
    by_chance = f"{tested} features were tested, so about {0.05 * tested:.1f} of them have p below 0.05 by chance alone"
    return "\n".join([*lines, f"{by_chance}; Holm's p below 0.05: {', '.join(sure) or 'none'}"])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m features.relate", allow_abbrev=False, description="A feature of data sets against measured outcomes.")
    parser.add_argument("--features", metavar="F.csv", required=True, help="the table of python -m features")
    parser.add_argument("--outcomes", metavar="FILE", nargs="+", help="result JSON or CSV; without: the target is a column of F.csv")
    parser.add_argument("--feature", default="forgetting", help="a column of F.csv, or all (default: forgetting)")
    parser.add_argument("--target", default="change", help="change (default), overall_accuracy, ...")
    parser.add_argument("--out", metavar="picture.png", help="the picture; the numbers go beside it, picture.json")
    parser.add_argument("--seed", type=int, default=36, help="of bootstrap and permutations")
    args = parser.read(sys.argv[1:] if argv is None else argv)
    if args.out and Path(args.out).suffix.lower() != ".png":
        raise LetheError(f"--out {args.out}: the picture is a PNG; call it {Path(args.out).with_suffix('.png')}")
    joined = load(args.features, args.outcomes, args.target)
    known = [name for name in joined.table.numbers if name not in joined.targets]
    if args.feature != "all" and args.feature not in known:
        raise LetheError(f"--feature {args.feature}: no such column of numbers in {args.features}{nearest(args.feature, known)}")
    wanted = known if args.feature == "all" else [args.feature]
    found = [relate(name, joined.table.numbers[name], joined.truth, args.seed) for name in wanted]
    found = sorted(holm(found), key=lambda one: (one.rho != one.rho, -abs(one.rho)))
    print(report(found, joined))
    if all(one.rho != one.rho for one in found):
        raise LetheError(f"no rank correlation: {len(joined.truth)} data sets ({LEAST} at least must have both), and both must vary")
    if args.out:
        from features.pictures import relation_figure, relations_figure  # matplotlib takes a second
        from study.plots import _save

        drawn = [one for one in found if one.rho == one.rho]
        picture = relations_figure(drawn, joined) if args.feature == "all" else relation_figure(found[0], joined)
        _save(picture, Path(args.out))
        about = {"features": args.features, "outcomes": args.outcomes, "target": args.target, "seed": args.seed, "left_out": joined.notes}
        write_json(Path(args.out).with_suffix(".json"), about | {"relations": [one._asdict() for one in found]})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
