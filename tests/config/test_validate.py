import os

import pytest
from omegaconf import OmegaConf

from RL2.config import validate
from RL2.runtime.errors import ConfigError
from tests.config.support import RL_REQUIRED, SFT_REQUIRED, write_model_files


@pytest.fixture
def message(composed):
    """`message("spo", "key=value", world_size=8)`: what `validate` says about the config."""

    def check(name: str, *overrides: str, world_size: int = 1) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(composed(name, *overrides), world_size)
        text = str(caught.value)
        assert "\n" not in text
        return text

    return check


@pytest.mark.parametrize("name", ["ppo", "spo", "spo_0p5", "sft"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_required_keys_are_enough(composed, name, world_size):
    config = composed(name)
    before = config.copy()
    validate(config, world_size)
    assert config == before


@pytest.mark.parametrize(
    ("name", "override"),
    [("spo", line) for line in RL_REQUIRED] + [("sft", line) for line in SFT_REQUIRED],
)
def test_required(message, name, override):
    key = override.partition("=")[0]
    assert message(name, f"{key}='???'").startswith(f"{key}: required; give ")


@pytest.mark.parametrize(
    "override",
    [
        "train_data.prompts_per_rollout=0",
        "test_data.max_examples=0",
        "actor.lr=0.0",
        "actor.lr=nan",
        "actor.lr=inf",
        "actor.lr=10000.0",
        "actor.lr=1.0",
        "actor.weight_decay=10000.0",
        "rollout.train_sampling_params.temperature=10000.0",
        "rollout.test_sampling_params.temperature=10000.0",
        "actor.weight_decay=-1.0",
        "actor.warmup_ratio=1.5",
        "actor.max_grad_norm=0.0",
        "actor.tis_coef=-1.0",
        "actor.kl.coef=-0.5",
        "actor.entropy.coef=nan",
        "actor.update_per_rollout=0",
        "actor.tp_size=0",
        "rollout.servers_per_node=0",
        "rollout.server_start_timeout=0.0",
        "rollout.request_timeout=0.0",
        "rollout.request_retries=-1",
        "rollout.max_restarts=-1",
        "actor.loss.target=1.0",
        "actor.loss.max_rank=0",
        "actor.clip=0.0",
        "rollout.train_sampling_params.temperature=0.0",
        "rollout.test_sampling_params.temperature=-0.1",
        "rollout.train_sampling_params.top_p=0.0",
        "rollout.test_sampling_params.top_p=1.1",
        "rollout.train_sampling_params.max_new_tokens=0",
        "rollout.gpu_memory_utilization=30.0",
        "rollout.base_port=99999",
        "rollout.env_timeout=0.0",
        "rollout.max_env_errors=-1.0",
        "rollout.max_malformed=-1.0",
        "rollout.max_in_flight=0",
        "rollout.max_resampled=-1",
        "rollout.over_sampling=0",
        "actor.dropout=0.1",
        "rollout.staleness=2",
        "rollout.staleness=-1",
        "rollout.llm_kl_alarm=0.0",
        "trainer.n_epochs=0",
        "trainer.max_steps=0",
        "trainer.save_freq=-1",
        "trainer.test_freq=0",
        "trainer.seed=-1",
        "trainer.health.patience=0",
        "trainer.health.no_signal_steps=0",
        "trainer.health.min_entropy=-1.0",
        "trainer.health.max_entropy=0.0",
        "trainer.health.max_p_max=1.1",
        "trainer.health.min_length_ratio=0.0",
        "trainer.health.max_llm_kl=0.0",
    ],
)
def test_ranges(message, override):
    assert f"{override}: must " in message("spo", override)


@pytest.mark.parametrize("value", ["yes", "null", "[true]", "2", "off"])
def test_liger(message, composed, value):
    for key, name in [("actor", "sft"), ("actor", "spo"), ("ref_actor", "ppo")]:
        text = message(name, f"{key}.use_liger_kernel={value}")
        shown = {"null": "None", "[true]": "[True]"}.get(value, value)
        assert text == f"{key}.use_liger_kernel={shown}: must be auto, true or false"
    for good in ("auto", "true", "false"):
        validate(composed("ppo", f"actor.use_liger_kernel={good}"), 1)


def test_health(message, composed):
    low, high = "trainer.health.min_entropy=2.0", "trainer.health.max_entropy=1.0"
    text = message("spo", low, high)
    assert text.startswith(f"{low}: must be below {high}; ")
    off = [f"trainer.health.{key}=null" for key in composed("spo").trainer.health]
    validate(composed("spo", *(line for line in off if "patience" not in line)), 1)


def test_mesh(message, composed):
    assert message("spo", "actor.tp_size=3", world_size=8) == (
        "actor.tp_size=3: must divide world_size=8; use 1, 2, 4 or 8"
    )
    for key in ("sp_size", "ddp_size"):
        text = message("spo", f"actor.{key}=2", world_size=1)
        assert text == f"actor.{key}=2: must divide world_size=1; use 1"
    for other in ("sp_size", "ddp_size"):
        text = message("sft", "actor.tp_size=2", f"actor.{other}=2", world_size=2)
        assert text == (
            f"actor.tp_size=2 * actor.{other}=2 = 4: must divide world_size=2; lower one of them"
        )
    validate(composed("spo", "actor.tp_size=2", "actor.sp_size=2", "actor.ddp_size=4"), 8)
    assert "actor.tp_size=2 has split; use one of the two" in message(
        "spo", "actor.compile=true", "actor.tp_size=2", world_size=2
    )
    assert "must divide world_size=2; use 1 or 2" in message(
        "spo", "rollout.tp_size=3", world_size=2
    )
    validate(composed("spo", "rollout.tp_size=2"), 2)
    assert message("spo", "ref_actor.ddp_size=3", world_size=4).startswith("ref_actor.ddp_size=3")
    validate(composed("spo", "actor.ddp_size=2"), 4)


def test_model_name(message, composed, workdir):
    for name in ("gpt2", "./nowhere", "~/nowhere", "/no/where", "a/b/c"):
        text = message("spo", f"actor.model_name='{name}'")
        where = "" if name[0] == "/" else f" in {workdir}"
        assert text.startswith(f"actor.model_name={name}: no such folder{where}, and not a hub id")
    (workdir / "models" / "tiny").mkdir(parents=True)
    assert "no config.json" in message("spo", "actor.model_name=models/tiny")
    assert "no such folder" in message("spo", "actor.model_name=models/tyni")
    write_model_files(workdir / "models" / "tiny")
    validate(composed("spo", "actor.model_name=models/tiny"), 1)


def test_data_path(message, composed, workdir):
    (workdir / "empty.jsonl").touch()
    (workdir / "rows.jsonl").write_text("{}\n")
    (workdir / "rows.txt").write_text("x\n")
    (workdir / "folder.json").mkdir()
    for path in ("missing.jsonl", "train@missing.csv", "./missing", "~/missing.parquet"):
        text = message("spo", f"train_data.path='{path}'")
        assert text.startswith(f"train_data.path={path}: no such file in {workdir}")
    assert message("sft", "data.path=missing.json").startswith("data.path=missing.json")
    evaluated = "trainer.test_freq=1"
    assert "test_data.path=x.json" in message("spo", "test_data.path=x.json", evaluated)
    assert "is empty" in message("spo", "train_data.path=empty.jsonl")
    assert "is a folder" in message("spo", "train_data.path=folder.json")
    assert "unknown file type" in message("spo", "train_data.path=./rows.txt")
    for path in ("openai/gsm8k", "train", "", "a@b@c", "train@x/y/z"):
        assert "neither a file" in message("spo", f"train_data.path='{path}'")
    for path, use in {
        "openai/gsm8k": "train_data.path='train@openai/gsm8k[:config]'",
        "openai/gsm8k:main": "train_data.path='train@openai/gsm8k:main'",
        "gsm8k": "train_data.path='train@gsm8k[:config]'",
    }.items():
        assert message("spo", f"train_data.path='{path}'").endswith(f"needs its split: {use}")
    assert message("spo", "test_data.path=a/b", "trainer.test_freq=1").endswith(
        "'test@a/b[:config]'"
    )
    for path in ("rows.jsonl", "train@rows.jsonl", "train[:10]@openai/gsm8k:main", "train@gsm8k"):
        validate(composed("spo", f"train_data.path='{path}'"), 1)
    validate(composed("spo", "train_data.path=null"), 1)


def test_servers(message, composed, workdir):
    here = "rollout.server_url=http://127.0.0.1:30000"
    assert message("spo", here) == (
        "rollout.server_url=http://127.0.0.1:30000: say which kind of server it is, "
        "rollout.engine=sglang or rollout.engine=vllm"
    )
    validate(composed("spo", here, "rollout.engine=vllm"), 1)
    validate(composed("spo", f"{here[:19]}[http://a:1,https://b:2/]", "rollout.engine=vllm"), 1)
    for url in ("localhost:1", "[http://a:1,b]", "http://a/path", "3"):
        text = message("spo", f"rollout.server_url={url}", "rollout.engine=sglang")
        assert "must be an address such as http://127.0.0.1:30000" in text
    text = message("spo", "rollout.server_url=[]", "rollout.engine=sglang")
    assert text == "rollout.server_url=[]: names no server; leave it out"
    for override in (
        "rollout.server_python=python3", "rollout.servers_per_node=2", "rollout.base_port=1234",
        "rollout.server_args=[--x]",
    ):  # fmt: skip
        text = message("spo", here, "rollout.engine=vllm", override)
        assert text.startswith(override.partition("=")[0])
        assert "has no effect with rollout.server_url" in text
    text = message("spo", "rollout.engine=vllm", "rollout.server_python=nowhere/python")
    assert text.startswith("rollout.server_python=nowhere/python: no executable file")
    (workdir / "python").touch(mode=0o755)
    validate(composed("spo", "rollout.engine=vllm", "rollout.server_python=python"), 1)
    text = message("spo", "rollout.engine=vllm", "rollout.weights_dir=python")
    assert text == "rollout.weights_dir=python: is a file; give a folder"


def test_rollout(message, workdir):
    text = message("spo", "rollout.responses_per_prompt=4")
    assert "must equal train_data.responses_per_prompt=1" in text
    assert "leave it out" in message("spo", "rollout.model_name=Qwen/other")
    text = message("spo", "rollout.env_path=envs/nothing.py")
    assert text.startswith(f"rollout.env_path=envs/nothing.py: no such file in {workdir}")
    for stop in ("3", "{a:1}", "[a,3]", "''"):
        text = message("spo", f"rollout.train_sampling_params.stop={stop}")
        assert "must be a text, a list of texts or null" in text


@pytest.mark.parametrize("stop", ["null", "'</answer>'", "[a,b]"])
def test_stop(composed, stop):
    validate(composed("spo", f"rollout.train_sampling_params.stop={stop}"), 1)


def test_how_batches_come_together(message, composed):
    text = message("spo", "rollout.partial_rollout=true", "rollout.staleness=1")
    assert text.startswith("rollout.partial_rollout=true: ") and "use one of the two" in text
    text = message("spo", "rollout.over_sampling=4")
    assert "has no effect without rollout.partial_rollout=true" in text
    text = message("spo", "rollout.max_resampled=8", "rollout.dynamic_filtering=false")
    assert "has no effect with rollout.dynamic_filtering=false" in text
    text = message("spo", "rollout.max_resampled=8")
    assert "has no effect with train_data.responses_per_prompt=1" in text
    text = message("spo", "rollout.sleep=true", "rollout.staleness=1")
    assert text.startswith("rollout.sleep=true: ") and "rollout.staleness=1" in text
    for overrides in (
        ["rollout.staleness=1"],
        ["rollout.partial_rollout=true"],
        ["rollout.partial_rollout=true", "rollout.over_sampling=4"],
        ["rollout.max_resampled=8", "train_data.responses_per_prompt=2"],
        ["rollout.llm_kl_alarm=null", "rollout.max_malformed=null"],
    ):
        validate(composed("spo", *overrides), 1)


def test_masked_importance_weights_need_a_band(message, composed):
    text = message("spo", "actor.tis_type=mask")  # spo has none of it
    assert text.startswith("actor.tis_type=mask: has no effect with actor.tis_coef=0.0; set ")
    text = message("ppo", "actor.tis_type=mask", "actor.tis_coef=0.5")
    assert text.startswith("actor.tis_type=mask: leaves no token with actor.tis_coef=0.5; set ")
    validate(composed("ppo", "actor.tis_type=mask"), 1)


def test_lengths(message, composed):
    text = message("spo", "rollout.train_sampling_params.max_new_tokens=512")
    assert "max_new_tokens=512: must be below actor.max_length_per_device=512" in text
    text = message("spo", "train_data.max_prompt_length=257")
    assert text.startswith("train_data.max_prompt_length=257") and "at most 256" in text
    text = message("spo", "actor.max_inference_length_per_device=100")
    assert text.startswith("actor.max_inference_length_per_device=100: must be at least")
    text = message("spo", "actor.sp_size=2", "actor.max_length_per_device=128", world_size=2)
    assert "must be below actor.max_length_per_device=128 * actor.sp_size=2, which" in text
    validate(composed("spo", "actor.sp_size=2", "actor.max_length_per_device=129"), 2)
    text = message("spo", "actor.sp_size=2", "ref_actor.sp_size=1", world_size=2)
    assert text.startswith("ref_actor.max_inference_length_per_device=512: must be at least")
    text = message("sft", "actor.max_length_per_device=100")
    assert text.startswith("data.max_length=512: must be at most actor.max_length_per_device=100")


def test_options_without_effect(message, composed):
    assert "without actor.kl.type" in message("ppo", "actor.kl.coef=0.1")
    assert "with actor.kl.coef=0" in message("ppo", "actor.kl.type=loss")
    assert "has no effect with actor.kl.coef=0" in message("ppo", "ref_actor.model_name=Qwen/other")
    text = message("spo", "actor.clip=0.2")
    assert text.startswith("actor.clip=0.2: has no effect with actor.loss.name=max_target_kl")
    for setting in ("adv.norm_var=true", "adv.global_norm=true", "adv.gamma=0.9", "adv.lamda=0.9"):
        assert message("spo", setting).startswith(
            f"{setting}: has no effect with adv.estimator=spo"
        )
    assert "without test_data.path" in message("spo", "trainer.test_freq=5")
    assert "without trainer.test_freq" in message("spo", "test_data.path=test@openai/gsm8k:main")
    text = message("ppo", "trainer.test_sampled=true")
    assert text.startswith(
        "trainer.test_sampled=true: has no effect without trainer.test_freq; set"
    )
    assert message("sft", "actor.avg_level=correct").startswith("actor.avg_level=correct: in sft")
    for kind in ("loss", "reward", "advantage"):
        overrides = (f"actor.kl.type={kind}", "actor.kl.coef=0.1", "ref_actor.model_name=a/b")
        validate(composed("ppo", *overrides), 1)


def test_update_per_rollout(message, composed):
    text = message("ppo", "actor.update_per_rollout=3", "train_data.responses_per_prompt=2")
    assert text.startswith("actor.update_per_rollout=3: must divide the 16 samples")
    validate(composed("ppo", "actor.update_per_rollout=4"), 1)


def test_trainer(message, composed, workdir):
    names = [
        "a/b",
        "..",
        "''",
        "'a\\b'",
        "../x",
        "/x",
        ".x",
        "-x",
        "' x'",
        "x" * 256,
        "'" + "é" * 128 + "'",
    ]
    for name in [*names, "'" + "é" * 128 + "'"]:
        assert "names a folder" in message("spo", f"trainer.experiment_name={name}")
    for key, problem in (("experiment_name", "names a folder"), ("save_dir", "cannot be a folder")):
        for control in ('"a\nb"', '"a\0b"', '"a\x1bb"'):  # the command escapes what it shows
            with pytest.raises(ConfigError, match=problem):
                validate(composed("spo", f"trainer.{key}={control}"), 1)
    validate(composed("spo", "trainer.experiment_name=" + "x" * 255), 1)
    for folder in ("''", "' '", "x" * 300, "x/" * 3000):
        text = message("spo", f"trainer.save_dir={folder}")
        assert text.startswith("trainer.save_dir=") and "cannot be a folder" in text
    for project in ("''", "a/b", "x" * 129):
        text = message("spo", f"trainer.project={project}")
        assert "no name that wandb takes" in text and "trainer.use_wandb=false" in text
    validate(composed("spo", "trainer.project=a/b", "trainer.use_wandb=false"), 1)
    assert "is a file" in message("sft", "trainer.save_dir=env.py")
    text = message("sft", "trainer.load_ckpt_from=ckpts/nothing")
    assert text.startswith("trainer.load_ckpt_from=ckpts/nothing: no such folder")
    validate(composed("sft", "trainer.load_ckpt_from=latest"), 1)
    (workdir / "step10").mkdir()
    assert "is no checkpoint" in message("sft", "trainer.load_ckpt_from=step10")
    (workdir / "step10" / "manifest.json").touch()
    validate(composed("sft", "trainer.load_ckpt_from=step10"), 1)


def test_keys_added_past_the_types(composed):
    config = composed("spo", "+actor.learning_rates=1")
    with pytest.raises(ConfigError, match="actor.learning_rates: unknown key"):
        validate(config, 1)
    config = composed("spo")
    OmegaConf.update(config, "rollout.train_sampling_params.topp", 1.0, force_add=True)
    with pytest.raises(ConfigError, match="did you mean rollout.train_sampling_params.top_p"):
        validate(config, 1)
    validate(composed("spo", "+actor.loss.options.beta=1"), 1)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("actor.lr='${nope}'", "actor.lr=${nope}"),
        ("actor.lr='${actor.lr}'", "actor.lr=${actor.lr}"),
        ("actor.lr='${trainer.project}'", "actor.lr=${trainer.project}"),
        ("trainer.project='${oc.env:NOT_THERE}'", "trainer.project=${oc.env:NOT_THERE}"),
        ("trainer.project='${nope:1}'", "trainer.project=${nope:1}"),
        ("rollout.server_args=['${nope}']", "rollout.server_args.0=${nope}"),
        ("actor.loss.options={a:'${nope}'}", "actor.loss.options.a=${nope}"),
    ],
)
def test_interpolations_that_lead_nowhere(message, override, key):
    text = message("spo", override)
    assert text.startswith(f"{key}: does not resolve (") and "name a key that has a value" in text


