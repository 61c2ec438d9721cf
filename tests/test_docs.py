"""What README.md, CHANGES.md and docs/ say is so: keys, commands, examples, names, links."""

import ast
import asyncio
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from RL2.algorithms import resolve_loss
from RL2.config import check_overrides, validate
from RL2.config.overrides import is_open
from RL2.config.schema import all_keys
from RL2.environments.environment import load_environment
from RL2.rollout.sample_table import SampleTable, summarise
from RL2.rollout.samples import Sample
from RL2.trainer.registries import registry_of
from tests.config.support import compose_config, write_model_files
from tests.docs import COMMANDS, DOCS, ROOT, TEXT, blocks, commands, example

README, METRICS = TEXT["README"], TEXT["metrics"]
PICTURE = "docs/quickstart.png"  # drawn by a run: a checkout may be without it

KEYS = {name: key.kind for name, key in all_keys().items()}


def script(name: str) -> tuple[str, list[str]]:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8").replace('"$@"', "")
    text = text.replace("$ROOT/envs", "envs")  # the scripts work from any folder
    ((trainer, overrides),) = commands(f"```bash\n{text}```")
    return trainer, overrides


def unnamed(overrides: list[str]) -> list[str]:
    return sorted(word for word in overrides if not word.startswith("trainer.experiment_name="))


# ------------------------------------------------------------------------------ keys and commands


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_key_exists(path):
    groups = "|".join(key for key in KEYS if "." not in key)
    text = path.read_text(encoding="utf-8")
    for key in re.findall(rf"(?<![\w./])(?:{groups})\.[a-z_0-9.]*\w", text):
        is_file = key.endswith((".py", ".md"))  # benchmarks/rollout.py
        assert is_file or key in KEYS or is_open(key, KEYS), f"{path.name}: {key}"


