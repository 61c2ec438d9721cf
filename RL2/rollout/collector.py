"""The collector: prompts in, a batch of judged token sequences and metrics out.

Every rank answers its share of the prompts with its own engine; rank 0 gets everything. What is
sampled depends on the run's seed, the step and a prompt's place in the step, not on the number of
ranks. Token ids go in and come out: the ids that the engine sampled are the ids that are trained
on; text is made from them for the environment only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from RL2.config.errors import EngineError, EnvError
from RL2.datasets.base import collate
from RL2.rollout.engine import Completion, Engine, SamplingParams
from RL2.rollout.environments import Environment, load_environment

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MASK_64 = (1 << 64) - 1


def stable_seed(*parts: int) -> int:
    """Mix integers into one of 63 bits; the same on every machine and in every process.

    A chain of splitmix64 steps, so that neighbouring samples get unrelated seeds.
    """
    state = 0
    for part in parts:
        state = ((state ^ (part & _MASK_64)) + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


def action_text(
    completion: Completion, sampling: SamplingParams, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text of a completion that an environment judges.

    The end-of-sequence token is cut off; every other special token (`</think>` where it is one)
    stays. With `no_stop_trim=False` the text ends before the stop string.
    """
    ids = completion.token_ids
    if completion.finish_reason == "stop" and ids and ids[-1] in tokenizer.all_special_ids:
        # Any special token that ended the completion, since a model may have several
        # end-of-sequence tokens; but not one that is a stop string itself.
        last = tokenizer.decode([ids[-1]], skip_special_tokens=False)
        if not any(stop in last for stop in sampling.stop):
            ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if completion.finish_reason == "stop" and not sampling.no_stop_trim:
        found = [text.find(stop) for stop in sampling.stop if stop in text]
        text = text[: min(found)] if found else text
    return text


@dataclass
class Turn:
    """One action and what the environment said to it."""

    state: str
    action: str
    length: int
    finish_reason: str
    reward: float
    score: float


@dataclass
class Sample:
    """One answer to one prompt, over all its turns.

    position: place of the prompt in the step. response: number of the answer to that prompt.
    sequences: token sequences as `RL2.datasets.base.collate` takes them; more than one where a
        turn's state does not continue the turn before.
    error: why the sample counts for nothing (None for a good one).
    """

    position: int
    response: int
    turns: list[Turn] = field(default_factory=list)
    sequences: list[dict[str, list]] = field(default_factory=list)
    prompt: str | None = None
    answer: Any = None
    error: str | None = None
    error_is_env: bool = False

    @property
    def reward(self) -> float:
        return math.fsum(turn.reward for turn in self.turns)

    @property
    def score(self) -> float:
        return math.fsum(turn.score for turn in self.turns)

    @property
    def length(self) -> int:
        return sum(turn.length for turn in self.turns)


