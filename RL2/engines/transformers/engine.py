"""The in-process engine: padded `generate` of transformers over batches of waiting requests.

Three things make it more than a call of `generate`:

- Requests arrive one by one and are batched: `generate` enqueues, a coroutine waits until no
  environment is being asked and the event loop has brought no new request for a few turns, sorts
  by prompt length and runs the batches one after the other in a worker thread, so that
  environments go on meanwhile. Which requests share a batch does not depend on how fast an
  environment answers. Prompts that are alike, as those of a group, are read once.
- A token depends on its request's seed and its position alone. The noise is a hash of (seed,
  position, vocabulary index) and the token is the first to arrive in an exponential race, which
  is an exact sample (the Gumbel-max trick without its outer logarithm; Maddison et al. 2014,
  arXiv:1411.0030). Neither the other rows of a batch nor the global generator enter. What remains
  is floating-point noise: the last bits of a logit do depend on the shape of a batch, so that two
  candidates closer than about 1e-6 may swap.
- When half of a batch's rows have ended, the rest goes on as a smaller batch with its part of
  the key-value cache, so that a few long responses do not cost a full batch of steps. `abort` and
  `pause` break a batch off in the same way, between two tokens.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from RL2.config.models import weight_options
from RL2.datasets.end_of_turn import end_tokens
from RL2.engines.protocol import Completion, SamplingParams, check_request
from RL2.engines.transformers.noise import exponential_noise, signed
from RL2.models.saved import load_whole, own_memory
from RL2.ops.fp32 import accelerate_linears
from RL2.runtime.errors import EngineError

logger = logging.getLogger(__name__)

# Event-loop turns without a new request after which the waiting ones are run. A sample whose
# environment has answered brings its next request within a few turns.
_QUIET_TURNS = 16
# transformers 5.24 gave it a shorter name, and warns of the other one.
_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
# Below this many rows a smaller batch is no faster.
_MIN_SHRINK_ROWS = 4


class _Sampler(LogitsProcessor):
    """Turns logits [B, V] into scores whose argmax is the sample, and keeps its log-probability.

    A token of probability p arrives after E / p, E exponential; the first to arrive is token i with
    probability p_i. Scores are p / E.
    logps: one [B] fp32 tensor for each step, of the distribution before `top_p` cuts it; no [B, V]
    tensor outlives its step.
    """

    def __init__(self, sampling: SamplingParams, seeds: Tensor, prompt_width: int):
        self.temperature = sampling.temperature
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.seeds = seeds
        self.prompt_width = prompt_width
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.temperature not in (0, 1):
            scores = scores / self.temperature
        probabilities = scores.softmax(-1)
        if self.temperature > 0:
            race = probabilities
            if self.top_p is not None:
                race = race.masked_fill(self.top_p(input_ids, scores) == -math.inf, 0.0)
            position = input_ids.shape[1] - self.prompt_width
            scores = race / exponential_noise(self.seeds, position, scores.shape[-1])
        tokens = scores.argmax(-1, keepdim=True)
        self.logps.append(probabilities.gather(-1, tokens).squeeze(-1).log())
        return scores


class _RowEnds(StoppingCriteria):
    """Marks rows that wrote an end-of-sequence token or a stop string, and where.

    lengths: [B] number of response tokens of a row at its end, 0 while it goes on.
    When at most half of the rows go on, it ends the whole call so that the caller can continue
    the rest as a smaller batch; likewise when `interrupted()`.
    """

    def __init__(
        self,
        rows: int,
        prompt_width: int,
        eos_ids: Tensor,
        stop_strings: StopStringCriteria | None,
        interrupted: Callable[[], bool],
    ):
        self.interrupted = interrupted
        self.prompt_width = prompt_width
        self.eos_ids = eos_ids
        self.stop_strings = stop_strings
        self.shrink_at = rows // 2 if rows >= _MIN_SHRINK_ROWS else 0
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=eos_ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.eos_ids)
        if self.stop_strings is not None:
            # Only the response is looked at: a stop string must not begin in the prompt.
            ended |= self.stop_strings(input_ids[:, self.prompt_width :], scores)
        length = input_ids.shape[1] - self.prompt_width
        self.lengths.masked_fill_(ended & (self.lengths == 0), length)
        done = self.lengths > 0
        if self.interrupted():
            return torch.ones_like(done)
        return done | ((~done).sum() <= self.shrink_at)


@dataclass
class _Request:
    token_ids: list[int]
    sampling: SamplingParams
    seed: int
    future: asyncio.Future
    aborted: bool = False


class _Switch:
    """Lets the worker thread run the model, or not: pause, and the wait until it has paused."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.paused = self._running = False

    def set_paused(self, paused: bool) -> None:
        with self._changed:
            self.paused = paused
            self._changed.notify_all()

    def poke(self) -> None:
        """Have `begin` look again whether its work is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def begin(self, unwanted: Callable[[], bool]) -> bool:
        """Worker: wait while paused. False where the work has become unwanted."""
        with self._changed:
            self._changed.wait_for(lambda: not self.paused or unwanted())
            self._running = not unwanted()
            return self._running

    def end(self) -> None:
        """Worker: the model does not run any more."""
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def wait_until_still(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._running or not self.paused)


class TransformersEngine:
    """Engine over a transformers causal language model in this process (see `engine.Engine`).

    model_name: folder or hub name. The engine loads its own copy of the weights.
    dtype, device, attn_implementation: as `from_pretrained` takes them, but that "auto" is
        float32 on a CPU; "auto" for the attention leaves the choice to transformers.
    max_batch_size: most requests in one batch (bounds the key-value cache).
    options: further ones of `from_pretrained`, see `RL2.config.models.weight_options`.
    eager: what partial rollouts need: first come, first served, and completions are handed out
        while the rest of their batch goes on, each time that it gets smaller. Else requests of
        similar length share a batch, which comes back as a whole, so that requests of a next
        turn come in an order that does not depend on what was written.

    Raises EngineError when the model cannot be loaded.
    """

    def __init__(
        self,
        model_name: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        attn_implementation: str | None = "auto",
        max_batch_size: int = 256,
        options: Mapping[str, Any] | None = None,
        eager: bool = False,
    ):
        if max_batch_size < 1:
            raise EngineError(f"rollout.max_batch_size={max_batch_size}: must be 1 or more")
        dtype = getattr(dtype, "value", dtype)
        if dtype == "auto" and torch.device(device).type == "cpu":
            dtype = torch.float32  # bfloat16 is slow and coarse there
        try:
            model, _ = load_whole(
                model_name,
                dict(options or {}),
                dtype=dtype,
                attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            )
        except (OSError, ValueError, ImportError) as error:
            raise EngineError(f"rollout.model_name={model_name}: cannot load: {error}") from error
        self.model = model.to(device).eval().requires_grad_(False)
        own_memory(self.model)
        accelerate_linears(self.model)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.eager = eager
        self.weight_version = 0
        text_config = model.config.get_text_config()
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.eos_ids = end_tokens(tokenizer, model.generation_config, model.config).ids
        # The checkpoint's own sampling settings (top_k, repetition penalty, …) must not slip in:
        # `generate` takes from here whatever a call does not set.
        rows = model.get_input_embeddings().num_embeddings  # a tokenizer may have tokens beyond
        known = [token for token in (tokenizer.pad_token_id, *self.eos_ids) if token is not None]
        self._fill = fill = next((token for token in known if token < rows), 0)
        model.generation_config = GenerationConfig(
            eos_token_id=list(self.eos_ids) or None, pad_token_id=fill
        )
        self._stop_criteria: dict[tuple[str, ...], StopStringCriteria] = {}
        self._waiting: list[_Request] = []
        self._open: list[_Request] = []  # in a batch, or in line for one
        self._switch = _Switch()
        self._n_updates = 0
        self._batcher: asyncio.Task | None = None
        # Set while no sample is between two requests; whoever plays samples puts its own here.
        self.settled = asyncio.Event()
        self.settled.set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine")
        self._closed = False

    async def start(self) -> None:
        """Nothing to wait for: the model was loaded by the constructor."""

    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete `token_ids`. See `Engine.generate`; seed: any 64-bit integer.

        Raises EngineError for an empty prompt, a request that does not fit the model's context,
        a model that gives NaN, and a closed engine.
        """
        if self._closed:
            raise EngineError("transformers engine: generate called after close")
        check_request(token_ids, sampling, self.context_length)
        request = _Request(
            token_ids, sampling, signed(seed), asyncio.get_running_loop().create_future()
        )
        self._waiting.append(request)
        if self._batcher is None or self._batcher.done():
            self._batcher = asyncio.create_task(self._run_batches())
        return await request.future

    async def update_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Copy tensors into the model by parameter name, cast to the model's dtype.

        Waits until no request is open, unless paused: then open requests go on with the new
        weights after `resume`, on a key-value cache that is made anew. A tied parameter may come
        under one of its names.
        Raises EngineError naming a parameter that is unknown, misshapen or missing; the weights
        are then partly new, and the run should stop.
        """
        if not self._switch.paused:
            await self._idle()
        # In the caller's thread, as drawing the tensors may be a collective that needs its device.
        self._copy_weights(named_tensors, version)

    async def abort(self) -> None:
        """End every open request: with what is written, or with nothing where it only waits."""
        for request in self._waiting:
            if not request.future.done():
                request.future.set_result(_aborted())
        self._waiting = []
        for request in self._open:
            request.aborted = True
        self._switch.poke()

    async def pause(self) -> None:
        """Nothing is written from the return of this until `resume`."""
        self._switch.set_paused(True)
        await asyncio.to_thread(self._switch.wait_until_still)

    async def resume(self) -> None:
        """Go on where `pause` broke off."""
        self._switch.set_paused(False)

    def metrics(self) -> dict[str, float]:
        """Nothing to count."""
        return {}

    async def healthy(self) -> bool:
        """Whether it is open."""
        return not self._closed

    async def sleep(self) -> None:
        """Nothing to release: the key-value cache lives only while a batch runs."""

    async def wake(self) -> None:
        """Nothing to restore."""

    async def close(self) -> None:
        """Stop the worker thread and drop the model. Requests that wait raise EngineError, those
        in the model are aborted."""
        if self._closed:
            return
        self._closed = True
        _fail(self._waiting, EngineError("transformers engine: closed with requests waiting"))
        await self.abort()
        await self._idle()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)
        self.model = None

    async def _idle(self) -> None:
        """Wait until no request is open."""
        while self._batcher is not None and not self._batcher.done():
            await asyncio.wait([self._batcher])

    async def _run_batches(self) -> None:
        """Run what waits, until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._quiet()
            self._open, self._waiting = self._waiting, []
            for batch in _plan_batches(self._open, self.max_batch_size, sort=not self.eager):
                for request in batch:
                    if request.aborted and not request.future.done():
                        request.future.set_result(_aborted())
                batch = [request for request in batch if not request.future.done()]
                if not batch:
                    continue

                def deliver(completions: list[Completion | None], batch=batch) -> None:
                    for request, completion in zip(batch, completions, strict=True):
                        if completion is not None and not request.future.done():
                            request.future.set_result(completion)

                def deliver_soon(completions: list[Completion | None], deliver=deliver) -> None:
                    if self.eager:
                        loop.call_soon_threadsafe(deliver, list(completions))

                try:
                    deliver(
                        await loop.run_in_executor(
                            self._worker, self._complete, batch, deliver_soon
                        )
                    )
                except Exception as error:  # belongs to whoever waits for the batch
                    _fail(batch, error)
            self._open = []

    async def _quiet(self) -> None:
        """Return when all samples wait for the engine, or, if it is `eager`, for something else,
        and `_QUIET_TURNS` turns of the event loop brought no new request."""
        count, quiet = -1, 0
        while quiet < _QUIET_TURNS:
            if not (self.eager or self.settled.is_set()):
                await self.settled.wait()
                quiet = 0
            quiet = quiet + 1 if len(self._waiting) == count else 0
            count = len(self._waiting)
            await asyncio.sleep(0)

    def _complete(
        self, batch: list[_Request], so_far: Callable[[list[Completion | None]], None]
    ) -> list[Completion]:
        """Complete a batch of requests with equal sampling parameters (worker thread).

        so_far: called with what is complete each time that the batch gets smaller.
        """
        sampling = batch[0].sampling
        device = self.model.device
        width = max(len(request.token_ids) for request in batch)
        ids = torch.full((len(batch), width), self._fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            start = width - len(request.token_ids)
            ids[row, start:] = torch.tensor(request.token_ids, dtype=torch.int64)
            mask[row, start:] = 1
        ids, mask = ids.to(device), mask.to(device)
        seeds = torch.tensor([r.seed for r in batch], dtype=torch.int64, device=device)
        eos = dict.fromkeys(self.eos_ids + sampling.stop_token_ids)
        eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        stop_strings = self._stop_strings(sampling.stop)

        def unwanted() -> bool:
            return all(request.aborted or request.future.done() for request in batch)

        completions: list[Completion | None] = [None] * len(batch)
        rows = torch.arange(len(batch), device=device)
        logps = torch.empty((len(batch), 0), device=device)
        versions: list[int] = []  # of the weights, by token: all rows are equally far
        cache, n_updates = None, self._n_updates
        while rows.numel():
            if not self._switch.begin(unwanted):
                stopped = torch.zeros_like(rows, dtype=torch.bool)
                lengths = torch.full_like(rows, ids.shape[1] - width)
                self._finish(
                    completions, rows, ~stopped, stopped, lengths, ids[:, width:], logps, versions,
                    otherwise="abort",
                )  # fmt: skip
                break
            if n_updates != self._n_updates:
                cache, n_updates = None, self._n_updates  # it was made by other weights
            if cache is None:
                cache = self._read(ids, mask)
            sampler = _Sampler(sampling, seeds, width)
            ends = _RowEnds(
                len(rows), width, eos, stop_strings, lambda: self._switch.paused or unwanted()
            )
            try:
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    logits_processor=LogitsProcessorList([sampler]),
                    stopping_criteria=StoppingCriteriaList([ends]),
                    max_new_tokens=width + sampling.max_new_tokens - ids.shape[1],
                    do_sample=False,
                    use_cache=True,
                    return_dict_in_generate=True,
                    **{_CACHE: cache},
                )
            finally:
                version = self.weight_version
                self._switch.end()
            # A model that does not know how to return its cache reads its rows again.
            ids, cache = output.sequences, output.get(_CACHE)
            logps = torch.cat([logps, torch.stack(sampler.logps, 1)], 1)
            written = ids.shape[1] - width
            versions += [version] * (written - len(versions))
            stopped = ends.lengths > 0
            out_of_room = written >= sampling.max_new_tokens
            ended = stopped | out_of_room
            lengths = torch.where(stopped, ends.lengths, written)
            self._finish(
                completions, rows, ended, stopped, lengths, ids[:, width:], logps, versions
            )
            keep = (~ended).nonzero().squeeze(1)
            if not keep.numel():
                break
            so_far(completions)
            if cache is not None:
                cache.reorder_cache(keep)  # index_select of the rows, in every kind of layer
            rows, seeds, ids, logps = rows[keep], seeds[keep], ids[keep], logps[keep]
            mask = torch.nn.functional.pad(mask[keep], (0, ids.shape[1] - mask.shape[1]), value=1)
        return completions

    def _read(self, ids: Tensor, mask: Tensor) -> Cache | None:
        """The cache of all tokens but the last; rows that are alike until there are read once.

        None where there is nothing to read, and for models without a cache that rows can be taken
        from.
        """
        if ids.shape[1] < 2:
            return None
        begun = torch.cat([ids[:, :-1], mask[:, :-1]], 1)
        different, place = torch.unique(begun, dim=0, return_inverse=True)
        ids, mask = different.chunk(2, 1)
        cache = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        ).get(_CACHE)
        if cache is not None:
            cache.reorder_cache(place)
        return cache

    def _finish(
        self,
        completions: list[Completion | None],
        rows: Tensor,
        ended: Tensor,
        stopped: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        logps: Tensor,
        versions: list[int],
        otherwise: str = "length",
    ) -> None:
        """Write the completions of rows that ended; `rows` are their places in the batch.

        otherwise: finish reason of those that did not stop.
        """
        table = zip(rows.tolist(), ended.tolist(), stopped.tolist(), lengths.tolist(), strict=True)
        tokens, logps = tokens.cpu(), logps.cpu()
        for i, (row, has_ended, has_stopped, length) in enumerate(table):
            if not has_ended:
                continue
            row_logps = logps[i, :length].tolist()
            if not all(map(math.isfinite, row_logps)):
                raise EngineError(
                    "transformers engine: the model gave NaN or infinite logits (weights version "
                    f"{self.weight_version}); the weights are broken or the dtype overflows"
                )
            completions[row] = Completion(
                token_ids=tokens[i, :length].tolist(),
                logps=row_logps,
                finish_reason="stop" if has_stopped else otherwise,
                weight_versions=versions[:length],
            )

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStringCriteria | None:
        """transformers' matcher for these strings; made once, as it walks the vocabulary."""
        if not stop:
            return None
        if stop not in self._stop_criteria:
            try:
                self._stop_criteria[stop] = StopStringCriteria(self.tokenizer, list(stop))
            except ValueError as error:
                raise EngineError(f"stop={list(stop)}: {error}") from error
        return self._stop_criteria[stop]

    @torch.no_grad()
    def _copy_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        targets = self.model.state_dict(keep_vars=True)
        pending = {name: id(parameter) for name, parameter in self.model.named_parameters()}
        seen: set[int] = set()
        for name, tensor in named_tensors:
            target = targets.get(name)
            if target is None:
                raise EngineError(f"weight update {version}: {name} is no parameter of the engine")
            if target.shape != tensor.shape:
                raise EngineError(
                    f"weight update {version}: {name} has shape {tuple(tensor.shape)}, "
                    f"the engine's has {tuple(target.shape)}"
                )
            target.copy_(tensor)
            seen.add(id(target))
        missing = [name for name, identity in pending.items() if identity not in seen]
        if missing:
            raise EngineError(
                f"weight update {version}: {missing[0]} is missing ({len(missing)} in all)"
            )
        self.weight_version = version
        self._n_updates += 1


def _aborted() -> Completion:
    """The completion of a request that was aborted before it had a token."""
    return Completion([], [], "abort", [])


def _plan_batches(
    requests: list[_Request], max_batch_size: int, sort: bool
) -> list[list[_Request]]:
    """Cut requests into batches: equal sampling parameters, with `sort` neighbours in length."""
    groups: dict[SamplingParams, list[_Request]] = {}
    for request in requests:
        groups.setdefault(request.sampling, []).append(request)
    batches = []
    for group in groups.values():
        if sort:
            # Not by arrival, which depends on how fast environments answer.
            group.sort(key=lambda one: (len(one.token_ids), one.token_ids, one.seed))
        batches += [group[i : i + max_batch_size] for i in range(0, len(group), max_batch_size)]
    return batches


def _fail(requests: list[_Request], error: Exception) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)


def transformers_engine(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> TransformersEngine:
    """The engine of this process, as the config of a run wants it."""
    return TransformersEngine(
        config.rollout.model_name,
        tokenizer=tokenizer,
        dtype=config.rollout.dtype,
        device=device,
        max_batch_size=config.rollout.max_batch_size,
        eager=config.rollout.partial_rollout,
        options=weight_options(config.actor),
    )
