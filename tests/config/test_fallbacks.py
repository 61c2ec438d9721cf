import subprocess

import pytest

from RL2.config import apply_fallbacks
from RL2.runtime.errors import ConfigError

ALL = {"flash_attn", "liger_kernel", "sglang"}


@pytest.mark.parametrize("name", ["ppo", "spo", "spo_0p5", "sft"])
def test_defaults_warn_of_nothing(composed, name):
    for cuda, available in [(False, set()), (False, ALL), (True, ALL), (True, {"vllm"})]:
        assert apply_fallbacks(composed(name), cuda, available) == []


def test_engine_by_what_there_is(composed):
    def engine(cuda, *available, changes=()):
        config = composed("ppo", *changes)
        warnings = apply_fallbacks(config, cuda, set(available))
        return config.rollout.engine, warnings

    assert engine(False, "sglang", "vllm") == ("transformers", [])
    assert engine(True, "vllm", "sglang") == ("sglang", [])
    assert engine(True, "vllm") == ("vllm", [])
    name, (warning,) = engine(True)
    assert name == "transformers"
    assert "neither sglang nor vllm is installed" in warning
    for name in ("sglang", "vllm"):
        with pytest.raises(ConfigError, match=f"rollout.engine={name}: not installed here"):
            engine(False, changes=[f"rollout.engine={name}"])
        for way in ("rollout.server_python=python3", "rollout.server_url=http://127.0.0.1:1"):
            assert engine(False, changes=[f"rollout.engine={name}", way]) == (name, [])
    with pytest.raises(ConfigError, match="rollout.tp_size=2: is only for server engines"):
        engine(False, changes=["rollout.tp_size=2"])


def test_servers_sleep_on_cuda_only(composed):
    def sleep(cuda, *changes):
        config = composed("ppo", "rollout.engine=vllm", "rollout.server_python=python3", *changes)
        return apply_fallbacks(config, cuda, set()), config.rollout.sleep

    assert sleep(True)[1] is True
    assert sleep(True, "rollout.staleness=1")[1] is False
    assert sleep(True, "rollout.sleep=false")[1] is False
    assert sleep(False) == ([], False)
    lines, value = sleep(False, "rollout.sleep=true")
    assert value is False
    assert lines == ["rollout.sleep=true: needs CUDA; the servers stay awake"]


def test_what_only_servers_have_is_ignored_with_a_line(composed):
    config = composed(
        "ppo", "rollout.server_python=python3", "rollout.server_args=[--a]", "rollout.sleep=true",
        "rollout.servers_per_node=2", "rollout.weight_sync=disk", "rollout.weights_dir=here",
    )  # fmt: skip
    lines = apply_fallbacks(config, False, set())
    assert all(line.endswith("the transformers engine starts no server; ignored") for line in lines)
    assert len(lines) == 6
    assert apply_fallbacks(config, False, set()) == []


def test_auto_on_cpu(composed):
    config = composed("ppo")
    apply_fallbacks(config, False, ALL)
    for node in (config.actor, config.ref_actor):
        assert (node.device, node.dtype) == ("cpu", "float32")
        assert node.attn_implementation == "sdpa_varlen"
    assert (config.rollout.engine, config.rollout.dtype) == ("transformers", "float32")


def test_auto_on_cuda(composed):
    config = composed("ppo")
    apply_fallbacks(config, True, ALL)
    assert (config.actor.device, config.actor.dtype) == ("cuda", "auto")
    # whether flash attention can be had follows from the checkpoint's dtype
    assert config.actor.attn_implementation == config.ref_actor.attn_implementation == "auto"
    for overrides, available, attention in [
        ((), set(), "sdpa_varlen"),
        (("actor.dtype=float32",), ALL, "sdpa_varlen"),
        (("actor.dtype=bfloat16",), ALL, "flash_attention_2"),
        (("actor.dtype=bfloat16",), set(), "sdpa_varlen"),
    ]:
        config = composed("ppo", *overrides)
        apply_fallbacks(config, True, available)
        assert config.actor.attn_implementation == attention
        assert config.ref_actor.attn_implementation == attention


@pytest.mark.parametrize("cuda", [True, False])
def test_what_is_saved_follows_a_dtype_that_was_asked_for(composed, cuda):
    for overrides, expected in [
        ((), "auto"),
        (("actor.dtype=float32",), "float32"),
        (("actor.dtype=float32", "trainer.save_dtype=bfloat16"), "bfloat16"),
    ]:
        config = composed("ppo", *overrides)
        apply_fallbacks(config, cuda, ALL)
        assert config.trainer.save_dtype == expected


def test_one_warning_for_each_thing_without_cuda(composed):
    config = composed(
        "spo",
        "rollout.gpu_memory_utilization=0.3",
        "rollout.dtype=bfloat16",
        "rollout.base_port=30000",
        "actor.offload_model=true",
        "actor.offload_optimizer=true",
        "actor.use_liger_kernel=true",
        "actor.attn_implementation=flash_attention_2",
    )
    lines = apply_fallbacks(config, False, ALL)
    assert [line.partition(":")[0] for line in lines] == [
        "actor.attn_implementation=flash_attention_2",
        "actor.use_liger_kernel=true",
        "actor.offload_model=true",
        "actor.offload_optimizer=true",
        "rollout.dtype=bfloat16",
        "rollout.gpu_memory_utilization=0.3",
        "rollout.base_port=30000",
    ]
    assert apply_fallbacks(config, False, ALL) == []
    assert config.ref_actor.use_liger_kernel is False
    assert config.rollout.dtype == "float32"


