"""study/plan.py: which runs, in which order, in which folders."""

import pytest

from study.errors import LetheError
from study.plan import DEFAULT_ARMS, Run, arm_folder, arm_label, cells_to_score, parse_arms, parse_pairs, plan_runs

THREE = ["a", "b", "c"]
KNOWN = ("none", "bottom10", "highest", "soft")


def test_default_plan_is_both_stages_every_pair_every_arm():
    runs = plan_runs(THREE)
    assert [r.folder for r in runs[:3]] == ["lora_base/a", "lora_base/b", "lora_base/c"] and len(runs) == 3 + 6 * 3
    assert runs[3:6] == [
        Run(2, "none", "a", "b", "lora_transfer/a_to_b", "lora_base/a"),
        Run(2, "bottom10", "a", "b", "mask/bottom10_group/a_to_b", "lora_base/a"),
        Run(2, "highest", "a", "b", "mask/highest/a_to_b", "lora_base/a"),
    ]
    assert runs[0].parent is None and runs[3].task == "b" and runs[0].task == "a"
    seen = set()
    for run in runs:
        assert run.parent is None or run.parent in seen
        seen.add(run.folder)
    assert len(seen) == len(runs)


def test_selections():
    assert [r.folder for r in plan_runs(THREE, stage=1)] == ["lora_base/a", "lora_base/b", "lora_base/c"]
    runs = plan_runs(THREE, ["highest"], "b:a", 2)
    assert [r.folder for r in runs] == ["lora_base/b", "mask/highest/b_to_a"]
    assert [r.folder for r in plan_runs(THREE, ["none"], "b:a")] == [
        "lora_base/a",
        "lora_base/b",
        "lora_transfer/b_to_a",
    ]
    assert [r.folder for r in plan_runs(["a"])] == ["lora_base/a"]


def test_cells():
    cells = cells_to_score(plan_runs(THREE, ["none"], "a:b"), THREE)
    assert cells[:3] == [(None, "a"), (None, "b"), (None, "c")]
    assert [(run.folder, task) for run, task in cells[3:]] == [
        ("lora_base/a", "a"),
        ("lora_base/a", "b"),
        ("lora_base/a", "c"),
        ("lora_base/b", "a"),
        ("lora_base/b", "b"),
        ("lora_base/b", "c"),
        ("lora_transfer/a_to_b", "a"),
        ("lora_transfer/a_to_b", "b"),
    ]


def test_names_of_arms():
    assert [arm_folder(a) for a in ("none", "bottom10", "highest", "dpf")] == [
        "lora_transfer",
        "mask/bottom10_group",
        "mask/highest",
        "mask/dpf",
    ]
    assert [arm_label(a) for a in ("none", "bottom10")] == ["lora_transfer", "mask_bottom10"]
    assert parse_arms(None, KNOWN) == list(DEFAULT_ARMS) and parse_arms("soft, none,soft", KNOWN) == ["soft", "none"]
    assert parse_pairs("a:b, c:a,a:b", THREE) == [("a", "b"), ("c", "a")]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: parse_arms("botom10", KNOWN), "did you mean 'bottom10'?"),
        (lambda: parse_arms(" , ", KNOWN), "no arm"),
        (lambda: parse_pairs("gsm8k:svmp", ["gsm8k", "svamp"]), "did you mean 'svamp'?"),
        (lambda: parse_pairs("a", THREE), "first:second"),
        (lambda: parse_pairs("a:a", THREE), "twice"),
        (lambda: parse_pairs(",", THREE), "empty"),
        (lambda: plan_runs(["a"], stage=2), "second task"),
        (lambda: plan_runs([]), "no task"),
        (lambda: plan_runs(["a/b"]), "cannot be a folder"),
        (lambda: plan_runs([".."]), "cannot be a folder"),
        (lambda: plan_runs(["a", "A"]), "rename a task"),
        (lambda: plan_runs(["a", "b_to_c", "a_to_b", "c"], ["none"]), "two runs want the folder"),
        (lambda: plan_runs(THREE, stage=3), "1 or 2"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(LetheError, match=words.replace("?", r"\?")):
        call()
