"""Sequences of tasks: their runs and folders, what R says of an arm, the table and the pictures."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from tiny import TASKS, one_line

from metrics.statistics import wilson_interval
from study.config import parse
from study.errors import LetheError
from study.folder import append_jsonl, read_json, write_json
from study.plan import Run, title_of
from study.report import is_reported, report
from study.sequence import (
    ARMS,
    METRICS,
    Sequence,
    by_arm,
    matrix_record,
    order_name,
    over,
    parse_orders,
    parse_rehearsal,
    plan_sequences,
    read_sequences,
    sequence_table,
)
from study.sequence_plots import LOOKS, draw_sequences

GOLDEN = np.array([[50, 10, 5], [40, 60, 8], [45, 55, 70]], dtype=float)


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_orders():
    tasks = ["a", "b", "c"]
    assert parse_orders("a,b,c", tasks) == [["a", "b", "c"]]
    assert parse_orders(" c , a ; a,b,c;; c,a ", tasks) == [["c", "a"], ["a", "b", "c"]]  # each once
    assert parse_orders("a,b,a", tasks) == [["a", "b", "a"]]  # a task that comes again
    for text, told in (
        ("a,b,d", "'d' is not among the tasks of this study"),
        ("a", "name two tasks or more, none twice in a row"),
        ("a,b,b", "name two tasks or more, none twice in a row"),
        ("a,b;c", "--sequence c: name two tasks"),
        (" ; ,", "name two tasks or more"),
        (";", "names no task"),
        ("", "names no task"),
    ):
        with pytest.raises(LetheError, match=told) as error:
            parse_orders(text, tasks)
        assert "\n" not in str(error.value)
    with pytest.raises(LetheError, match="did you mean 'gsm8k'"):
        parse_orders("gsm8,b", ["gsm8k", "b"])


def test_arms():
    assert parse_rehearsal(None) == parse_rehearsal("all") == list(ARMS)
    assert parse_rehearsal(" ssr,none, ssr") == ["ssr", "none"]
    with pytest.raises(LetheError, match="unknown arm 'srr'; did you mean 'ssr'"):
        parse_rehearsal("none,srr")
    with pytest.raises(LetheError, match="names no arm; known are none, random"):
        parse_rehearsal(",")


def test_runs_and_their_folders():
    runs = plan_sequences([["a", "b", "c"], ["a", "c"], ["c", "a"]], ["none", "ssr", "mtl"], "highest")
    by_folder = {run.folder: run for run in runs}
    assert len(by_folder) == len(runs) == 2 + 3 * 2 + 2 * 2 + 1  # two first tasks; mtl is one run
    assert [folder for folder in by_folder if folder.startswith("lora_base")] == ["lora_base/a", "lora_base/c"]
    third = by_folder["sequence/ssr/a,b,c/3_c"]
    assert (third.stage, third.arm, third.task, third.past, third.order) == (3, "ssr", "c", ("a", "b"), "a,b,c")
    assert third.parent == "sequence/ssr/a,b,c/2_b" and by_folder[third.parent].parent == "lora_base/a"
    assert by_folder["sequence/none/a,c/2_c"].parent == "lora_base/a" and by_folder["sequence/none/c,a/2_a"].parent == "lora_base/c"
    joint = by_folder["sequence/mtl/a,b,c/3_joint"]
    assert joint.parent is None and joint.past == ("a", "b") and "sequence/mtl/a,b,c/2_b" not in by_folder
    place = {run.folder: number for number, run in enumerate(runs)}
    assert all(run.parent is None or place[run.parent] < place[run.folder] for run in runs)
    assert {run.mask for run in runs} == {"highest"}
    assert title_of(third) == "a > b > c  ssr"


def test_an_order_is_known_by_its_tasks_wherever_it_stands():
    """Else, of two commands in one folder, the second would take the first's runs for its own."""

    def folders(text):
        return {run.folder for run in plan_sequences(parse_orders(text, "abc"), ["none"], "none") if run.order}

    assert folders("a,b,c;c,a,b") == folders("c,a,b;a,b,c") == folders("a,b,c") | folders("c,a,b")
    assert not folders("a,b,c") & folders("a,c,b") and not folders("a,b") & folders("a,b,c")
    names = [f"a_task_of_a_long_name_{number}" for number in range(10)]
    with pytest.raises(LetheError, match="give the tasks shorter names"):
        plan_sequences([names], ["none"], "none")
    real = [f"superni_{key}" for key in ("qa", "qg", "sa", "sum", "trans", "dsg", "expl", "para", "pe", "pos")]
    folder = plan_sequences([real], ["self_output"], "none")[-1].folder
    assert len(folder.replace("/", "__")) < 250  # as TensorBoard's folder is called


