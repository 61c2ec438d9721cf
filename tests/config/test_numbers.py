"""Numbers that a config may hold."""

import pytest

from RL2.config import validate
from RL2.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("actor.lr", "1e-50", "actor.lr=1e-50: is 0 in float32; give 0, or at least 1.2e-38"),
        ("actor.kl.coef", "1e39", "actor.kl.coef=1e+39: must be at most 3.4e+38, the largest num"),
        ("actor.entropy.coef", "-1e39", "actor.entropy.coef=-1e+39: must be at most 3.4e+38"),
        ("actor.temperature", "1e-40", "actor.temperature=1e-40: is 0 in float32"),
        ("actor.max_grad_norm", "1e300", "actor.max_grad_norm=1e+300: must be at most"),
        ("actor.tis_coef", "1e-310", "actor.tis_coef=1e-310: is 0 in float32"),
        ("rollout.env_timeout", "1e30", "rollout.env_timeout=1e+30: must be at most 100000000 sec"),
        (
            "trainer.rank_timeout",
            "1e9",
            "trainer.rank_timeout=1000000000.0: must be at most 100000000 s",
        ),
        ("trainer.max_steps", f"{10**30}", f"trainer.max_steps={10**30}: must be less than 9"),
    ],
)
def test_numbers_that_would_overflow_or_vanish(composed, key, value, said):
    with pytest.raises(ConfigError) as caught:
        validate(composed("spo", f"{key}={value}"), 1)
    assert str(caught.value).startswith(said)


def test_small_and_large_numbers_that_mean_something(composed):
    validate(composed("spo", "actor.lr=1e-30", "actor.kl.coef=0", "actor.max_grad_norm=1e38"), 1)
