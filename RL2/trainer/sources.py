"""What a step learns from: rollouts of the policy, or rows of a data set."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from RL2.config.engines import SERVERS
from RL2.config.models import context_length
from RL2.datasets import RLDataset, SFTDataset, collate, make_loader
from RL2.datasets.end_of_turn import EndTokens, end_tokens
from RL2.distributed import rank, second_group, world_size
from RL2.distributed.comm import Batch
from RL2.engines.registry import build_engine
from RL2.environments.environment import load_environment
from RL2.environments.worker import MAX_ANSWER
from RL2.ops.fp32 import without_switching
from RL2.rollout import Collector
from RL2.rollout.samples import staleness
from RL2.runtime.event_loop import in_thread
from RL2.workers import Actor

logger = logging.getLogger(__name__)

# Seconds for what is generated ahead when a run is asked to stop; torchrun kills it after 30.
_GRACE_AHEAD = 5.0

Result = tuple[Batch | None, dict[str, float]]


class PromptStream:
    """The batches of a loader as one stream, epoch after epoch, from which any number is drawn.

    Its state is exact wherever it stands: that of the loader before the batch that is being used
    up, and how much of that is gone.
    """

    def __init__(self, dataset: Dataset, loader: StatefulDataLoader):
        self.dataset, self.loader = dataset, loader
        self._first: list[Any] = []  # what comes before all else
        self._batches: Iterator[list[Any]] | None = None
        self._batch: list[Any] = []
        self._before: dict[str, Any] = {}  # the loader's state before `_batch`
        self._used = 0  # of `_batch`

    def draw(self, n: int) -> list[Any]:
        """The next n items."""
        drawn, self._first = self._first[:n], self._first[n:]
        while len(drawn) < n:
            self._need_batch()
            more = self._batch[self._used :][: n - len(drawn)]
            self._used += len(more)
            drawn += more
        return drawn

    def draw_batch(self) -> list[Any]:
        """What is left of a batch of the loader, or the next one: the last of an epoch may be
        smaller than the others."""
        self._need_batch()
        return self.draw(len(self._batch) - self._used)

    def _need_batch(self) -> None:
        if self._used == len(self._batch):
            self._before = self.loader.state_dict()
            self._batch, self._used = self._next_batch(), 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        within = self._used < len(self._batch)
        return {
            "loader": self._before if within else self.loader.state_dict(),
            "used": self._used if within else 0,
            "first": [item["index"] for item in self._first],
        }

    def load_state_dict(self, state: dict[str, Any], again: Iterable[Any] = ()) -> None:
        """Continue where `state_dict` was called.

        again: items to draw before all others.
        """
        self.loader.load_state_dict(state["loader"])
        self._first, self._batches, self._batch, self._used = [], None, [], 0
        self.draw(state["used"])
        self._first = [*again, *(self.dataset[index] for index in state["first"])]

    def _next_batch(self) -> list[Any]:
        while True:
            if self._batches is None:
                self._batches = iter(self.loader)
            for batch in self._batches:
                return batch
            self._batches = None


class RolloutSource:
    """Prompts, answered by an engine that serves the actor's weights, graded by an environment.

    With `rollout.staleness=1` the next step is generated while this one trains: `collect` hands
    out what is ready and begins the next one, and `finish` waits for that.

    Args:
        config: the whole run's config.
        tokenizer: of the actor.
        ends: its end tokens; None: what the tokenizer alone says.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        ends: EndTokens | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.ends = ends or end_tokens(tokenizer)
        self.end_ids = self.ends.ids  # what a turn may end with
        self.environment = load_environment(
            config.rollout.env_path,
            timeout=config.rollout.env_timeout,
            workers=config.rollout.env_workers,
        )
        longest = config.actor.max_length_per_device * config.actor.sp_size
        longest = min(longest, context_length(config.actor.model_name) or longest)
        longest -= config.rollout.train_sampling_params.max_new_tokens
        # No process, no limit; null means one for each core.
        limit = None if config.rollout.env_workers == 0 else MAX_ANSWER
        self.train = RLDataset(
            config.train_data, tokenizer, key="train_data", max_extra_info=limit,
            max_prompt_length=config.train_data.max_prompt_length or longest,
        )  # fmt: skip
        self.test = None
        if config.test_data.path is not None:
            self.test = RLDataset(
                config.test_data, tokenizer, key="test_data", max_extra_info=limit,
                max_prompt_length=config.test_data.max_prompt_length or longest,
            )  # fmt: skip
        self.n_prompts = config.train_data.prompts_per_rollout
        self.loader = make_loader(self.train, self.n_prompts, seed=config.trainer.seed)
        self.prompts = PromptStream(self.train, self.loader)
        self.ahead = config.rollout.staleness > 0
        # What is generated ahead: its result or error, and the state before it.
        self._pending: tuple[Future[Result], dict[str, Any]] | None = None
        self._while_open = ExitStack()

    @property
    def unwritten(self) -> tuple[Path, OSError] | None:
        """Rank 0: the first rollouts that could not be written to the run's folder, and why."""
        return self.collector.unwritten

    def start(self, device: torch.device) -> None:
        """Load the engine, or start its servers. It serves the actor after `publish`."""
        if self.ahead and self.config.rollout.engine not in SERVERS:
            self._while_open.enter_context(without_switching())
        drivers = self._drivers()
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
            ends=self.ends,
            n_shown=self.config.trainer.show_samples,
        )

    @property
    def rows_of_data(self) -> dict[str, int]:
        """How many rows there are, by what they are for."""
        rows = {} if self.config.train_data.path is None else {"training rows": len(self.train)}
        return rows | ({} if self.test is None else {"test rows": len(self.test)})

    @property
    def datasets(self) -> dict[str, Dataset]:
        """What was read, by the config's node that names it."""
        return {"train_data": self.train} | ({} if self.test is None else {"test_data": self.test})

    def _drivers(self) -> tuple[int, ...]:
        """The ranks with an engine: all of them in process, with servers one on each machine, with
        servers of somebody else's the first one."""
        if self.config.rollout.engine not in SERVERS or world_size() == 1:
            return tuple(range(world_size()))
        if self.config.rollout.server_url is not None:
            return (0,)
        local_ranks = [None] * world_size()
        dist.all_gather_object(local_ranks, int(os.environ.get("LOCAL_RANK", "0")))
        return tuple(which for which, local in enumerate(local_ranks) if local == 0)

    def collect(self, step: int, last: bool = False) -> Result:
        """The batch of a step and its metrics, on rank 0 (a collective).

        last: no step follows, so none is generated ahead.
        """
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

    def finish(self) -> None:
        """Wait for what is generated ahead; raises its errors."""
        if self._pending is not None:
            self._pending[0].result()

    def evaluate(self, step: int) -> dict[str, float]:
        """Greedy score on the whole test set, and with `trainer.test_sampled` the score of one
        sampled as in training (metrics on rank 0)."""
        if self.test is None:
            return {}
        self.finish()
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
        """Give up generating: what waits for a rollout or an evaluation, now or later, raises
        Interrupted on every rank. May be called from any thread.

        What is generated ahead gets some seconds to be complete: a run that resumes has newer
        weights, and would write something else.
        """
        if not self.ahead:
            self.collector.interrupt()
            return
        timer = threading.Timer(_GRACE_AHEAD, self.collector.interrupt)
        timer.daemon = True
        timer.start()

    def publish(self, actor: Actor, step: int) -> None:
        """Serve the actor's weights from now on (a collective)."""
        self.finish()
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
        far, groups carried to the next step, and what was generated ahead. A run that resumes
        generates that anew where it is not complete."""
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
        """Continue where `state_dict` was called on all ranks of a run, of however many ranks.

        Groups that cannot be carried on, as another number of answers is wanted or the steps do
        not overlap any more, are drawn again.
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
        with self._while_open:
            if hasattr(self, "collector"):
                self.collector.close()


