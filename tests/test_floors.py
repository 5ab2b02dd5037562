"""The house has floors: an import goes down or stays on its floor, never up, and there is no circle."""

import ast
from pathlib import Path

REPO = Path(__file__).parent.parent
FLOORS = (("kernels", "optim", "metrics"), ("model", "study"), ("lora", "data"), ("masking",), ("eval",), ("train",), ("features",))
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FREE = {"assets", "benchmarks", "tests"}  # scripts and tests may import anything


def modules_of(house: Path) -> dict[str, Path]:
    """Dotted name -> file of every module that stands on a floor."""
    found = {}
    for room in FLOOR:
        files = [house / f"{room}.py", *(house / room).rglob("*.py")]
        for file in filter(Path.is_file, files):
            parts = file.relative_to(house).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, file: Path, known: set[str]) -> set[tuple[str, int]]:
    """(module of this house, line) of every import in a file, those inside functions too."""
    found = set()

    def note(target: str, line: int) -> None:
        while target and target not in known:  # a name in a module: the module counts
            target = target.rpartition(".")[0]
        if target and target != name:
            found.add((target, line))

    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                note(f"{base}.{alias.name}", node.lineno)
    return found


def violations(house: Path) -> list[str]:
    """What breaks the rules, a line each: imports that climb, strangers' rooms, circles of rooms and of modules."""
    modules = modules_of(house)
    outside = {path.stem if path.is_file() else path.name for path in house.iterdir() if (path / "__init__.py").is_file()} & FREE
    wrong, graph = [], {}
    for name, file in modules.items():
        targets = imports_of(name, file, set(modules) | outside)
        graph[name] = {target for target, _ in targets if target in modules}
        for target, line in sorted(targets):
            room, other = name.split(".")[0], target.split(".")[0]
            if other in FREE or FLOOR[other] > FLOOR[room]:
                wrong.append(f"{file.relative_to(house)}:{line}: {room} must not import {target}")
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        rooms.setdefault(name.split(".")[0], set()).update({target.split(".")[0] for target in targets} - {name.split(".")[0]})
    # A package's __init__ gathers names from its modules, and they may import each other through it: no circle of sense.
    plain = {name: {t for t in targets if not name.startswith(t + ".")} for name, targets in graph.items()}
    return wrong + [f"circle: {' > '.join(circle)}" for graph in (plain, rooms) if (circle := circle_in(graph))]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a directed graph, its first name repeated at the end; [] where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if circle := walk(target, [*path, name]):
                    return circle
            done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := walk(name, []))), [])


def test_every_import_goes_down_or_stays():
    assert len(modules_of(REPO)) > 20
    assert violations(REPO) == []


def test_every_room_has_its_floor():
    rooms = {path.parent.name for path in REPO.glob("*/__init__.py")} | {path.stem for path in REPO.glob("*.py")}
    assert rooms - FREE <= set(FLOOR)


def build(house: Path, **files: str) -> Path:
    for name, text in files.items():
        file = house / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent != house:
            (file.parent / "__init__.py").touch()
        file.write_text(text)
    return house


def test_violations_are_caught(tmp_path):
    good = {"kernels__loss": "import torch\n", "model__llama": "from kernels.loss import nll\n"}
    good |= {"train": "import eval\nfrom model import llama\n", "eval": ""}
    assert violations(build(tmp_path / "good", **good)) == []
    up = build(tmp_path / "up", **good, metrics__text="def f():\n    from study.errors import LetheError\n", study__errors="")
    assert violations(up) == ["metrics/text.py:2: metrics must not import study.errors"]
    entry = build(tmp_path / "entry", **good, study__plots="import train as t\n")
    assert violations(entry) == ["study/plots.py:1: study must not import train"]
    relative = build(tmp_path / "relative", **good, data__rows="from ..masking import score\n", masking__score="")
    assert violations(relative) == ["data/rows.py:1: data must not import masking.score"]
    script = build(tmp_path / "script", **good, lora__layers="import benchmarks.gpu\n", benchmarks__gpu="")
    assert violations(script) == ["lora/layers.py:1: lora must not import benchmarks"]


def test_circles_are_caught(tmp_path):
    modules = build(tmp_path / "modules", study__a="from study.b import x\n", study__b="def f():\n    import study.a\n")
    assert violations(modules) == ["circle: study.a > study.b > study.a"]
    rooms = build(tmp_path / "rooms", study__a="import model.b\n", model__b="", model__c="import study.d\n", study__d="")
    assert violations(rooms) == ["circle: model > study > model"]