def test_missing_packages_on_cuda(composed):
    asked = ("actor.attn_implementation=flash_attention_2", "actor.use_liger_kernel=true")
    config = composed("spo", *asked)
    lines = apply_fallbacks(config, True, {"vllm"})
    assert ["not installed" in line for line in lines] == [True, True]
    assert apply_fallbacks(composed("spo", *asked), True, ALL) == []


@pytest.mark.parametrize("group", ["actor", "critic"])
def test_adapters_without_peft(composed, group):
    config = composed("ppo", f"{group}.lora.rank=4")
    with pytest.raises(ConfigError, match=f"^{group}.lora.rank=4: needs peft"):
        apply_fallbacks(config, False, set())


@pytest.mark.parametrize("name", ["ppo", "spo", "sft"])
def test_liger_by_what_there_is(composed, name):
    def liger(cuda, available, *changes):
        config = composed(name, *changes)
        apply_fallbacks(config, cuda, available | {"vllm"})
        nodes = [config[group] for group in ("actor", "ref_actor") if group in config]
        (value,) = {node.use_liger_kernel for node in nodes}
        return value

    assert liger(True, {"liger_kernel"}) is True
    assert liger(True, set()) is liger(False, {"liger_kernel"}) is False
    assert liger(True, {"liger_kernel"}, "actor.device=cpu") is False
    assert liger(True, {"liger_kernel"}, "actor.use_liger_kernel=false") is False
    # torch.compile fuses by itself; who asks for both gets both
    assert liger(True, {"liger_kernel"}, "actor.compile=true") is False
    both = ("actor.compile=true", "actor.use_liger_kernel=true")
    assert liger(True, {"liger_kernel"}, *both) is True


def test_cpu_asked_for_on_a_cuda_machine(composed):
    config = composed("ppo", "actor.device=cpu", "rollout.gpu_memory_utilization=0.3")
    assert len(apply_fallbacks(config, True, ALL)) == 1
    assert (config.actor.dtype, config.rollout.dtype) == ("float32", "float32")


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_triton_without_what_it_needs(composed, name):
    for overrides, cuda in [((), False), (("actor.device=cpu",), True)]:
        config = composed(name, "actor.token_stats=triton", *overrides)
        with pytest.raises(ConfigError, match="^actor.token_stats=triton: needs CUDA.*; use auto"):
            apply_fallbacks(config, cuda, {"triton"})
    config = composed(name, "actor.token_stats=triton")
    with pytest.raises(ConfigError, match="^actor.token_stats=triton: needs triton.*; use auto"):
        apply_fallbacks(config, True, ALL)
    config = composed(name, "actor.token_stats=triton")
    assert apply_fallbacks(config, True, {"triton", "sglang"}) == []
    assert config.actor.token_stats == "triton"
    config = composed(name, "actor.token_stats=triton_fused")
    with pytest.raises(ConfigError, match="^actor.token_stats=triton_fused: needs CUDA"):
        apply_fallbacks(config, False, {"triton"})
    for value in ("auto", "naive", "tiled", "compiled"):
        config = composed(name, f"actor.token_stats={value}")
        assert apply_fallbacks(config, False, set()) == []
        assert config.actor.token_stats == value


def test_triton_for_the_reference_alone(composed):
    config = composed("ppo", "ref_actor.token_stats=triton")
    with pytest.raises(ConfigError, match="^ref_actor.token_stats=triton: needs CUDA"):
        apply_fallbacks(config, False, {"triton"})


def test_cuda_asked_for_without_one(composed):
    with pytest.raises(ConfigError, match="actor.device=cuda: this machine has no CUDA device"):
        apply_fallbacks(composed("sft", "actor.device=cuda"), False, ALL)


@pytest.mark.parametrize(
    ("stop", "spelling"),
    [
        (r"\n", r"""$'"\n"'"""),
        (r"'\n\nQ:'", r"""$'"\n\nQ:"'"""),
        (r"['\t','</a>']", r"""$'["\t","</a>"]'"""),
    ],
)
def test_a_stop_text_that_spells_a_newline_out(composed, stop, spelling):
    config = composed("ppo", f"rollout.train_sampling_params.stop={stop}")
    (line,) = apply_fallbacks(config, False, set())  # the evaluation's follows it
    letter = "t" if "\\t" in stop else "n"
    assert f"has a backslash and the letter {letter}" in line
    assert f"write rollout.train_sampling_params.stop={spelling} in bash" in line
    # Which is what bash and hydra make the character of.
    shell = subprocess.run(["bash", "-c", f"printf %s {spelling}"], capture_output=True, text=True)
    config = composed("ppo", f"rollout.train_sampling_params.stop={shell.stdout}")
    meant = config.rollout.train_sampling_params.stop
    assert ("\t" if letter == "t" else "\n") in (meant if isinstance(meant, str) else meant[0])
    assert apply_fallbacks(config, False, set()) == []


def test_a_stop_text_of_the_evaluation_alone(composed):
    config = composed("ppo", r"rollout.test_sampling_params.stop=a\r")
    (line,) = apply_fallbacks(config, False, set())
    assert line.startswith(r"rollout.test_sampling_params.stop=a\r: has a backslash and the")
