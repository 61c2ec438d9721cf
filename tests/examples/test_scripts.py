"""The shell scripts: help, installation from a registry, runs that go on, any working directory."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.trainer.support import environ, overrides, rows_of, weights, write_files

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("examples", "tests", "tests/real_engines", "requirements")
    for path in (ROOT / folder).glob("*.sh")
)
PROGRAMS = ["examples/report.py", "examples/word_problems.py"]


def bash(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd, env=environ(**env), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def with_our_python() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


# ------------------------------------------------------------------------------ help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_what_a_script_does_and_installs_nothing(tmp_path, script, flag):
    for folder in ("examples", "tests", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda at, names: [
            name for name in names if not name.endswith(".sh") and not Path(at, name).is_dir()
        ])  # fmt: skip
    before = set(tmp_path.rglob("*"))
    # relative, with other arguments before it, and without a python to install with
    done = bash(f"bash {script} trainer.max_steps=5 {flag}", tmp_path, PYTHON="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    header = [line for line in (ROOT / script).read_text().splitlines() if line[:2] != "#!"]
    assert done.stdout.splitlines()[0] == header[0].removeprefix("# ")
    assert "set -" not in done.stdout and len(done.stdout.splitlines()) > 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_programs_needs_nothing_installed(program):
    command = [sys.executable, "-I", "-S", ROOT / program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


# ------------------------------------------------------------------------------ installing torch


def wheel(folder: Path, name: str, version: str) -> str:
    """A package that is empty but for its version; returns its requirement with its hash."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    texts = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        record = ""
        for member, text in texts.items():
            file.writestr(member, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{member},sha256={digest.decode().rstrip('=')},{len(text)}\n"
        file.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def registry(tmp_path):
    """A folder with a registry of wheels and the two files that pin torch."""
    (tmp_path / "requirements").mkdir()
    cpu = wheel(tmp_path / "elsewhere", "torch", "2.13.0+cpu")
    gpu = wheel(tmp_path / "wheels", "torch", "2.13.0")
    gpu += wheel(tmp_path / "wheels", "nvidia_cublas", "13.1.0")
    (tmp_path / "requirements" / "torch-cpu.txt").write_text(cpu)
    (tmp_path / "requirements" / "gpu.txt").write_text(gpu)
    return tmp_path


def install_torch(folder: Path) -> tuple[subprocess.CompletedProcess, set]:
    """Real pip that sees the folder's wheels alone, and what it installed."""
    target = folder / "target"
    done = bash(
        f"source {ROOT}/examples/_functions.sh; rl2_torch {sys.executable} log cpu", folder,
        PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder / "wheels"),
        PIP_TARGET=str(target),
    )  # fmt: skip
    return done, {path.name.removesuffix(".dist-info") for path in target.glob("*.dist-info")}


def test_where_the_registry_has_no_cpu_build_the_cuda_build_is_taken_and_its_size_said(registry):
    done, installed = install_torch(registry)
    assert (done.returncode, done.stdout) == (0, "")
    assert installed == {"torch-2.13.0", "nvidia_cublas-13.1.0"}
    (line,) = done.stderr.splitlines()  # pip's own complaint is not shown
    assert "2.7 GB to download" in line and "PIP_EXTRA_INDEX_URL=" in line


def test_the_cpu_build_is_taken_where_pip_finds_one(registry):
    shutil.copytree(registry / "elsewhere", registry / "wheels", dirs_exist_ok=True)
    done, installed = install_torch(registry)
    assert (done.returncode, done.stderr, installed) == (0, "", {"torch-2.13.0+cpu"})


def test_a_damaged_cpu_build_is_no_reason_to_take_another(registry):
    wheel(registry / "wheels", "torch", "2.13.0+cpu")
    pins = registry / "requirements" / "torch-cpu.txt"
    pins.write_text(f"torch==2.13.0+cpu --hash=sha256:{'0' * 64}\n")
    done, installed = install_torch(registry)
    assert (done.returncode, installed) == (1, set())
    assert "HASHES" in done.stderr and "requirements/torch-cpu.txt; see above" in done.stderr


# ------------------------------------------------------------------------------ runs that go on


STEPS = {"trainer__max_steps": 4, "trainer__save_freq": 1}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted_and_is_kept_when_done(tmp_path):
    files = write_files(tmp_path)
    out = tmp_path / "out"

    def train(*changes: str) -> subprocess.CompletedProcess:
        lines = overrides(files, "sft", "", trainer__n_epochs=2, **STEPS)
        words = [line for line in lines if not line.startswith("trainer.save_dir=")]
        text = " ".join([f"rl2_train sft {out / 'sft'}", *words, *changes])
        return bash(
            f"source {ROOT}/examples/_functions.sh; {text}", tmp_path, PATH=with_our_python()
        )

    def steps(name: str = "sft") -> list[int]:
        return [row["step"] for row in rows_of(out / name)]

    assert train().returncode == 0
    shutil.copytree(out / "sft", out / "whole")
    # As a kill between step 3 and 4 leaves it.
    shutil.rmtree(out / "sft" / "final")
    shutil.rmtree(out / "sft" / "checkpoints" / "step000004")
    (out / "sft" / "checkpoints" / "latest").write_text("step000003")
    done = train()
    assert done.returncode == 0 and "step 4/4" in done.stderr and "step 3/4" not in done.stderr
    assert steps() == steps("whole") == [1, 2, 3, 4]
    whole, resumed = weights(out / "whole" / "final"), weights(out / "sft" / "final")
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())

    done = train()
    assert "kept from an earlier run" in done.stdout and "step" not in done.stderr
    # Another command, or another file under the same name, starts anew.
    done = train("trainer.seed=1")
    assert "step 1/4" in done.stderr and "moved aside" in done.stderr
    with (files / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "1 + 1 = ", "response": "2"}\n')
    assert "step 1/4" in train("trainer.seed=1").stderr


# ------------------------------------------------------------------------------ any folder


@pytest.mark.slow
def test_experiments_run_from_any_folder_with_the_python_that_can(tmp_path):
    script = ROOT / "examples" / "gsm8k_0p5_test.sh"
    done = bash(f"bash {script} --cfg job", tmp_path, PATH=with_our_python())
    assert done.returncode == 0, done.stderr
    assert f"env_path: {ROOT}/envs/gsm8k.py" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_experiments_install_where_no_python_can(tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("gsm8k_0p5_test.sh", "_active.sh", "_functions.sh"):
        shutil.copy(ROOT / "examples" / name, folder)
    (folder / "_install.sh").write_text("""
        cd "$ROOT" && mkdir bin && export PATH="$ROOT/bin:$PATH"
        printf '#!/bin/sh\\necho "$PWD $@"' >bin/torchrun && chmod +x bin/torchrun
    """)
    (tmp_path / "elsewhere").mkdir()
    done = bash(f"bash {folder}/gsm8k_0p5_test.sh trainer.max_steps=1", tmp_path / "elsewhere",
                PATH="/usr/bin:/bin")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'elsewhere'} --nproc_per_node=1")
    assert f"rollout.env_path={tmp_path}/envs/gsm8k.py" in done.stdout
