"""The teacher, and runs without rewards."""

from omegaconf import DictConfig, OmegaConf

from RL2.config.flat import as_text
from RL2.config.models import POLICY, check_model
from RL2.config.schema import keys_of
from RL2.config.schema.model import SFTTeacherConfig, TeacherConfig
from RL2.runtime.errors import ConfigError


def check_model_of_teacher(teacher: DictConfig) -> None:
    if teacher.model_name not in (None, POLICY):
        check_model(teacher, "teacher")


def check_keys_of_teacher(teacher: DictConfig, actor: DictConfig) -> None:
    """Keys of a model that is not loaded. In a run's config.yaml they have the actor's values."""
    if teacher.model_name not in (None, POLICY):
        return
    unset = [keys_of(kind) for kind in (SFTTeacherConfig, TeacherConfig)]
    for name in teacher:
        if name in ("model_name", "context", "import_path", "top_k"):
            continue
        if OmegaConf.is_interpolation(teacher, name):
            continue
        defaults = [keys[name].default for keys in unset]
        followed = [actor.get(str(one).removeprefix("${actor.").rstrip("}")) for one in defaults]
        if teacher[name] in (*defaults, *followed):
            continue
        given = f"teacher.{name}={as_text(teacher[name])}: has no effect "
        if teacher.model_name is None:
            raise ConfigError(f"{given}without teacher.model_name; set that, or leave it out")
        raise ConfigError(
            f"{given}with teacher.model_name=policy, which is the actor itself; leave it out, or "
            f"set actor.{name}"
        )


def check_rewards(
    rollout: DictConfig, test_data: DictConfig, train_data: DictConfig, actor: DictConfig
) -> None:
    """What needs rewards in a run that has none. Losses and estimators that read them are found
    where they are resolved."""
    if rollout.env_path is not None:
        return
    none = "with rollout.env_path=null every sample gets 0"
    if rollout.dynamic_filtering and train_data.responses_per_prompt > 1:
        raise ConfigError(
            "rollout.dynamic_filtering=true: leaves out prompts whose samples all got the same "
            f"reward, and {none}; set rollout.dynamic_filtering=false"
        )
    if actor.avg_level == "correct":
        raise ConfigError(
            f"actor.avg_level=correct: learns from samples with a reward above 0, and {none}; use "
            "token or sequence"
        )
    if test_data.path is not None:
        raise ConfigError(
            f"test_data.path={test_data.path}: has nothing to score with, as {none}; give the "
            "environment in rollout.env_path, or leave it out"
        )
    if train_data.path is None:
        raise ConfigError(
            "train_data.path=null: needs an environment that writes the prompts, in "
            "rollout.env_path; give one, or a data set"
        )


def check_context(teacher: DictConfig, rollout: DictConfig, train_data: DictConfig) -> None:
    """The prompt that only the teacher sees, and a teacher that is the policy."""
    names = [name for name in ("context", "import_path") if teacher[name] is not None]
    if teacher.model_name == POLICY and not names:
        raise ConfigError(
            "teacher.model_name=policy: teaches the policy nothing unless it sees more; give its "
            "prompt: 'teacher.context=\"{prompt} The answer is {answer}.\"'"
        )
    if not names:
        return
    key = f"teacher.{names[-1]}={teacher[names[-1]]}"
    if len(names) > 1:
        raise ConfigError(f"{key}: is used instead of teacher.context; leave one of the two out")
    if teacher.model_name is None:
        raise ConfigError(f"{key}: has no effect without teacher.model_name; set that to policy")
    if rollout.max_turns > 1:
        raise ConfigError(
            f"{key}: replaces the prompt of a single turn, but rollout.max_turns="
            f"{rollout.max_turns}; use 1"
        )
    if train_data.path is None:
        raise ConfigError(
            f"{key}: replaces prompts of train_data.path, which is null; give a data set"
        )