class Collector:
    """Collects rollouts; every rank makes one and calls its methods together.

    Args:
        config: the `rollout` node: env_path, env_timeout, max_env_errors, max_turns,
            responses_per_prompt, dynamic_filtering, train_sampling_params, test_sampling_params.
        tokenizer: of the policy.
        engine: this rank's engine; the collector closes it.
        seed: of the run.
        environment: None loads `config.env_path`.
        rollouts_dir: where rank 0 writes every rollout as jsonl; None writes nothing.
        n_ranks, rank: of the default process group, or of `group`.
        group: process group that can carry CPU objects; None is the default group.
        test_responses_per_prompt: answers per prompt in evaluation.
        max_length: most tokens in one sequence; a sample whose next turn might not fit ends.
        progress: True shows a progress bar, False does not, None does on a terminal.

    Raises ConfigError for an environment file that cannot be used.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        *,
        seed: int,
        environment: Environment | None = None,
        rollouts_dir: str | Path | None = None,
        n_ranks: int = 1,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        test_responses_per_prompt: int = 1,
        max_length: int | None = None,
        progress: bool | None = None,
    ):
        self.environment = environment or load_environment(
            config.env_path, timeout=float(config.env_timeout)
        )
        self.tokenizer = tokenizer
        self.engine = engine
        self.seed = seed
        self.rollouts_dir = None if rollouts_dir is None else Path(rollouts_dir)
        self.n_ranks, self.rank, self.group = n_ranks, rank, group
        self.responses_per_prompt = {
            True: int(config.responses_per_prompt),
            False: test_responses_per_prompt,
        }
        self.sampling = {
            True: SamplingParams.from_config(config.train_sampling_params),
            False: SamplingParams.from_config(config.test_sampling_params),
        }
        self.max_turns = int(config.max_turns)
        self.dynamic_filtering = bool(config.dynamic_filtering)
        self.max_env_errors: int | None = config.max_env_errors
        limits = [limit for limit in (max_length, engine.context_length) if limit is not None]
        self.max_length = min(limits, default=None)
        self.progress = progress
        self.env_errors = 0
        self._runner = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine (of the engine, say) on the collector's event loop."""
        return self._runner.run(coroutine)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give this rank's engine new weights. Raises EngineError naming a parameter."""
        self.run(self.engine.update_weights(named_tensors, version))

    def close(self) -> None:
        """Close the engine and the event loop. May be called twice."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        with runner:
            runner.run(self.engine.close())

    def collect(
        self,
        items: list[dict[str, Any]],
        step: int,
        train: bool,
        responses_per_prompt: int | None = None,
    ) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
        """Answer and judge `items`, the same list on every rank (a collective).

        items: dicts with `extra_info`, and `prompt` and `prompt_ids` where the environment's
            `reset` does not give them.

        Returns (batch, metrics) on rank 0 and (None, {}) on the others. The batch holds the
        fields of `collate` and sample_ids, group_ids [B] int64, correct [B] bool; it is None in
        evaluation and when no sample is left to learn from.

        `rollout/env_errors` counts the whole run so far, as `rollout.max_env_errors` does.

        Raises EnvError when environments failed more than `rollout.max_env_errors` times in the
        run, EngineError when an engine failed; on every rank.
        """
        start = time.perf_counter()
        n_responses = responses_per_prompt or self.responses_per_prompt[train]
        samples = self._gather(lambda: self._answer(items, step, train, n_responses), train)
        if samples is None:
            return None, {}
        seconds = time.perf_counter() - start
        samples.sort(key=lambda sample: (sample.position, sample.response))
        if self.rollouts_dir is not None:
            name = "train" if train else "test"
            dump(samples, self.rollouts_dir / f"step{step:06d}_{name}.jsonl")
        good = [sample for sample in samples if sample.error is None]
        metrics = summarise(good, "train" if train else "test")
        metrics["rollout/env_errors"] = float(self.env_errors)
        if not train:
            return None, metrics
        metrics["rollout/tokens_per_s"] = sum(sample.length for sample in good) / seconds
        if self.dynamic_filtering and n_responses > 1:
            good, metrics["rollout/dynamic_filtering_ratio"] = drop_equal_groups(good)
        return to_batch(good, n_responses), metrics

    def _gather(self, answer: Callable[[], list[Sample]], train: bool) -> list[Sample] | None:
        """Run `answer` and bring the samples of all ranks to rank 0; None elsewhere.

        The ranks tell each other about failures first, so that all of them stop together.
        """
        samples, failure = [], None
        try:
            samples = answer()
        except Exception as error:
            if self.n_ranks == 1:
                raise
            failure = error
        errors = [sample.error for sample in samples if sample.error_is_env]
        reports = [(errors, None if failure is None else f"{type(failure).__name__}: {failure}")]
        if self.n_ranks > 1:
            own, reports = reports[0], [None] * self.n_ranks
            dist.all_gather_object(reports, own, group=self.group)
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(reports):
            if message is not None:
                raise EngineError(f"rollout stopped because rank {rank} failed: {message}")
        errors = [error for rank_errors, _ in reports for error in rank_errors]
        self.env_errors += len(errors)
        if self.max_env_errors is not None and self.env_errors > self.max_env_errors:
            raise EnvError(
                f"rollout.max_env_errors={self.max_env_errors}: environments failed "
                f"{self.env_errors} times in this run; last: {errors[-1]}"
            )
        if self.n_ranks == 1:
            return samples
        gathered = [None] * self.n_ranks if self.rank == 0 else None
        dist.gather_object(samples, gathered, group=self.group, group_dst=0)
        if gathered is None:
            return None
        return [sample for rank_samples in gathered for sample in rank_samples]

    def _answer(
        self, items: list[dict[str, Any]], step: int, train: bool, n_responses: int
    ) -> list[Sample]:
        """This rank's samples."""
        own = [
            Sample(position, response)
            for position in range(self.rank, len(items), self.n_ranks)
            for response in range(n_responses)
        ]
        bar = tqdm(
            total=len(own),
            desc=f"{'rollout' if train else 'evaluation'} {step}",
            unit="sample",
            leave=False,
            disable=True if self.rank else None if self.progress is None else not self.progress,
        )

        async def run_all() -> None:
            tasks = []
            for sample in own:
                task = asyncio.create_task(self._run(sample, items[sample.position], step, train))
                task.add_done_callback(lambda _: bar.update())
                tasks.append(task)
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        with bar:
            self.run(run_all())
        return own

    async def _run(self, sample: Sample, item: dict[str, Any], step: int, train: bool) -> None:
        """Play all turns of a sample; an environment's failure ends this sample only."""
        try:
            await self._play(sample, item, step, train)
        except EnvError as error:
            sample.error, sample.error_is_env = str(error), True
            logger.warning(
                "sample dropped: prompt %d, response %d of step %d: %s",
                sample.position, sample.response, step, error,
            )  # fmt: skip

    async def _play(self, sample: Sample, item: dict[str, Any], step: int, train: bool) -> None:
        sampling = self.sampling[train]
        extra_info = deepcopy(dict(item.get("extra_info") or {}))
        sample.answer = extra_info.get("answer")
        state, ids = item.get("prompt"), item.get("prompt_ids")
        if state is None:
            state, extra_info = await self.environment.reset(extra_info)
            ids = None
        sample.prompt = state
        sequence = _start(self._encode(state) if ids is None else list(ids))
        sample.sequences.append(sequence)
        for turn in range(self.max_turns):
            seed = stable_seed(self.seed, step, int(train), sample.position, sample.response, turn)
            completion = await self.engine.generate(
                list(sequence["token_ids"]), sampling, seed=seed
            )
            _check(completion)
            if completion.finish_reason == "abort":
                sample.error = "the engine aborted the completion"
                logger.warning("sample dropped: prompt %d of step %d: %s", sample.position, step,
                               sample.error)  # fmt: skip
                return
            action = action_text(completion, sampling, self.tokenizer)
            _extend(sequence, completion.token_ids, completion.logps)
            result = await self.environment.step(state, action, extra_info)
            _add_reward(sequence, result.reward)
            sample.turns.append(
                Turn(
                    state,
                    action,
                    len(completion.token_ids),
                    completion.finish_reason,
                    result.reward,
                    result.score,
                )  # fmt: skip
            )
            if result.done or turn + 1 == self.max_turns:
                return
            prefix = state + action
            continues = result.next_state.startswith(prefix)
            new = self._encode(result.next_state[len(prefix) :] if continues else result.next_state)
            if continues and new and completion.finish_reason == "stop":
                # A chat template closes the action with the end token that the policy wrote.
                last = completion.token_ids[-1:]
                if new[:1] == last and last[0] in self.tokenizer.all_special_ids:
                    new = new[1:]
            begun = len(sequence["token_ids"]) if continues else 0
            if (
                self.max_length is not None
                and begun + len(new) + sampling.max_new_tokens > self.max_length
            ):
                return
            if continues:
                _extend(sequence, new)
            else:
                sequence = _start(new)
                sample.sequences.append(sequence)
            state, extra_info = result.next_state, result.extra_info

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _start(token_ids: list[int]) -> dict[str, list]:
    """A sequence that so far holds only what the policy was given."""
    sequence = {"token_ids": [], "action_mask": [], "llm_logps": [], "rewards": []}
    _extend(sequence, token_ids)
    return sequence


