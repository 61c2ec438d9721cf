"""README.md and docs/ as texts, and the code in them, for tests that run it."""

import re
import shlex
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TEXT = {path.stem: path.read_text(encoding="utf-8") for path in DOCS}
PAGES = "\n".join(text for name, text in TEXT.items() if name != "CHANGES")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def example(name: str) -> str:
    """The python block of the docs whose docstring begins with its file name."""
    (found,) = [block for block in blocks(PAGES, "python") if block.startswith(f'"""{name}:')]
    return found


def example_module(name: str) -> ModuleType:
    """What that block defines."""
    module = ModuleType(name.removesuffix(".py"))
    exec(compile(example(name), name, "exec"), vars(module))
    return module


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(trainer, overrides) of the commands in the bash blocks of a text."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words and not {"[key=value", "..."} & set(words) and "venv" not in words:
                at = words.index("-m") + 1
                found.append((words[at].removeprefix("RL2.trainer."), words[at + 1 :]))
    return found


COMMANDS = commands(PAGES)
