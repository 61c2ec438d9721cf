"""Who may import whom, read from the sources with `ast`; nothing of RL2 is imported here.

trainer -> workers | rollout -> engines | environments -> models -> algorithms | datasets |
distributed -> ops -> config -> runtime: a package imports itself and what stands further right,
never a neighbour of its own layer, and no two files import each other.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    {"runtime", "envs"},
    {"config"},
    {"ops"},
    {"algorithms", "datasets", "distributed"},
    {"models"},
    {"engines", "environments"},
    {"workers", "rollout"},
    {"trainer"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

# An imported module -> the only files that may import it.
CONFINED = {
    "wandb": "RL2/trainer/sinks/wandb.py",
    "tensorboard": "RL2/trainer/sinks/tensorboard.py",
    "trackio": "RL2/trainer/sinks/trackio.py",
    "mlflow": "RL2/trainer/sinks/mlflow.py",
    "sglang": "RL2/engines/*sglang*.py",
    "vllm": "RL2/engines/*vllm*.py",
}
# A package -> what it may not import at all.
FORBIDDEN = {"config": "torch", "ops": "torch.distributed"}

LONGEST = 450  # lines of a file whose docstring holds no sentence that begins with "Long because"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def dotted_name(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain that starts at a plain name, else None."""
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def imported_modules(node: ast.AST, package: str) -> list[str]:
    """Full names of what one ast node brings in; `package` is that of the file it stands in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = parts[: len(parts) - node.level + 1] if node.level else []
        module = ".".join(base + ([node.module] if node.module else []))
        # `from RL2 import ops` and `from torch import distributed` name a module, too.
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = dotted_name(node.func) or ""
        if name.split(".")[-1] in ("import_module", "__import__"):
            return [str(node.args[0].value)]
    if isinstance(node, ast.Attribute):
        name = dotted_name(node)
        return [name] if name and within(name, "torch.distributed") else []
    return []


def import_violations(module: str, package: str, path: str) -> Iterator[str]:
    """What is wrong with a file `path` of RL2's package `package` ("" = RL2/) importing it."""
    if (top := module.split(".")[0]) in CONFINED and not fnmatch(path, CONFINED[top]):
        yield f"imports {top}, which only {CONFINED[top]} may"
    if package in FORBIDDEN and within(module, FORBIDDEN[package]):
        yield f"imports {FORBIDDEN[package]}, which {package} may not"
    if top != "RL2" or "." not in module:
        return
    target = module.split(".")[1]
    if not package:
        # Importing any layer runs RL2/__init__.py: what it imports, every layer would import.
        if LEVEL.get(target, 0) > 0:
            yield f"imports RL2.{target}; files beside the packages may import RL2.runtime alone"
    elif package not in LEVEL:
        yield f"package {package} has no place in the layers"
    elif target != package and LEVEL.get(target, -1) >= LEVEL[package]:
        yield f"{package} imports RL2.{target}, which does not stand to its right"


def violations(root: Path) -> list[str]:
    """Every breach of the rules under root/RL2, as 'file:line: what'."""
    found = []
    for file in sorted(root.glob("RL2/**/*.py")):
        path = file.relative_to(root).as_posix()
        folders = path.split("/")[:-1]
        package = folders[1] if len(folders) > 1 else ""
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=path)):
            problems = []
            for module in imported_modules(node, ".".join(folders)):
                problems += import_violations(module, package, path)
            if isinstance(node, ast.Global):
                problems.append("a `global` statement")
            if isinstance(node, ast.Call) and dotted_name(node.func) == "print":
                problems.append("print(): use logging")
            found += [f"{path}:{node.lineno}: {problem}" for problem in problems]
    return list(dict.fromkeys(found))