def _extend(
    sequence: dict[str, list], token_ids: list[int], logps: list[float] | None = None
) -> None:
    """Append tokens: the policy's with their log-probabilities, or the environment's without."""
    sequence["token_ids"] += token_ids
    sequence["action_mask"] += [logps is not None] * len(token_ids)
    sequence["llm_logps"] += [0.0] * len(token_ids) if logps is None else logps
    sequence["rewards"] += [0.0] * len(token_ids)


def _add_reward(sequence: dict[str, list], reward: float) -> None:
    """Put a turn's reward on the last action token; an empty action leaves it to the one before.

    A sequence without any action token has nowhere to put it, and nothing to learn.
    """
    for index in range(len(sequence["action_mask"]) - 1, -1, -1):
        if sequence["action_mask"][index]:
            sequence["rewards"][index] += reward
            return


def _check(completion: Completion) -> None:
    if len(completion.token_ids) != len(completion.logps):
        raise EngineError(
            f"the engine returned {len(completion.token_ids)} tokens and "
            f"{len(completion.logps)} log-probabilities"
        )
    if not all(map(math.isfinite, completion.logps)):
        raise EngineError("the engine returned a log-probability that is not finite")


def drop_equal_groups(samples: list[Sample]) -> tuple[list[Sample], float]:
    """Drop the groups in which all rewards are equal, which teach nothing against their mean.

    Returns the samples that stay and the fraction of groups that went (0 without groups).
    """
    rewards: dict[int, set[float]] = {}
    for sample in samples:
        rewards.setdefault(sample.position, set()).add(sample.reward)
    equal = {position for position, values in rewards.items() if len(values) == 1}
    kept = [sample for sample in samples if sample.position not in equal]
    return kept, len(equal) / max(1, len(rewards))