def test_a_task_that_comes_again():
    runs = plan_sequences([["a", "b", "a"]], ["none"], "none")
    assert [run.folder for run in runs] == ["lora_base/a", "sequence/none/a,b,a/2_b", "sequence/none/a,b,a/3_a"]
    assert runs[2].parent == runs[1].folder and runs[2].past == ("a", "b") and title_of(runs[2]) == "a > b > a  none"
    R, half = np.array([[0.9, 0.2], [0.4, 0.8], [0.95, 0.5]]), np.array([[0.01, 0.02], [0.03, 0.04], [0.05, 0.06]])
    one = Sequence("none", "a,b,a", ["a", "b", "a"], 0, R, half, np.array([0.1, 0.1]), {})
    assert one.tasks == ["a", "b"] and one.trained == [0, 1, 0]
    found = one.metrics()
    assert found["AR"] == pytest.approx(0.725) and found["learning"] == pytest.approx((0.8 + 0.7) / 2)
    assert found["BWT"] == pytest.approx(-0.3) == -found["forgetting"]  # of b alone: a has just been trained
    assert found["FWT"] == pytest.approx(0.1) and found["revisit"] == pytest.approx(-0.5) and found["relearned"] == pytest.approx(0.05)
    assert one.half_of("BWT") == one.half_of("forgetting") == pytest.approx(math.hypot(0.06, 0.04))
    assert one.half_of("learning") == pytest.approx(math.hypot(0.01, 0.04) / 2)
    assert one.half_of("revisit") == pytest.approx(math.hypot(0.03, 0.01))
    assert one.half_of("relearned") == pytest.approx(math.hypot(0.05, 0.01))
    assert one.half_of("AR") == pytest.approx(math.hypot(0.05, 0.06) / 2)
    table = sequence_table([one]).splitlines()
    assert table[0].startswith("Sequences of 3 stages") and table[1].split()[:8] == ["arm", *METRICS]
    assert "-50.0" in table[3] and not {"revisit", "relearned"} & set(sequence_table([sequence(GOLDEN / 100)]).split())
    assert matrix_record([one])["sequences"][0]["stages"] == ["a", "b", "a"]


