import pytest
import torch

from RL2.distributed import Traffic
from RL2.runtime.errors import ConfigError
from RL2.trainer.startup.models import load_reference, said_of
from tests.trainer.support import composed, overrides, write_files


def test_what_is_wrong_with_the_reference_is_said_of_it(tmp_path):
    write_files(tmp_path)
    (tmp_path / "model/generation_config.json").write_text('{"max_new_tokens": -1}')
    lines = overrides(tmp_path, "spo", tmp_path / "out")
    node = composed("spo", lines)
    with pytest.raises(ConfigError, match=r"^ref_actor.model_name=.*\(`max_new_tokens` must be"):
        load_reference(node, torch.device("cpu"), Traffic())


def test_each_key_in_what_is_said_of_a_model_is_its_own():
    text = "actor.tp_size=4: of /x/actor.y; use ref_actor.x, or actor.sp_size"
    expected = "critic.tp_size=4: of /x/actor.y; use ref_actor.x, or critic.sp_size"
    with pytest.raises(ConfigError) as error, said_of("critic"):
        raise ConfigError(text)
    assert str(error.value) == expected
