"""README.md and configs/: every command is understood, every path is there, every flag exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from data.folder import task_modules
from masking.weights import policies
from study.config import Config, EvalConfig, parse, parse_eval
from study.flags import flags_of
from study.plan import parse_arms

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STARTS = ("python ", "torchrun ", "pip ", "hf ", "tensorboard ")
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith(STARTS)]


def help_of(module: str, capsys) -> str:
    if module == "features":  # a package that is a command
        module = "features.__main__"
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return capsys.readouterr().out


def test_there_are_commands():
    assert {"pip install -r requirements.txt", "python train.py"} <= set(COMMANDS) and len(COMMANDS) > 15


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)))
def test_commands_are_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    words = shlex.split(command)
    if words[:2] in (["python", "train.py"], ["torchrun", "train.py"]):
        parse_arms(parse([*words[2:], "--print_config"]).mask, policies())
    elif words[:2] == ["python", "eval.py"]:
        parse_eval(words[2:])
    elif words[:2] == ["python", "-m"] and words[2] != "pytest":
        known = help_of(words[2], capsys)
        assert all(word in known for word in words[3:] if word.startswith("--"))
        assert words[2] != "data.prepare" or words[3] in task_modules()
    elif words[:3] == ["pip", "install", "-r"]:
        assert (REPO / words[3]).is_file()
    else:
        assert command in ("hf auth login", "tensorboard --logdir out", "python -m pytest -n 2 --dist loadfile")


def test_every_flag_exists(capsys):
    known = {"config", "help", "source", "split", "logdir", "adapter", "out", "model", "dtype"}  # of the other commands too
    known |= {"nproc_per_node", "max_restarts", "dist"} | set(flags_of(Config)) | set(flags_of(EvalConfig))  # torchrun has two, pytest one
    for module in ("features", "features.relate", "features.predict", "data.synthesis", "data.prepare", "model.growth"):
        known |= set(re.findall(r"--(\w+)", help_of(module, capsys)))
    named = {flag.replace("-", "_").replace(".", "_") for flag in re.findall(r"--([A-Za-z][\w.-]*\w)", README)}
    assert len(named) > 25 and named <= known


def tree_paths() -> list[str]:
    (block,) = [block for block in BLOCKS if block.startswith("train.py")]
    above, found = "", []
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            above = name if name.endswith("/") else ""
        found.append(above + name if line.startswith(" ") else name)
    return found


def test_every_path_of_the_tree_exists():
    paths = tree_paths()
    assert "masking/weights.py" in paths
    assert [path for path in paths if not (REPO / path).exists() or (REPO / path).is_dir() != path.endswith("/")] == []
    named = {name for name in re.findall(r"`([\w/.-]+)`", README) if name.endswith((".py", ".yaml")) or name == "LICENSE"}
    assert {"LICENSE", "configs/masking.yaml", "masking/weights.py"} <= named and all((REPO / name).is_file() for name in named)


def test_every_room_is_in_the_tree():
    rooms = {f"{path.parent.name}/" for path in REPO.glob("*/__init__.py")} - {"assets/"}
    assert rooms <= set(tree_paths())


def test_pictures_and_links_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert "assets/study.png" in targets
    assert [target for target in targets if not target.startswith("https://") and not (REPO / target).is_file()] == []


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_parse(path):
    config = parse(["--config", str(path)])
    assert parse_arms(config.mask, policies()) and config.model.name and path.read_text().startswith("# ")


def test_masks_and_scores_of_the_tables_are_those_of_the_code():
    table = re.findall(r"^\| `(\w+)` \|", README.split("\n## Masks")[1].split("\n## ")[0], re.MULTILINE)
    assert len(table) >= 8 and set(table) <= set(policies())
    scores = re.findall(r"^\| `(\w+)` \|", README.split("\n## Scores")[1].split("\n## ")[0], re.MULTILINE)
    assert set(scores) == {"exact_match", "flexible_match", "string_match", "rougeL", "answer_nll"}
