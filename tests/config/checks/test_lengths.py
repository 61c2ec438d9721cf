"""Whether the longest sequence fits."""

from RL2.config import validate


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