def test_numbers_that_fit_nowhere(message):
    for key in ("trainer.seed", "actor.lora.seed"):
        assert "must be 0 to 4294967295" in message("spo", f"{key}=4294967296")
    assert "must be 1 to 1024" in message("spo", "trainer.num_threads=1000000")
    text = message("spo", "actor.weight_decay=???")
    assert text.startswith("actor.weight_decay=???: required; give a value")


def test_paths_that_are_no_files(message, workdir):
    os.mkfifo(workdir / "pipe.jsonl")
    for path in ("pipe.jsonl", "train@pipe.jsonl", "/dev/null"):
        text = message("spo", f"train_data.path='{path}'")
        assert text == f"train_data.path={path}: is a pipe or a device; write the rows to a file"
    assert "no such file" in message("spo", "train_data.path=" + "x" * 300 + ".jsonl")
    assert "no such folder" in message("spo", "actor.model_name=" + "x" * 300)
    for path in ("x" * 300, "~nobody-of-this-name/x.py"):
        assert "no such file" in message("spo", f"rollout.env_path='{path}'")
    text = message("spo", "rollout.engine=vllm", "rollout.server_python=/")
    assert text.startswith("rollout.server_python=/: no executable file")


@pytest.mark.parametrize("separator", ["\\n", "a\\tb", "\\r\\n"])
def test_a_line_break_that_the_shell_did_not_make(message, separator):
    text = message("sft", f"data.separator='{separator}'")
    assert text.startswith(f"data.separator={separator}: holds a backslash and a letter")
    assert text.endswith("""in bash, write one as $'data.separator="\\n"'""")


@pytest.mark.parametrize("separator", ["", " ", "\n", "\n\n### Answer:\n", "\\"])
def test_separators(composed, separator):
    config = composed("sft")
    config.data.separator = separator
    validate(config, 1)


@pytest.mark.parametrize("name, default", [("ppo", 0), ("spo", 0), ("spo_0p5", 0), ("sft", None)])
def test_dropout_is_off_or_the_models_own(composed, name, default):
    assert composed(name).actor.dropout == default
    for value in ("0", "0.0", "null"):
        validate(composed(name, f"actor.dropout={value}"), 1)
