"""Nothing that the library reads is run as code, but for what SECURITY.md names.

Read from the sources with `ast`, like tests/test_layering.py.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import dotted_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for part in ("RL2", "envs", "examples") for path in (ROOT / part).rglob("*.py")]

# Calls that run what they are given, or unpickle it, which is the same.
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "exec_module",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path",
}  # fmt: skip
# A file and what it may call, with the reason.
ALLOWED = {
    # environments are code (rollout.env_path), in whose process alone their data is unpickled
    ("RL2/environments/calls.py", "compile"),
    ("RL2/environments/calls.py", "exec"),
    ("RL2/environments/modules.py", "compile"),  # and so are the modules that they import
    ("RL2/environments/messages.py", "pickle.loads"),
    ("RL2/algorithms/parameters.py", "exec_module"),  # losses are code: actor.loss.import_path
}


def dangerous(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every call that may run what it reads."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted_name(node.func) or f".{getattr(node.func, 'attr', '')}"
        last = name.rpartition(".")[2]
        given = {word.arg: word.value for word in node.keywords}

        def says(word: str, value: object, given: dict = given) -> bool:
            constant = given.get(word)
            return isinstance(constant, ast.Constant) and constant.value is value

        if name in RUNS_CODE or last == "exec_module":
            yield node.lineno, last if last == "exec_module" else name
        elif name.endswith("torch.load") and not says("weights_only", True):
            yield node.lineno, "torch.load without weights_only=True"
        elif last == "load" and says("allow_pickle", True):
            yield node.lineno, f"{name} with allow_pickle=True"
        elif says("shell", True):
            yield node.lineno, f"{name} with shell=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    name = path.relative_to(ROOT).as_posix()
    found = dangerous(ast.parse(path.read_text(encoding="utf-8")))
    assert [(line, call) for line, call in found if (name, call) not in ALLOWED] == []


def test_what_is_allowed_is_there():
    for path, call in ALLOWED:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert call in {name for _, name in dangerous(tree)}


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)", "exec(x)", "pickle.loads(x)", "torch.load(f)", "yaml.load(f)", "os.system(c)",
        "torch.load(f, weights_only=False)", "numpy.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)", "spec.loader.exec_module(m)",
    ],
)  # fmt: skip
def test_the_check_sees(line):
    assert list(dangerous(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["model.eval()", "make().eval()", "re.compile(x)", "torch.load(f, weights_only=True)"]
)
def test_the_check_lets_pass(line):
    assert not list(dangerous(ast.parse(line)))