class DatasetSource:
    """Rows of a data set as they are, every response token an action of advantage 1. The last step
    of an epoch takes what is left of the rows."""

    unwritten = None  # nothing is dumped

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        ends: EndTokens | None = None,
    ):
        self.data = SFTDataset(config.data, tokenizer, key="data", ends=ends)
        self.end_ids = self.data.end_ids
        self.loader = make_loader(
            self.data, config.data.batch_size, seed=config.trainer.seed, drop_last=False
        )
        self.rows = PromptStream(self.data, self.loader)

    @property
    def rows_of_data(self) -> dict[str, int]:
        """How many rows there are, by what they are for."""
        return {"training rows": len(self.data)}

    @property
    def datasets(self) -> dict[str, Dataset]:
        """What was read, by the config's node that names it."""
        return {"data": self.data}

    def start(self, device: torch.device) -> None:
        """Nothing to load."""

    def collect(self, step: int, last: bool = False) -> Result:
        """The next rows, on rank 0."""
        items = self.rows.draw_batch()
        if rank() != 0:
            return None, {}
        batch = collate(items)
        ones = torch.ones(len(items), dtype=torch.bool)
        batch |= {"advantages": batch["action_mask"].float(), "correct": ones}
        return batch, {"train/avg_response_length": batch["action_mask"].sum().item() / len(items)}

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def finish(self) -> None:
        """Nothing goes on beside the training."""

    def interrupt(self) -> None:
        """Nothing takes long."""

    def publish(self, actor: Actor, step: int) -> None:
        """Nobody else holds the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return self.rows.state_dict() if rank() == 0 else {}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue where `state_dict` was called on all ranks of a run, of however many ranks."""
        self.rows.load_state_dict(states[0])

    def close(self) -> None:
        """Nothing is open."""