def modules(root: Path) -> dict[str, Path]:
    """Every module of root/RL2 by its dotted name."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(root.glob("RL2/**/*.py"))
    }


def circle(root: Path) -> list[str]:
    """Modules of root/RL2 that import each other, wherever in the file, or none."""
    known = modules(root)
    graph = {}
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        imported = {module for node in tree for module in imported_modules(node, package)}
        # `from RL2.ops import packing` names a module, `from RL2.ops import plan_packs` does not.
        targets = {module if module in known else module.rpartition(".")[0] for module in imported}
        graph[name] = (targets & known.keys()) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def too_long(root: Path) -> list[str]:
    """Files of root/RL2 with too many lines, and no word at their top about why."""
    found = []
    for path, file in {f.relative_to(root).as_posix(): f for f in modules(root).values()}.items():
        source = file.read_text(encoding="utf-8")
        said = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
        reason = re.search(r"(^|[.:] )Long because ", said)
        if source.count("\n") > LONGEST and not reason:
            found.append(path)
    return found


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for path, source in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source, encoding="utf-8")
    return root


def test_the_repository_keeps_its_layers():
    assert violations(ROOT) == []


def test_no_two_files_import_each_other():
    assert circle(ROOT) == []


def test_no_file_is_long_without_a_reason():
    assert too_long(ROOT) == []


def test_a_long_file_is_found(tmp_path):
    lines = "x = 1\n" * LONGEST
    tree = {
        "RL2/short.py": lines,
        "RL2/ops/long.py": lines + "x = 1\n",
        "RL2/told.py": f'"""Laws.\n\nLong because each law\nis one line.\n"""\n{lines}',
        "RL2/untold.py": f'"""Not long because of laws."""\n{lines}',
    }
    assert too_long(write_tree(tmp_path, tree)) == ["RL2/ops/long.py", "RL2/untold.py"]


@pytest.mark.parametrize(
    "first",
    ["import RL2.b", "from RL2 import b", "def f():\n    from RL2.b import g", "from . import b"],
)
def test_a_circle_is_found(tmp_path, first):
    tree = {"RL2/__init__.py": "", "RL2/a.py": first, "RL2/b.py": "from RL2.c import h"}
    assert circle(write_tree(tmp_path, tree)) == []
    assert {"RL2.a", "RL2.b", "RL2.c"} == set(
        circle(write_tree(tmp_path, tree | {"RL2/c.py": "import RL2.a"}))
    )


def test_a_clean_tree_passes(tmp_path):
    tree = {
        "RL2/__init__.py": "from RL2.runtime import errors\n",
        "RL2/runtime/errors.py": "import dataclasses\n",
        "RL2/ops/packing.py": "import torch\nfrom RL2.runtime import errors\n",
        "RL2/algorithms/losses.py": "from ..ops.packing import plan\nfrom . import kl\n",
        "RL2/workers/actor.py": "import torch.distributed as dist\nimport RL2.algorithms.losses\n",
        "RL2/engines/servers/sglang.py": "import sglang\n",
        "RL2/engines/servers/vllm.py": "def start():\n    from vllm import LLM\n",
        "RL2/trainer/sinks/wandb.py": "import wandb\n",
        "RL2/trainer/ppo.py": "log.print('a method')\nx = importlib.import_module(name)\n",
    }
    assert violations(write_tree(tmp_path, tree)) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("RL2/ops/a.py", "import RL2.algorithms.losses", "ops imports RL2.algorithms"),
        ("RL2/ops/a.py", "from RL2 import trainer", "ops imports RL2.trainer"),
        ("RL2/ops/a.py", "from ..datasets import base", "ops imports RL2.datasets"),
        ("RL2/ops/a.py", "from .. import datasets", "ops imports RL2.datasets"),
        ("RL2/ops/deep/a.py", "from ...datasets import base", "ops imports RL2.datasets"),
        ("RL2/algorithms/a.py", "import RL2.distributed", "algorithms imports RL2.distributed"),
        ("RL2/workers/a.py", "import RL2.rollout.player", "workers imports RL2.rollout"),
        ("RL2/config/a.py", "def f():\n    import RL2.ops", "config imports RL2.ops"),
        ("RL2/rollout/a.py", "import RL2.trainer", "rollout imports RL2.trainer"),
        ("RL2/ops/a.py", "import importlib\nimportlib.import_module('RL2.trainer')", "RL2.trainer"),
        ("RL2/extra/a.py", "import RL2.ops", "extra has no place"),
        ("RL2/ops/a.py", "import RL2.extra\nimport RL2.config", None),
        ("RL2/__init__.py", "from RL2.trainer import ppo", "imports RL2.trainer"),
        ("RL2/config/a.py", "import torch", "imports torch"),
        ("RL2/config/a.py", "from torch.utils import data", "imports torch"),
        ("RL2/ops/a.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("RL2/ops/a.py", "from torch import distributed", "imports torch.distributed"),
        ("RL2/ops/a.py", "from torch.distributed.fsdp import x", "imports torch.distributed"),
        ("RL2/ops/a.py", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("RL2/trainer/ppo.py", "import wandb", "imports wandb"),
        ("RL2/workers/metrics.py", "from wandb import init", "imports wandb"),
        ("RL2/rollout/collector.py", "import sglang.srt", "imports sglang"),
        ("RL2/workers/vllm.py", "import vllm", "imports vllm"),
        ("RL2/ops/a.py", "def f():\n    global x\n    x = 1", "`global`"),
        ("RL2/trainer/ppo.py", "for i in y:\n    print(i)", "print()"),
    ],
)
def test_each_breach_is_found(tmp_path, path, source, message):
    found = violations(write_tree(tmp_path, {path: source}))
    if message is None:
        assert found == []
    else:
        assert found and all(message in line and path in line for line in found)


def test_importing_config_loads_no_torch():
    """What the sources cannot show: a third party that imports torch for config."""
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "RL2" / "config").glob("**/*.py"))
    ]
    if not names:
        pytest.skip("RL2/config holds no module")
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules and 'torch loaded')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
