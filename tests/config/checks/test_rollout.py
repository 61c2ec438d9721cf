"""Rollouts: servers, the environment, batches."""

import pytest

from RL2.config import validate


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
    assert text.startswith("rollout.server_python=nowhere/python: not an executable file")
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


def test_a_reward_model_and_its_judge_need_each_other(message, composed, workdir):
    judges, key = "rollout.judges=[reward_model]", "rollout.reward_model.model_name"
    assert message("ppo", judges).startswith(f"{judges}: has no model; give {key}")
    assert message("ppo", f"{key}=a/b").startswith(f"{key}=a/b: has no effect without the judge")
    assert message("ppo", judges, f"{key}=nothing").startswith(f"{key}=nothing: ")
    validate(composed("ppo", judges, f"{key}=a/b"), 1)


def test_overlong_shaping(message, composed):
    assert message("ppo", "rollout.overlong_buffer=257") == (
        "rollout.overlong_buffer=257: more than all "
        "rollout.train_sampling_params.max_new_tokens=256; lower it"
    )
    assert message("ppo", "rollout.overlong_buffer=8", "rollout.truncated=zero").startswith(
        "rollout.overlong_buffer=8: an answer that was cut off would get reward 0"
    )
    assert message("ppo", "rollout.overlong_penalty=0.5").startswith(
        "rollout.overlong_penalty=0.5: has no effect with rollout.overlong_buffer=0"
    )
    validate(composed("ppo", "rollout.overlong_buffer=256", "rollout.truncated=mask"), 1)
