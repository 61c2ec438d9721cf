"""What a step learns from: rollouts of the policy, or rows of a data set."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.datasets import RLDataset, SFTDataset, collate, make_loader
from RL2.distributed import full_tensors, rank, world_size
from RL2.distributed.comm import Batch
from RL2.rollout import Collector, build_engine, load_environment
from RL2.workers import Actor

logger = logging.getLogger(__name__)


class RolloutSource:
    """Prompts, answered by an engine that serves the actor's weights, graded by an environment.

    Args:
        config: the whole run's config.
        tokenizer: of the actor.
    """

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer = config, tokenizer
        self.environment = load_environment(
            config.rollout.env_path, timeout=config.rollout.env_timeout
        )
        longest = (
            config.actor.max_length_per_device - config.rollout.train_sampling_params.max_new_tokens
        )
        self.train = RLDataset(
            config.train_data, tokenizer, key="train_data",
            max_prompt_length=config.train_data.max_prompt_length or longest,
        )  # fmt: skip
        self.test = None
        if config.test_data.path is not None:
            self.test = RLDataset(
                config.test_data, tokenizer, key="test_data",
                max_prompt_length=config.test_data.max_prompt_length or longest,
            )  # fmt: skip
        self.loader = make_loader(
            self.train, config.train_data.prompts_per_rollout, seed=config.trainer.seed
        )

    def start(self, device: torch.device) -> None:
        """Load the engine. Until `publish`, it serves the model it was loaded from."""
        rollout = self.config.rollout
        engine = build_engine(
            rollout.engine,
            model_name=rollout.model_name,
            dtype=rollout.dtype,
            device=device,
            tokenizer=self.tokenizer,
            max_batch_size=rollout.max_batch_size,
            trust_remote_code=self.config.actor.trust_remote_code,
        )
        dumps = Path(self.config.trainer.save_dir) / "rollouts"
        self.collector = Collector(
            rollout,
            self.tokenizer,
            engine,
            seed=self.config.trainer.seed,
            environment=self.environment,
            rollouts_dir=dumps if self.config.trainer.dump_rollouts else None,
            rank=rank(),
            n_ranks=world_size(),
            test_responses_per_prompt=self.config.test_data.responses_per_prompt,
            max_length=self.config.actor.max_length_per_device,
        )

    def collect(self, items: list[Any], step: int) -> tuple[Batch | None, dict[str, float]]:
        return self.collector.collect(items, step, train=True)

    def evaluate(self, step: int) -> dict[str, float]:
        """Greedy score on the whole test set (metrics on rank 0)."""
        if self.test is None:
            return {}
        items = [self.test[i] for i in range(len(self.test))]
        return self.collector.collect(items, step, train=False)[1]

    def publish(self, actor: Actor, step: int) -> None:
        """Serve the actor's weights from now on (a collective)."""
        self.collector.update_weights(full_tensors(actor.hf_model), version=step)

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and the failures that `rollout.max_env_errors` has counted."""
        return {"loader": self.loader.state_dict(), "env_errors": self.collector.env_errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.collector.env_errors = state["env_errors"]

    def close(self) -> None:
        if hasattr(self, "collector"):
            self.collector.close()


class DatasetSource:
    """Rows of a data set as they are, every response token an action of advantage 1."""

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase):
        self.data = SFTDataset(config.data, tokenizer, key="data")
        self.loader = make_loader(self.data, config.data.batch_size, seed=config.trainer.seed)

    def start(self, device: torch.device) -> None:
        """Nothing to load."""

    def collect(self, items: list[Any], step: int) -> tuple[Batch | None, dict[str, float]]:
        if rank() != 0:
            return None, {}
        batch = collate(items)
        ones = torch.ones(len(items), dtype=torch.bool)
        batch |= {"advantages": batch["action_mask"].float(), "correct": ones}
        return batch, {"train/avg_response_length": batch["action_mask"].sum().item() / len(items)}

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def publish(self, actor: Actor, step: int) -> None:
        """Nobody else holds the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return {"loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])

    def close(self) -> None:
        """Nothing is open."""