def to_batch(samples: list[Sample], n_responses: int) -> dict[str, Tensor] | None:
    """One row per sequence, in the samples' order; None without samples."""
    rows = [(sample, sequence) for sample in samples for sequence in sample.sequences]
    if not rows:
        return None
    batch = collate([sequence for _, sequence in rows])
    return batch | {
        "sample_ids": torch.tensor([s.position * n_responses + s.response for s, _ in rows]),
        "group_ids": torch.tensor([s.position for s, _ in rows]),
        "correct": torch.tensor([s.reward > 0 for s, _ in rows]),
    }


def summarise(samples: list[Sample], prefix: str) -> dict[str, float]:
    """Means over samples; only `{prefix}/n_samples` when there is none."""
    metrics = {f"{prefix}/n_samples": float(len(samples))}
    if not samples:
        return metrics
    turns = [turn for sample in samples for turn in sample.turns]

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(samples)

    return metrics | {
        f"{prefix}/score": mean(sample.score for sample in samples),
        f"{prefix}/reward": mean(sample.reward for sample in samples),
        f"{prefix}/avg_response_length": mean(sample.length for sample in samples),
        f"{prefix}/length_clip_ratio": mean(
            any(turn.finish_reason == "length" for turn in sample.turns) for sample in samples
        ),
        f"{prefix}/n_turns": mean(len(sample.turns) for sample in samples),
        f"{prefix}/empty_actions": float(sum(turn.length == 0 for turn in turns)),
    }


def dump(samples: list[Sample], path: Path) -> None:
    """Write samples as jsonl, all or nothing (temporary file, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_record(sample), ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _record(sample: Sample) -> dict[str, Any]:
    failed = sample.error is not None
    record = {
        "group": sample.position,
        "response_index": sample.response,
        "prompt": sample.prompt,
        "response": "".join(turn.action for turn in sample.turns),
        "score": None if failed else sample.score,
        "reward": None if failed else sample.reward,
        "length": sample.length,
        "finish_reason": sample.turns[-1].finish_reason if sample.turns else None,
        "n_turns": len(sample.turns),
    }
    if len(sample.turns) > 1:
        record["turns"] = [vars(turn) for turn in sample.turns]
    if failed:
        record["error"] = sample.error
    if sample.answer is not None:
        try:
            json.dumps(sample.answer)
        except (TypeError, ValueError):
            return record
        record["answer"] = sample.answer
    return record
