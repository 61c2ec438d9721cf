"""pyproject.toml, the pinned requirement files and the shell scripts agree with each other."""

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from RL2.runtime.errors import ConfigError
from RL2.trainer.main import FLOORS, check_versions

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DEPENDENCIES = PROJECT["dependencies"]
REQUIREMENTS = ROOT / "requirements"
CPU_FILES = ("build.txt", "torch-cpu.txt", "base.txt")
GPU_FILES = ("build.txt", "gpu.txt", "base.txt")
ALL_FILES = sorted({*CPU_FILES, *GPU_FILES, "triton.txt", "trackers.txt", "trl.txt"})
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]
    if not path.parent.name.startswith(".venv")
)


def read_pins(*names: str) -> list[tuple[Requirement, list[str]]]:
    """(requirement, hashes) of every entry of the files."""
    pins = []
    for name in names:
        text = (REQUIREMENTS / name).read_text(encoding="utf-8")
        text = re.sub(r"(?m)^\s*#.*\n?", "", text).replace("\\\n", " ")
        for line in filter(str.strip, text.splitlines()):
            requirement, *hashes = line.split("--hash=")
            pins.append((Requirement(requirement), [item.strip() for item in hashes]))
    return pins


def pinned_names(*files: str) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement, _ in read_pins(*files)}


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_entry_has_one_version_and_hashes(name):
    pins = read_pins(name)
    assert pins
    for requirement, hashes in pins:
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == ["=="] and requirement.url is None, requirement
        assert hashes, f"{requirement}: no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", item) for item in hashes), requirement


@pytest.mark.parametrize("name", ALL_FILES)
def test_no_address_and_no_path_is_recorded(name):
    text = (REQUIREMENTS / name).read_text(encoding="utf-8")
    assert not re.search(r"://|file:|--index|--extra-index|--find-links|(?m:^\s*/)|\s/\w", text)


def test_the_cpu_files_hold_nothing_of_cuda():
    cuda = re.compile(r"nvidia-|cuda-|triton|flash-attn|liger|cupy")
    assert [name for name in pinned_names(*CPU_FILES) if cuda.match(name)] == []
    torch = [pin for pin, _ in read_pins("torch-cpu.txt") if pin.name == "torch"]
    assert {str(pin.specifier) for pin in torch} == {"==2.13.0+cpu", "==2.13.0"}


def test_the_interpreted_kernels_are_those_of_gpu_machines():
    assert read_pins("triton.txt")[0] in read_pins("gpu.txt")


@pytest.mark.parametrize("files", [CPU_FILES, GPU_FILES], ids=["cpu", "gpu"])
def test_what_pyproject_asks_for_is_pinned_inside_its_ranges(files):
    pins = read_pins(*files)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        versions = [
            next(iter(pin.specifier)).version
            for pin, _ in pins
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        ]
        assert versions, f"{requirement}: not in {', '.join(files)}"
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_trackers_are_pinned_and_move_nothing_else():
    pins = {canonicalize_name(pin.name): pin for pin, _ in read_pins("trackers.txt")}
    for wanted in map(Requirement, PROJECT["optional-dependencies"]["trackers"]):
        (pinned,) = pins[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pinned.version), wanted
    base, trackers = (
        {(canonicalize_name(pin.name), str(pin.specifier)) for pin, _ in read_pins(file)}
        for file in ("base.txt", "trackers.txt")
    )
    names = {name for name, _ in base}
    both = {pin for pin in trackers if pin[0] in names}
    assert both and both <= base


@pytest.mark.parametrize("files", [CPU_FILES, GPU_FILES], ids=["cpu", "gpu"])
def test_a_package_has_one_version_on_one_machine(files):
    """The lists are installed together with --no-deps, so they must not contradict."""
    versions: dict[str, set[str]] = {}
    for pin, _ in read_pins(*files):
        if pin.marker is None or pin.marker.evaluate():
            versions.setdefault(canonicalize_name(pin.name), set()).add(str(pin.specifier))
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_the_pins_are_complete():
    """pip installs them with --no-deps: whatever an installed one needs is pinned as well."""
    pinned = pinned_names(*CPU_FILES)
    for name in sorted(pinned):
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system or another Python
        if name == "torch" and "+cpu" not in metadata.version(name):
            continue  # the CUDA build needs what gpu.txt pins
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in pinned, f"{name} needs {need}"


def test_extras_and_python_range():
    assert {"gpu", "lora", "sglang", "vllm", "dev"} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"


def test_no_lock_file_is_tracked():
    assert "uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_floors():
    """At least what is safe, the same in pyproject and at the start of a run, and installed."""
    wanted = {requirement.name: requirement for requirement in map(Requirement, DEPENDENCIES)}
    for name, safe in {"torch": "2.6", "transformers": "5.3"}.items():
        lowest = [one.version for one in wanted[name].specifier if one.operator == ">="]
        assert lowest == [FLOORS[name]] and Version(lowest[0]) >= Version(safe)
        pins = [pin for pin, _ in read_pins(*CPU_FILES, *GPU_FILES) if pin.name == name]
        assert pins and all(
            Version(next(iter(pin.specifier)).version) >= Version(lowest[0]) for pin in pins
        )
    check_versions()


def test_older_versions_do_not_start(monkeypatch):
    monkeypatch.setattr("RL2.trainer.main.version", lambda name: "2.12.1")
    with pytest.raises(ConfigError, match=r"^torch==2.12.1: must be 2.13 or newer; install it"):
        check_versions()


def test_the_package_holds_the_environments_of_the_repository():
    from RL2.envs import gsm8k

    for path in (ROOT / "envs").glob("*.py"):
        inside = ROOT / "RL2" / "envs" / path.name
        assert inside.resolve() == path, f"{inside}: link it to {path}"
    assert gsm8k.is_correct("5.0", "5")
    assert PROJECT["scripts"] == {"rl2": "RL2.trainer.cli:main"}


def test_files_that_are_no_modules_are_in_the_package():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["RL2"]
    for path in (ROOT / "RL2").rglob("*.yaml"):
        inside = path.relative_to(ROOT / "RL2")
        assert any(inside.match(pattern) for pattern in patterns), inside
