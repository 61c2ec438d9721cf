"""Rollouts of the policy."""

import logging
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.config.engines import SERVERS
from RL2.config.models import context_length
from RL2.datasets import RLDataset, make_loader
from RL2.datasets.end_of_turn import EndTokens
from RL2.distributed import rank, second_group, world_size
from RL2.engines.registry import build_engine, engine_maker
from RL2.environments.calls import MAX_ANSWER
from RL2.environments.environment import load_environment
from RL2.rollout import Collector
from RL2.rollout.judges.judge import fields_of, resolve_judges
from RL2.rollout.samples import staleness
from RL2.runtime.event_loop import in_thread
from RL2.trainer.sources.context import longest_context, resolve_context
from RL2.trainer.sources.source import Result, Source
from RL2.trainer.sources.stream import PromptStream
from RL2.workers import Actor

logger = logging.getLogger(__name__)

# Seconds for what is generated ahead when a run is asked to stop; torchrun kills it after 30.
_GRACE_AHEAD = 5.0


class RolloutSource(Source):
    """Prompts, answered by an engine that serves the actor's weights, graded by an environment.

    With `rollout.staleness=1` the next step is generated while this one trains: `collect` hands
    out what is ready and begins the next one, and `wait` waits for that.
    """

    groups = ("train_data", "test_data", "rollout")
    ends = "rollouts stop"

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, ends: EndTokens):
        self.config, self.tokenizer = config, tokenizer
        if ":" in (engine := str(config.rollout.engine)):
            engine_maker(engine)  # a file of the user: report its faults now
        self.end_tokens, self.end_ids = ends, ends.ids
        self.judges = resolve_judges(config.rollout.get("judges") or (), config.rollout)
        self.environment = load_environment(
            config.rollout.env_path,
            timeout=config.rollout.env_timeout,
            workers=config.rollout.env_workers,
        )
        longest = config.actor.max_length_per_device * config.actor.sp_size
        longest = min(longest, context_length(config.actor.model_name) or longest)
        longest -= config.rollout.train_sampling_params.max_new_tokens
        # Only worker processes have the limit; null means one for each core.
        limit = None if config.rollout.env_workers == 0 else MAX_ANSWER
        self.train = RLDataset(
            config.train_data, tokenizer, key="train_data", max_extra_info=limit,
            max_prompt_length=config.train_data.max_prompt_length or longest,
            context=resolve_context(config), max_context_length=longest_context(config),
        )  # fmt: skip
        self.contexts = self.train.contexts
        self.test = None
        if config.test_data.path is not None:
            self.test = RLDataset(
                config.test_data, tokenizer, key="test_data", max_extra_info=limit,
                max_prompt_length=config.test_data.max_prompt_length or longest,
            )  # fmt: skip
        self.n_prompts = config.train_data.prompts_per_rollout
        loader = make_loader(self.train, self.n_prompts, seed=config.trainer.seed)
        self.steps_per_epoch = len(loader)
        self.prompts = PromptStream(self.train, loader)
        self.datasets, self.rows = {"train_data": self.train}, {}
        if config.train_data.path is not None:
            self.rows["training rows"] = len(self.train)
        if self.test is not None:
            self.datasets["test_data"], self.rows["test rows"] = self.test, len(self.test)
        self.per_step = (
            f"{self.n_prompts} prompts x {config.train_data.responses_per_prompt} responses each"
        )
        self._warn_if_no_end_token()
        self.collector: Collector | None = None
        self.ahead = config.rollout.staleness > 0
        # What is generated ahead: its result or error, and the state before it.
        self._pending: tuple[Future[Result], dict[str, Any]] | None = None

    @classmethod
    def brings(cls, config: DictConfig) -> tuple[str, ...]:
        of_judges = fields_of(resolve_judges(config.rollout.get("judges") or (), config.rollout))
        several = ("reward_parts", "reward_weights") if config.rollout.get("rewards") else ()
        return ("rewards", "llm_logps", "correct", "group_ids", "turn_ids", *several, *of_judges)

    def _warn_if_no_end_token(self) -> None:
        sampling = self.config.rollout.train_sampling_params
        if not self.end_ids and not sampling.stop:
            logger.warning(
                "actor.model_name=%s: has no end token in generation_config.json, config.json, its "
                "tokenizer or its chat template, so every response runs to "
                "rollout.train_sampling_params.max_new_tokens=%d; set eos_token in its "
                "tokenizer_config.json, or give rollout.train_sampling_params.stop",
                self.config.actor.model_name, sampling.max_new_tokens,
            )  # fmt: skip

    @property
    def unwritten(self) -> tuple[Path, OSError] | None:
        return self.collector.unwritten

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the engine, or start its servers. It serves the actor after `publish`."""
        if self.config.rollout.dtype == "auto":  # on CUDA: one dtype for both
            self.config.rollout.dtype = str(dtype).removeprefix("torch.")
        drivers = self._drivers()
        for judge in self.judges:
            if judge.start is not None and rank() in drivers:
                judge.start(self.tokenizer, device)
        engine = build_engine(self.config, self.tokenizer, device) if rank() in drivers else None
        dumps = Path(self.config.trainer.save_dir) / "rollouts"
        self.collector = Collector(
            self.config.rollout,
            self.tokenizer,
            engine,
            seed=self.config.trainer.seed,
            environment=self.environment,
            rollouts_dir=dumps if self.config.trainer.dump_rollouts else None,
            rank=rank(),
            n_ranks=world_size(),
            drivers=drivers,
            group=second_group(),
            test_responses_per_prompt=self.config.test_data.responses_per_prompt,
            max_length=self.config.actor.max_length_per_device * self.config.actor.sp_size,
            device=device,
            ends=self.end_tokens,
            n_shown=self.config.trainer.show_samples,
            judges=self.judges,
        )

    def _drivers(self) -> tuple[int, ...]:
        """The ranks with an engine: all of them in process, one per machine with servers, the first
        one with external servers."""
        if self.config.rollout.engine not in SERVERS or world_size() == 1:
            return tuple(range(world_size()))
        if self.config.rollout.server_url is not None:
            return (0,)
        local_ranks = [None] * world_size()
        dist.all_gather_object(local_ranks, int(os.environ.get("LOCAL_RANK", "0")))
        return tuple(which for which, local in enumerate(local_ranks) if local == 0)

    def collect(self, step: int, last: bool) -> Result:
        if self._pending is None:
            result = self._generate(step)
        else:
            result, self._pending = self._pending[0].result(), None
        if self.ahead and not last:
            state = self._state()
            ahead = in_thread(lambda: self._generate(step + 1), "rollout-ahead")
            self._pending = ahead, state
        batch, metrics = result
        if batch is not None:
            metrics["rollout/staleness"] = staleness(batch, step - 1)
        return batch, metrics

    def wait(self) -> None:
        """Wait for what is generated ahead; raises its errors."""
        if self._pending is not None:
            self._pending[0].result()

    def evaluates(self, step: int) -> bool:
        frequency = self.config.trainer.test_freq
        return self.test is not None and frequency is not None and step % frequency == 0

    def evaluate(self, step: int) -> dict[str, float]:
        """Greedy score on the whole test set, and with `trainer.test_sampled` also a score sampled
        as in training (metrics on rank 0)."""
        self.wait()
        self._wake()
        items = [self.test[i] for i in range(len(self.test))]
        metrics = self.collector.collect(items, step, train=False)[1]
        if self.config.trainer.test_sampled:
            again = self.collector.collect(items, step, train=False, sampled=True)[1]
            metrics |= {name: again[name] for name in again if not name.startswith("test/")}
            if "test/score" in again:
                metrics["test/sampled_score"] = again["test/score"]
        return metrics

    def interrupt(self) -> None:
        """Stop generating: waiting for a rollout or an evaluation, now or later, raises
        Interrupted on every rank. May be called from any thread.

        What is generated ahead gets some seconds to finish: a resumed run has newer weights, and
        would generate something else.
        """
        if not self.ahead:
            self.collector.interrupt()
            return
        timer = threading.Timer(_GRACE_AHEAD, self.collector.interrupt)
        timer.daemon = True
        timer.start()

    def serves(self, step: int) -> bool:
        return True

    def publish(self, actor: Actor, step: int) -> None:
        """Serve the actor's weights from now on (a collective)."""
        self.wait()
        self._wake()
        self.collector.update_weights(actor.weights(), version=step)

    def _generate(self, step: int) -> Result:
        self._wake()
        result = self.collector.collect_step(self.prompts.draw, self.n_prompts, step)
        if self.config.rollout.sleep:
            self.collector.sleep()
        return result

    def _wake(self) -> None:
        if self.config.rollout.sleep:
            self.collector.wake()

    def state_dict(self) -> dict[str, Any]:
        """All that decides what is generated next: the position in the data, failures counted so
        far, groups carried to the next step, and what was generated ahead. If the last is not
        complete, a resumed run generates it again."""
        if self._pending is None:
            return self._state()
        ahead, before = self._pending
        if not ahead.done() or ahead.exception():
            return before
        batch, metrics = ahead.result()
        return self._state() | {"ahead": {"batch": batch, "metrics": dict(metrics)}}

    def _state(self) -> dict[str, Any]:
        state = {"rollout": self.collector.state_dict()}
        # What is the same on all ranks is kept once.
        return state | {"prompts": self.prompts.state_dict()} if rank() == 0 else state

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue where `state_dict` was called on all ranks of a run with any number of ranks.

        Groups that cannot be continued, as the number of responses has changed or steps no longer
        overlap, are drawn again.
        """
        rollouts = [state["rollout"] for state in states]
        carried = [group for rollout in rollouts for group in rollout["carried"]]
        items = [self.train[group["index"]] for group in carried]
        n_samples = {len(group["samples"]) for group in carried}
        n_responses = self.config.rollout.responses_per_prompt
        goes_on = self.config.rollout.partial_rollout and n_samples <= {n_responses}
        self.prompts.load_state_dict(states[0]["prompts"], again=[] if goes_on else items)
        if not goes_on:
            rollouts, items = [rollout | {"carried": []} for rollout in rollouts], []
        self.collector.load_state_dict(rollouts, items)
        if "ahead" in states[0]:
            ahead: Future[Result] = Future()
            saved = states[0]["ahead"] if rank() == 0 else {"batch": None, "metrics": {}}
            ahead.set_result((saved["batch"], saved["metrics"]))
            self._pending = ahead, self._state()

    def close(self) -> None:
        if self.collector is not None:
            self.collector.close()
