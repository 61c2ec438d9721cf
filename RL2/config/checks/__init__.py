"""Checks of a composed config: what types and ranges cannot say, before anything is built.

Each file says what it checks. The parameters of a check are the groups that it reads. It runs for
the configs that have all of them: a check of `rollout` does not run for sft. `world_size` is the
number of processes.
"""

from collections.abc import Callable

from omegaconf import DictConfig

from RL2.config.checks import actor, data, form, lengths, mesh, objective, rollout, teacher, trainer
from RL2.config.groups import call_each
from RL2.config.numbers import check_numbers
from RL2.config.schema import schema_of

CHECKS: tuple[Callable[..., None], ...] = (
    mesh.check_actor,
    mesh.check_ref_actor,
    mesh.check_critic,
    mesh.check_teacher,
    mesh.check_rollout,
    actor.check_actor,
    actor.check_liger_of_ref,
    actor.check_critic,
    actor.check_liger_of_teacher,
    rollout.check_server_url,
    rollout.check_server_args,
    rollout.check_server_files,
    rollout.check_what_follows,
    rollout.check_stops,
    rollout.check_environment,
    rollout.check_reward_model,
    rollout.check_batches,
    lengths.check_context,
    lengths.check_responses,
    lengths.check_inference,
    lengths.check_inference_of_critic,
    lengths.check_teacher,
    objective.check_importance,
    objective.check_kl,
    objective.check_kl_of_loss,
    objective.check_renewal,
    objective.check_reference,
    teacher.check_model_of_teacher,
    teacher.check_keys_of_teacher,
    teacher.check_rewards,
    teacher.check_context,
    objective.check_clip,
    objective.check_advantages,
    objective.check_ratio,
    objective.check_updates,
    data.check_prompts,
    data.check_evaluation,
    objective.check_sft_average,
    lengths.check_sft_rows,
    data.check_separator,
    data.check_rows,
    data.check_held_out,
    trainer.check_folder_names,
    trainer.check_health,
    trainer.check_checkpoint,
    trainer.check_trackers_agree,
    trainer.check_wandb_project,
)


def validate(config: DictConfig, world_size: int) -> None:
    """Check a composed config; touches the file system, never the network.

    Args:
        config: composed by hydra from a yaml file of `RL2/trainer/config`; not changed.
        world_size: number of processes of the run.

    Raises:
        ConfigError: the first problem, in one line.
    """
    schema = schema_of(config)
    form.check_keys(config, schema)
    form.check_required(config, schema)
    form.check_interpolations(config)
    form.check_ranges(config, schema)
    check_numbers(config, schema)
    for _ in call_each(CHECKS, config, world_size=world_size):
        pass  # a check raises