def test_what_follows_from_the_flag(tmp_path):
    config = parse(["--sequence", "x,y;z,x"])
    assert (config.study, config.mask, config.datasets) == ("sequences", "none", "x,y,z"), "configs/nano.yaml names other tasks"
    assert "sequences" in config.out
    assert parse(["--sequence", "x,y", "--datasets", "x=a.jsonl,y,z"]).datasets == "x=a.jsonl,y,z"
    (tmp_path / "mine.yaml").write_text("model: toy\nsequence: y,x\ndatasets: z,x=a.jsonl,y\n")
    assert parse(["--config", str(tmp_path / "mine.yaml")]).datasets == "y,x=a.jsonl"
    for more in (["--pairs", "x:y"], ["--stage", "1"], ["--inspect", "1"], ["--mask", "none,highest"], ["--compare_optimizers"]):
        with pytest.raises(LetheError) as error:
            parse(["--sequence", "x,y", *more])
        assert more[0] in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(LetheError, match="study: sequences needs --sequence"):
        parse(["--study", "sequences"])
    (tmp_path / "arms.yaml").write_text("model: toy\narms: {highest: {learning_rate: 1.0e-3}}\n")
    with pytest.raises(LetheError, match="arms: are settings of masks that are compared"):
        parse(["--config", str(tmp_path / "arms.yaml"), "--sequence", "x,y"])
    sharded = ["--model", "toy", "--sequence", "x,y", "--full", "--shard", "model"]
    for arms in ([], ["--rehearsal", "all"], ["--rehearsal", "none, ewc"]):
        with pytest.raises(LetheError, match="ewc needs the gradients of single examples"):
            parse([*sharded, *arms])
    assert parse([*sharded, "--rehearsal", "none,l2"]).shard == "model"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sequence", "mini_svamp"], "name two tasks or more, none twice in a row"),
        (["--sequence", "mini_svamp,mini_svamp"], "none twice in a row"),
        (["--sequence", "mini_svamp,mini_simpelqa"], "mini_simpleqa"),
        (["--sequence", ",".join(TASKS), "--rehearsal", "none,srr"], "did you mean 'ssr'"),
        (["--sequence", ",".join(TASKS), "--rehearsal_share", "0"], "above 0, at most 1"),
        (["--sequence", ",".join(TASKS), "--rehearsal.share", "1.5"], "above 0, at most 1"),
        (["--sequence", ",".join(TASKS), "--demos", "1"], "2 or more"),
        (["--sequence", ",".join(TASKS), "--mask", "higest"], "did you mean 'highest'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(flags, told, tiny, tmp_path, capsys):
    assert told in one_line(["--model", tiny, "--out", str(tmp_path / "out"), *flags], capsys)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What R says


def sequence(R, arm="none", half=None, seed=0, base=None, tasks="abc", rows=None) -> Sequence:
    R = np.asarray(R, dtype=float)
    half = np.zeros_like(R) if half is None else np.asarray(half, dtype=float)
    base = np.zeros(R.shape[1]) if base is None else np.asarray(base, dtype=float)
    return Sequence(arm, ",".join(tasks), list(tasks), seed, R, half, base, rows or {})


def test_the_golden_matrix():
    found = sequence(GOLDEN).metrics()
    assert found["AR"] == pytest.approx(56.6667, abs=1e-4) and found["FWT"] == 9.0 and found["BWT"] == -5.0
    assert found["forgetting"] == 5.0 and found["learning"] == 60.0
    based = sequence(GOLDEN, base=[1, 2, 3]).metrics()
    assert based["FWT"] == 9.0 - 2.5 and based["learning"] == 60.0 - 2.0
    assert sequence(GOLDEN[-1:], "mtl", base=[1, 2, 3]).metrics() == {"AR": pytest.approx(170 / 3), "learning": pytest.approx(164 / 3)}


def test_half_widths_by_hand():
    half = np.array([[3, 9, 9], [9, 4, 9], [1, 2, 2]])
    one = sequence(GOLDEN, half=half)
    assert one.half_of("AR") == pytest.approx(math.sqrt(1 + 4 + 4) / 3)
    assert one.half_of("BWT") == one.half_of("forgetting") == pytest.approx(math.sqrt((1 + 9) + (4 + 16)) / 2)
    assert one.half_of("learning") == pytest.approx(math.sqrt(9 + 16 + 4) / 3)
    assert math.isnan(one.half_of("FWT"))
    joint = sequence(GOLDEN[-1:], "mtl", half=half[-1:])
    assert joint.half_of("AR") == joint.half_of("learning") == pytest.approx(1.0)
    assert math.isnan(joint.half_of("BWT")) and math.isnan(joint.half_of("FWT"))


def test_over_seeds_and_orders():
    """Student's interval over them, unless the test items alone allow no narrower one."""
    seeds = [sequence(GOLDEN + shift, seed=number) for number, shift in enumerate((-3, 0, 3))]
    mean, half = over(seeds, "AR")
    assert mean == pytest.approx(56.6667, abs=1e-4)
    assert half == pytest.approx(4.302653 * 3 / math.sqrt(3), rel=1e-4)  # t at 0.975 for two degrees of freedom
    assert over(seeds, "BWT") == (-5.0, pytest.approx(0.0))
    wide = [sequence(GOLDEN + shift, seed=number, half=np.full((3, 3), 30.0)) for number, shift in enumerate((-3, 0, 3))]
    assert over(wide, "AR")[1] == pytest.approx(30 / math.sqrt(3)) and 30 / math.sqrt(3) > half
    alone = sequence(GOLDEN, half=np.full((3, 3), 6.0))
    assert over([alone], "AR") == (pytest.approx(56.6667, abs=1e-4), pytest.approx(6 / math.sqrt(3)))
    assert over([alone], "FWT")[0] == 9.0 and math.isnan(over([alone], "FWT")[1])
    assert math.isnan(over([sequence(GOLDEN[-1:], "mtl")], "BWT")[0])


def test_table_and_record():
    rows = {"2_b": {"a": 10}, "3_c": {"a": 10, "b": 20}}
    found = [
        sequence(GOLDEN / 100, "ssr", np.full((3, 3), 0.06), rows=rows), sequence(GOLDEN / 100, "none", np.full((3, 3), 0.06)),
        sequence(GOLDEN[-1:] / 100, "mtl", np.full((1, 3), 0.06)),
    ]  # fmt: skip
    assert list(by_arm(found)) == ["none", "ssr", "mtl"]  # in the order of ARMS
    lines = sequence_table(found).splitlines()
    assert lines[0] == "Sequences of 3 stages, in %, 95 % intervals"
    words = {line.split()[0]: line.split() for line in lines[3:]}
    assert words["ssr"] == "ssr 56.7 ±3.5 -5.0 ±6.0 5.0 ±6.0 9.0 60.0 ±3.5 20 1".split()  # (10 + 30) / 2 rows a stage
    assert words["none"][-2:] == ["0", "1"] and words["mtl"] == "mtl 56.7 ±3.5 - - - 56.7 ±3.5 0 1".split()
    several = [*found, sequence(GOLDEN / 100, seed=1), sequence(GOLDEN / 100, tasks="cab"), sequence(GOLDEN[:2, :2] / 100, tasks="ab")]
    assert sequence_table(several).startswith("Sequences of 2 or 3 stages, in %, 95 % intervals; means over 4 orders and seeds\n")
    record = json.loads(json.dumps(matrix_record(found)))
    assert record["sequences"][0]["R"] == (GOLDEN / 100).tolist() and record["sequences"][0]["rehearsal"] == rows
    assert set(record["arms"]["ssr"]) == set(METRICS) and record["arms"]["ssr"]["BWT"]["mean"] == pytest.approx(-0.05)


# ----------------------------------------------------------------------------------------------------------------------
# From the folders


KINDS = {"a": "number", "b": "text", "c": "short"}
ITEMS = 20


def score(tree, folder, task, share) -> None:
    """Test items of a cell: `share` of them right; of free text, a ROUGE-L of that much."""
    items = [{"exact_match": i < share * ITEMS, "flexible_match": True, "string_match": False, "rougeL": share, "answer_nll": 1.0,
              "extracted": "1", "group": ""} for i in range(ITEMS)]  # fmt: skip
    append_jsonl(tree / folder / "eval" / f"{task}.jsonl", *items)


def study(tree, arms=("none", "mtl"), orders="a,b,c", seed=0) -> list[Run]:
    """What a finished study leaves, with R = GOLDEN for every order (in twentieths)."""
    runs = plan_sequences(parse_orders(orders, KINDS), list(arms), "none")
    for run in runs:
        told = {name: 5 for name in run.past} if run.arm == "mtl" else {}
        write_json(tree / run.folder / "run.json", {"status": "done", "run": run.__dict__, "rehearsal": told})
    for task in KINDS:
        score(tree, "base", task, 0.05)
        score(tree, "lora_base/a", task, GOLDEN[0]["abc".index(task)] / 100)
    for run in runs:
        for task in KINDS if run.order else ():
            score(tree, run.folder, task, GOLDEN[run.stage - 1][run.order.split(",").index(task)] / 100)
    write_json(tree / "study.json", {"kinds": KINDS, "tasks": {}, "identity": {"settings": {"study": "sequences", "seed": seed}}})
    return runs


def test_read_from_a_study(tmp_path):
    runs = study(tmp_path)
    found = {one.arm: one for one in read_sequences(tmp_path, 3, runs, KINDS)}
    none, joint = found["none"], found["mtl"]
    assert none.tasks == joint.tasks == ["a", "b", "c"] and none.seed == 3 and none.order == "a,b,c"
    exact = np.ceil(GOLDEN / 100 * ITEMS) / ITEMS  # b is free text: its ROUGE-L is what R holds
    exact[:, 1] = GOLDEN[:, 1] / 100
    assert np.allclose(none.R, exact) and np.allclose(joint.R, exact[-1:]) and np.allclose(none.base, 0.05)
    low, high = wilson_interval(10, ITEMS)
    assert none.half[0, 0] == pytest.approx(max(high - 0.5, 0.5 - low)) and none.half[2, 1] == 0  # all items alike
    assert joint.rows == {"3_joint": {"a": 5, "b": 5}} and none.rows == {"2_b": {}, "3_c": {}}


def test_a_sequence_with_a_missing_cell_is_left_out(tmp_path):
    runs = study(tmp_path, ("none", "ssr", "mtl"))
    assert [one.arm for one in read_sequences(tmp_path, 0, runs, KINDS)] == ["none", "ssr", "mtl"]
    (tmp_path / "sequence/ssr/a,b,c/2_b/eval/c.jsonl").unlink()
    assert [one.arm for one in read_sequences(tmp_path, 0, runs, KINDS)] == ["none", "mtl"]
    last = [run for run in runs if run.folder != "sequence/none/a,b,c/3_c"]  # cut before its last stage: that is no sequence of two
    assert [one.arm for one in read_sequences(tmp_path, 0, last, KINDS)] == ["mtl"]
    (tmp_path / "base/eval/a.jsonl").unlink()
    assert read_sequences(tmp_path, 0, runs, KINDS) == []


def test_report(tmp_path, capsys):
    study(tmp_path / "seed0", orders="a,b,c;a,c,b"), study(tmp_path / "seed1", orders="a,b,c;a,c,b", seed=1)
    report(tmp_path)
    told = capsys.readouterr().out
    assert "Sequences of 3 stages, in %, 95 % intervals; means over 4 orders and seeds" in told and str(tmp_path / "matrix.json") in told
    record = read_json(tmp_path / "matrix.json")
    assert sorted((one["seed"], one["order"], one["arm"]) for one in record["sequences"]) == [
        (seed, order, arm) for seed in (0, 1) for order in ("a,b,c", "a,c,b") for arm in ("mtl", "none")]  # fmt: skip
    assert is_reported(tmp_path)
    assert {path.name for path in (tmp_path / "sequence_plots").iterdir()} == {
        "matrix_a,b,c.png", "matrix_a,c,b.png", "stages_a,b,c.png", "stages_a,c,b.png", "kept_learned.png"}  # fmt: skip
    append_jsonl(tmp_path / "seed1/sequence/none/a,b,c/2_b/eval/d.jsonl", {})
    assert not is_reported(tmp_path)


def test_a_study_whose_sequences_have_not_ended(tmp_path):
    """It is told so, and not taken for one of masks, whose results would then hide those of the sequences."""
    runs = study(tmp_path)
    for run in runs[1:]:
        (tmp_path / run.folder / "run.json").unlink()
    with pytest.raises(LetheError, match="no sequence is trained and scored to its end yet"):
        report(tmp_path)
    assert not (tmp_path / "eval_results_mask.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("tasks", [2, 10])
def test_pictures(tasks, tmp_path):
    names, draw = [f"superni_{number:02d}" for number in range(tasks)], np.random.default_rng(0)
    found = []
    for arm in ARMS if tasks == 2 else ("none", "mtl"):
        R = draw.random((1 if arm == "mtl" else tasks, tasks))
        found.append(Sequence(arm, order_name(names), names, 0, R, np.full_like(R, 0.05), np.zeros(tasks), {}))
    paths = draw_sequences(found, tmp_path)
    assert [path.name.split("_")[0] for path in paths] == ["matrix", "stages", "kept"]
    for path in paths:
        height, width, _ = imread(path).shape
        assert 300 < height < 4000 and 600 < width < 3000, (path.name, height, width)
    assert set(LOOKS) == set(ARMS) and len(set(LOOKS.values())) == len(ARMS), "no two arms look alike"


def test_mtl_alone_has_its_matrix(tmp_path):
    paths = draw_sequences([sequence(GOLDEN[-1:] / 100, "mtl")], tmp_path)
    assert [path.name for path in paths] == ["matrix_a,b,c.png"]
