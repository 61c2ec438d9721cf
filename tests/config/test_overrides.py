import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser

from RL2.config import check_overrides, composition_error, register_schemas
from RL2.runtime.errors import ConfigError
from RL2.trainer.registries import registry_of


def message(*argv: str, name: str = "spo") -> str:
    with pytest.raises(ConfigError) as caught:
        check_overrides(name, argv, registry_of)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["actor.lr=1e-5", "actor.entropy.coef=-0.1", "trainer.seed=3"],
        ["actor.clip=null", "trainer.save_freq=null", "adv.estimator=reinforce"],
        ["actor.kl={coef: 0.1, type: loss}", "trainer.save_dir=${trainer.project}"],
        ["actor.loss.options.beta=0.1"],
        ["+actor.loss.options.beta=0.1", "++actor.loss.options.deep.er=x"],
        ["actor.loss.options={beta:0.1}", "~actor.loss.options.beta"],
        ["rollout.train_sampling_params.stop=['a','b']"],
        ["actor.lr=1", "--cfg", "job"],
        ["-m", "actor.lr=1e-5,1e-6", "trainer.seed=range(3)", "hydra/launcher=basic"],
        ["hydra.mode=MULTIRUN", "actor.avg_level=token,sequence"],
        ["hydra.run.dir=/nowhere", "--config-dir", "conf"],
        ["-m", "actor.lr=interval(1e-6,1e-5)"],
    ],
)
def test_accepted(argv):
    check_overrides("spo", argv, registry_of)


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_unknown_key(prefix):
    text = message(f"{prefix}actor.temprature=1")
    assert text.startswith(
        f"{prefix}actor.temprature=1: unknown key; did you mean actor.temperature"
    )


def test_unknown_key_advice():
    assert "did you mean actor.lr or critic.lr?" in message("lr=1e-6")
    assert "did you mean rollout.env_path?" in message("trainer.env_path=x")
    assert "the keys of actor.kl are coef, type" in message("actor.kl.zzz=1")
    assert "the groups are train_data, test_data, actor" in message("qqq=1")
    assert "critic.lrr=1: unknown key; did you mean critic.lr?" in message("critic.lrr=1")
    assert "unknown key" in message("critic.temperature=1")  # it has no distribution
    assert "actor.kl.cof=1: unknown key; did you mean actor.kl.coef" in message("actor.kl={cof:1}")
    assert "unknown key" in message("rollout.engine=auto", name="sft")
    assert "adv.options" not in message("adv.estimator=gae", name="dpo")


def test_deleted_key():
    assert message("~actor.kl") == "~actor.kl: a key cannot be removed; set it to a value instead"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.lr=abc", "actor.lr=abc: not a number"),
        ("++actor.lr=abc", "++actor.lr=abc: not a number"),
        ("actor.lr=true", "actor.lr=true: not a number"),
        ("actor.lr=null", "actor.lr=null: must not be null; give a number"),
        ("actor.update_per_rollout=1.5", "actor.update_per_rollout=1.5: not a whole number"),
        (
            "trainer.max_steps=1e3",
            "trainer.max_steps=1e3: not a whole number or null as it is written; use "
            "trainer.max_steps=1000",
        ),
        ("trainer.max_steps=inf", "trainer.max_steps=inf: not a whole number or null"),
        ("trainer.save_freq=often", "trainer.save_freq=often: not a whole number or null"),
        ("trainer.use_wandb=maybe", "trainer.use_wandb=maybe: not true or false"),
        ("trainer.project=[a]", "trainer.project=[a]: not a text"),
        ("actor.loss.options=3", "actor.loss.options=3: not a mapping {name: value}"),
        ("actor=3", "actor=3: actor is a group; set one of its keys: model_name"),
        ("actor.kl={coef:x}", "actor.kl.coef=x: not a number"),
        (
            "actor.avg_level=tokn",
            "actor.avg_level=tokn: not an avg_level; use token, sequence or correct (did you mean "
            "token?)",
        ),
        (
            "actor.kl.type=los",
            "actor.kl.type=los: not a type; use loss, reward, advantage or null (did you mean "
            "loss?)",
        ),
        (
            "adv.estimator=gea",
            "adv.estimator=gea: not an estimator; use reinforce, spo, gae, ",
        ),
    ],
)
def test_wrong_type(override, expected):
    for name in ("ppo", "spo", "spo_0p5"):
        assert message(override, name=name).startswith(expected)


