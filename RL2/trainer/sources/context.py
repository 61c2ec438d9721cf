"""The prompt of a teacher that reads another one than the policy."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from RL2.algorithms.parameters import import_function
from RL2.config.models import POLICY, context_length
from RL2.datasets.context import Context, Prompt, by_template
from RL2.datasets.rows import BadRow
from RL2.runtime.errors import raised
from RL2.runtime.user_code import file_of


def resolve_context(config: DictConfig) -> Context | None:
    """What `teacher.context` or `teacher.import_path` makes of a prompt; None without them.

    Raises:
        ConfigError: a function that cannot be imported.
    """
    node = config.teacher
    if node.import_path is None:
        return None if node.context is None else by_template(node.context)
    origin = f"teacher.import_path={node.import_path}"
    function = import_function(node.import_path, origin, "my_context.py:my_context")

    def context(prompt: Prompt, extra_info: dict[str, Any]) -> Prompt:
        try:
            made = function(prompt, extra_info)
        except Exception as error:  # user code may raise anything
            raise BadRow(f"{origin}: it {raised(error, file_of(function))}") from error
        if isinstance(prompt, str):
            fits, what = isinstance(made, str), "a text"
        else:
            fits = isinstance(made, list) and all(isinstance(one, dict) for one in made)
            what = 'a list of {"role", "content"}'
        if not fits or not made:
            raise BadRow(
                f"{origin}: it returned {made!r:.80} for a prompt that is {what}; return one too"
            )
        return made

    return context


def longest_context(config: DictConfig) -> int:
    """The most tokens that the teacher's prompt may have."""
    name = "actor" if config.teacher.model_name == POLICY else "teacher"
    node = config[name]
    longest = node.max_inference_length_per_device * node.sp_size
    longest = min(longest, context_length(node.model_name or "") or longest)
    return longest - config.rollout.train_sampling_params.max_new_tokens
