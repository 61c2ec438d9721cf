"""Sizes that divide the number of processes."""

from RL2.config import validate


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
