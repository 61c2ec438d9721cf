import pytest

from RL2.config import ConfigError, apply_fallbacks

ALL = {"flash_attn", "liger_kernel"}


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_defaults_warn_of_nothing(composed, name):
    for cuda, available in [(False, set()), (False, ALL), (True, set()), (True, ALL)]:
        assert apply_fallbacks(composed(name), cuda, available) == []


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
    assert config.ref_actor.attn_implementation == "flash_attention_2"
    for overrides, available in [((), set()), (("actor.dtype=float32",), ALL)]:
        config = composed("ppo", *overrides)
        apply_fallbacks(config, True, available)
        assert config.actor.attn_implementation == "sdpa_varlen"


def test_one_warning_for_each_thing_without_cuda(composed):
    config = composed(
        "spo",
        "rollout.gpu_memory_utilization=0.3",
        "rollout.dtype=bfloat16",
        "rollout.base_port=30000",
        "actor.offload_model=true",
        "actor.offload_optimizer=true",
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
    config = composed("spo", "actor.attn_implementation=flash_attention_2")
    lines = apply_fallbacks(config, True, set())
    assert ["not installed" in line for line in lines] == [True, True]
    assert apply_fallbacks(composed("spo"), True, ALL) == []


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
    assert apply_fallbacks(config, True, {"triton"}) == []
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