def test_sweeps():
    text = message("actor.lr=1e-5,1e-6")
    assert "--multirun" in text and "'actor.lr=\"1e-5,1e-6\"'" in text
    assert message("-m", "actor.lr=1e-5,x") == "actor.lr=1e-5,x: not a number"


def test_not_an_override():
    assert "not an override" in message("actor.lr")
    assert "quote a value" in message("trainer.project=a=(b")


def test_users_config_group(tmp_path):
    (tmp_path / "experiment").mkdir()
    check_overrides("spo", ["+experiment=mine", "--config-dir", str(tmp_path)], registry_of)
    assert "unknown key" in message("+experiment=mine")


@pytest.mark.parametrize("flag", ["--actor.lr=1", "--foo", "-x"])
def test_unknown_flag(flag):
    assert message(flag).startswith(f"{flag}: unknown flag; a key is set by key=value without")


LR, SEED = "actor.lr=0.1", "trainer.seed=1"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([LR, "--resolve", SEED, "-c", "job"], [LR, SEED, "--resolve", "-c", "job"]),
        (["--cfg", "job", LR, "-p", "actor"], [LR, "--cfg", "job", "-p", "actor"]),
        ([LR, "-cd", LR, SEED], [LR, SEED, "-cd", LR]),  # a folder of that name
        (["-m", "--config-dir=x=y"], ["-m", "--config-dir=x=y"]),
    ],
)
def test_overrides_come_before_flags(argv, expected):
    """hydra's parser takes no override behind a flag that stands between them."""
    found = check_overrides("spo", argv, registry_of)
    assert found == expected
    get_args_parser().parse_args(found)  # as hydra does; it would exit


def test_a_word_behind_a_flag_is_no_override():
    assert message(LR, "--cfg", "job", "foo").startswith("foo: not an override")


def test_bad_flag():
    text = message("--cfg", "nonsense")
    assert "invalid choice: 'nonsense'" in text and "\n" not in text


def test_added_key_that_is_there():
    assert message("+actor.lr=1") == "+actor.lr=1: the key exists already; leave out the +"


def test_lists_and_numbers_for_true():
    assert message("rollout.server_args=x").endswith("not a list of texts [one,two]")
    assert message("actor.betas=0.9").endswith("not a list of numbers [0.9,0.99]")
    assert message("rollout.server_args=null").endswith("give a list of texts [one,two]")
    assert message("trainer.use_wandb=2") == "trainer.use_wandb=2: not true or false or null"
    assert message("trainer.async_save=2") == "trainer.async_save=2: not true or false"


def test_overrides_of_a_users_own_file(tmp_path):
    flags = ("--config-dir", str(tmp_path), "--config-name", "mine")
    assert "did you mean actor.lr" in message(*flags, "++actor.lrr=1")
    assert message(*flags, "actor.lr=fast") == "actor.lr=fast: not a number"


FILES = {
    "unknown key": ("actor: {lrr: 3}", "actor.lrr (in mine.yaml): unknown key; did you mean actor"),
    "unknown group": ("foo: 3", "foo (in mine.yaml): unknown key; the groups are train_data"),
    "wrong type": ("actor: {lr: fast}", "actor.lr (in mine.yaml): the configuration cannot be"),
    "not yaml": ("actor: [", "the configuration cannot be composed (while parsing a flow"),
    "key twice": ("trainer: {seed: 1, seed: 2}", "found duplicate key seed"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_hydra_finds_is_one_line(tmp_path, case):
    text, expected = FILES[case]
    ours = "hydra: {searchpath: [pkg://RL2.trainer.config]}"
    (tmp_path / "mine.yaml").write_text(f"defaults: [spo, _self_]\n{ours}\n{text}\n")
    register_schemas()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        with pytest.raises(Exception) as caught:  # noqa: B017  hydra's, yaml's: it may be any
            compose("mine")
    line = str(composition_error(caught.value, "spo"))
    assert expected in line and "\n" not in line and "+" not in line
    assert "begins with `defaults: [spo, _self_]`" in line or "unknown key" in line