@pytest.fixture
def readme_folder(tmp_path, monkeypatch):
    """A working directory with all the files that the docs' commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    for name in ("my_loss.py", "my_env.py"):
        (tmp_path / name).write_text(example(name), encoding="utf-8")
    quickstart = tmp_path / "runs" / "quickstart"
    write_model_files(quickstart / "warmup" / "final")
    for name in ("train.jsonl", "test.jsonl"):
        (quickstart / "data").mkdir(exist_ok=True)
        (quickstart / "data" / name).write_text("{}\n", encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / ".venv-sglang" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-sglang" / "bin" / "python").touch(mode=0o755)
    return tmp_path


def test_the_quickstart_makes_those_files():
    text = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    assert "out=${OUT:-runs/quickstart}" in text
    for name in ("data/train.jsonl", "data/test.jsonl", "warmup/final"):
        assert f'"$out/{name}"' in text, name


@pytest.mark.parametrize(
    ("trainer", "overrides"), COMMANDS, ids=[str(i) for i in range(len(COMMANDS))]
)
def test_every_command_passes_all_checks(readme_folder, trainer, overrides):
    check_overrides(trainer, overrides, registry_of)
    validate(compose_config(trainer, overrides), world_size=1)


def test_experiments_are_those_of_the_scripts():
    by_name = {
        word.partition("=")[2]: (trainer, overrides)
        for trainer, overrides in COMMANDS
        for word in overrides
        if word.startswith("trainer.experiment_name=")
    }
    baseline, section_3_1 = by_name["baseline_drgrpo"], by_name["section_3.1_batch_normalized"]
    for (trainer, overrides), name in [
        (baseline, "gsm8k_reinforce.sh"),
        (section_3_1, "gsm8k_0.sh"),
    ]:
        assert (trainer, sorted(overrides)) == (script(name)[0], sorted(script(name)[1]))

    rows = re.findall(
        r"^\| [^|]*\| `(gsm8k_\w+\.sh)` \| ([^|]*) \|", TEXT["experiments"], re.MULTILINE
    )
    changed = {name: cell.strip("`").split() for name, cell in rows if cell != "(below)"}
    assert len(rows) == 6 and len(changed) == 4
    for name, words in changed.items():
        trainer, overrides = section_3_1
        if words[0] == "-m":
            trainer, words = words[1].removeprefix("RL2.trainer."), words[2:]
        new = {word.partition("=")[0] for word in words}
        overrides = [word for word in overrides if word.partition("=")[0] not in new] + words
        assert (trainer, unnamed(overrides)) == (script(name)[0], unnamed(script(name)[1])), name


# ------------------------------------------------------------------------------ examples


def test_loss_example_works(readme_folder):
    assert len(example("my_loss.py").splitlines()) <= 20
    (trainer, overrides) = next(one for one in COMMANDS if "my_loss" in " ".join(one[1]))
    loss = resolve_loss(compose_config(trainer, overrides).actor.loss)
    assert (loss.name, loss.uses_advantages) == ("my_loss", False)
    assert loss.statistics == ("logps", "max_logps")
    # The likeliest token; one that is less likely by e^1 and teaches; one by e^4, beyond the reach.
    gap = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    max_logps = torch.tensor([-0.1, -0.5, -0.2], dtype=torch.float64)
    logps = (max_logps - gap).requires_grad_()
    losses, metrics = loss({"logps": logps, "max_logps": max_logps})
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1.0, 0.0]).double())
    assert logps.grad.tolist() == [-1.0, -1.0, 0.0]
    assert metrics["disagrees"].tolist() == [0.0, 1.0, 1.0]


def test_the_losses_of_sequences_work(tmp_path, caplog):
    (tmp_path / "my_sequences.py").write_text(example("my_sequences.py"), encoding="utf-8")
    for name, kind in (("gspo", "sequences"), ("simpo", "pairs")):
        loss = resolve_loss({"import_path": f"{tmp_path / 'my_sequences.py'}:{name}"})
        assert loss.kind == kind and caplog.messages == []


def test_the_loss_that_selects_works(tmp_path, caplog):
    (tmp_path / "my_selection.py").write_text(example("my_selection.py"), encoding="utf-8")
    loss = resolve_loss({"import_path": f"{tmp_path / 'my_selection.py'}:surprising"})
    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = {"old_logps": torch.tensor([[-1.0, -4.0, -2.0, -3.0]]), "action_mask": mask}
    assert loss.selection(batch)["selections"].tolist() == [[0, 1, 0, 0]] and caplog.messages == []


def test_loss_inputs_are_all_named():
    from RL2.algorithms import FIELDS
    from RL2.algorithms.segments import SEGMENTS
    from RL2.ops.token_stats import STATISTICS

    for name in (*STATISTICS, *FIELDS, *SEGMENTS):
        assert f"`{name}`" in TEXT["losses"], name


def test_the_short_examples_of_the_readme_work(tmp_path):
    """Its loss is that of docs/losses.md without a metric; its environment answers in one turn."""
    for block in blocks(README, "python"):
        (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
    short = resolve_loss({"import_path": f"{tmp_path / 'my_loss.py'}:my_loss"})
    (tmp_path / "long.py").write_text(example("my_loss.py"), encoding="utf-8")
    long = resolve_loss({"import_path": f"{tmp_path / 'long.py'}:my_loss"})
    tensors = {"logps": torch.tensor([-1.0, -5.0]), "max_logps": torch.tensor([-0.5, -0.1])}
    assert torch.equal(short(tensors)[0], long(tensors)[0])

    async def answer(action: str):
        environment = load_environment(str(tmp_path / "my_env.py"), timeout=5)
        return await environment.step("2 + 2 = ", action, {"answer": "4"})

    assert [asyncio.run(answer(action)).reward for action in (" 4\n", "5")] == [1.0, 0.0]


def test_environment_example_works(readme_folder):
    async def play():
        environment = load_environment("my_env.py", timeout=5)
        state, info = await environment.reset({})
        wrong = await environment.step(state, "0", info)
        right = await environment.step(wrong.next_state, f" {info['secret']}\n", wrong.extra_info)
        return state, wrong, right

    state, wrong, right = asyncio.run(play())
    assert (wrong.reward, wrong.score, wrong.done) == (0.0, 0.0, False)
    assert wrong.next_state.startswith(f"{state}0") and "too low" in wrong.next_state
    assert (right.reward, right.score, right.done) == (1.0, 1.0, True)


# ------------------------------------------------------------------------------ metrics

CONTRACT = """
    train/score test/score train/reward actor/loss actor/entropy actor/grad_norm actor/clip_ratio
    actor/kl actor/lr actor/skipped train/avg_response_length test/avg_response_length
    train/length_clip_ratio train/n_turns rollout/dynamic_filtering_ratio rollout/tokens_per_s
    rollout/llm_kl timing/* memory/peak_gib critic/*
""".split()


def explained_metrics() -> list[str]:
    cells = re.findall(r"^\| (`[^|]*) \|", METRICS, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def written_metrics() -> set[str]:
    """Names that the sources of RL2 spell out, those of `summarise` and of `Traffic`."""
    names = {
        f"{prefix}/{name.partition('/')[2]}"
        for prefix in ("train", "test")
        for name in summarise(SampleTable.of([Sample(0, 0)]), prefix)
    }
    for path in (ROOT / "RL2").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names |= {f"comm/{name}_bytes" for name in re.findall(r'traffic\.add\("(\w+)"', text)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pattern = r"(actor|critic|train|test|rollout|memory)/\w+"
                names |= {node.value} if re.fullmatch(pattern, node.value) else set()
    return names


def test_each_metric_is_explained_once():
    explained = explained_metrics()
    assert len(explained) == len(set(explained))
    assert set(CONTRACT) <= set(explained)


def test_the_glossary_names_what_the_code_writes_and_no_more():
    # named by a loss or after a learner
    own = {
        "actor/<name>", "test/<name>", "critic/*", "timing/*", "actor/clip_ratio",
        "actor/tis_masked",
        "critic/clip_ratio", "critic/explained_variance",
    }  # fmt: skip
    own |= {"actor/gate", "actor/selected", "reward/<name>", "test/reward/<name>"}
    assert set(explained_metrics()) - own == written_metrics() - own


def test_every_phase_that_is_timed_is_named():
    (row,) = [line for line in METRICS.splitlines() if line.startswith("| `timing/*`")]
    files = [ROOT / "RL2" / "trainer" / name for name in ("loop.py", "run.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    phases = set(re.findall(r'timers\("(\w+)"\)', text))
    by_name = set(re.findall(r'timers\(f"(\w+)_{', text))
    assert phases and by_name == {"compute", "update"}
    phases |= {"compute_old_logps", "compute_ref_logps", "compute_old_values"}
    phases |= {"compute_mismatch_kl"}
    phases |= {"update_actor", "update_critic"}
    assert phases == set(re.findall(r"`(\w+)`", row))


# ------------------------------------------------------------------------------ tree, names, links


def test_the_reading_order_leads_to_what_it_names():
    """Each stop of `From a prompt to a weight` names something and the line where that begins."""
    stops = re.findall(r"`(\w+)` in `(RL2/[\w/]+\.py):(\d+)`", TEXT["CONTRIBUTING"])
    assert len(stops) > 20
    wrong = []
    for name, path, number in stops:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        begins = re.compile(rf"\s*(async def|def|class) {name}\b|{name}\b.* = ")
        here = [i for i, line in enumerate(lines, start=1) if begins.match(line)]
        if int(number) not in here:
            wrong.append(f"{name} in {path}:{number} is at {here}")
    assert wrong == []


def tree() -> dict[str, str]:
    """{path relative to the root: what the tree of CONTRIBUTING.md says of it}."""
    entries, parents = {}, []
    (block,) = blocks(TEXT["CONTRIBUTING"], "text")
    for line in block.splitlines():
        indent, name, what = re.fullmatch(r"( *)(\S+)  +(\S.*)", line).groups()
        parents = [*parents[: len(indent) // 2], name]
        entries["".join(parents)] = what
    return entries


def test_the_tree_is_true():
    for path in tree():
        assert list(ROOT.glob(path)), f"{path} does not exist"
        assert path.endswith("/") == all(found.is_dir() for found in ROOT.glob(path)), path


def test_the_tree_is_whole():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = {line.strip("/ ") for line in lines if line.strip()} | {"shared"}

    def directories(folder: Path) -> list[Path]:
        return [
            path
            for path in folder.iterdir()
            if path.is_dir()
            and (path.name == ".ci" or not path.name.startswith("."))
            and not any(path.match(pattern) for pattern in ignored)
            and any(file.is_file() and file.suffix != ".pyc" for file in path.rglob("*"))
        ]

    listed = {found for path in tree() for found in ROOT.glob(path)}
    top = directories(ROOT)
    inside = [file for name in ("envs", "examples", "benchmarks") for file in files(ROOT / name)]
    packages = [path for path in (ROOT / "RL2").rglob("*/") if path.name != "__pycache__"]
    missing = {*top, *inside, *packages} - listed
    assert not missing, f"not in the tree of CONTRIBUTING.md: {sorted(map(str, missing))}"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and target != PICTURE:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_picture_is_named_once():
    assert README.count(PICTURE) == 1 and f"]({PICTURE})" in README


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_and_names_in_code_spans_exist(path):
    for span in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
        if re.fullmatch(r"(RL2|envs|examples|tests|benchmarks)/[\w/.]+", span):
            assert (ROOT / span).exists(), f"{path.name}: {span}"
        elif re.fullmatch(r"gsm8k_\w+\.sh", span):
            assert (ROOT / "examples" / span).exists(), f"{path.name}: {span}"
        elif re.fullmatch(r"RL2(\.\w+)+", span):
            assert resolves(span), f"{path.name}: {span}"


def resolves(dotted: str) -> bool:
    """Whether a name is a module, or an attribute of one."""
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return hasattr(importlib.import_module(module), name)
    return True
