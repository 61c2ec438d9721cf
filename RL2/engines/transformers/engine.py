"""The in-process engine: padded `generate` of transformers over batches of waiting requests.

It differs from a plain call of `generate` in three ways:

- Requests arrive one by one and are batched. `generate` enqueues them. A coroutine waits until no
  environment is working and no new request has come for a few turns of the event loop, sorts the
  requests by prompt length and runs the batches one after the other in a worker thread, so that
  environments can run meanwhile. Which requests share a batch does not depend on the speed of an
  environment. Equal prompts, such as those of a group, are read once.
- A token's randomness depends only on its request's seed and its position. The noise is a hash of
  (seed, position, vocabulary index) and the token is the first to arrive in an exponential race,
  which is an exact sample (the Gumbel-max trick without its outer logarithm; Maddison et al. 2014,
  arXiv:1411.0030). Other rows of the batch and the global generator have no influence. What remains
  is floating-point noise: the last bits of a logit depend on the shape of a batch, so that two
  candidates closer than about 1e-6 may swap.
- When half of a batch's rows have ended, the rest goes on as a smaller batch with its part of
  the key-value cache, so that a few long responses do not cost a full batch of steps. `abort` and
  `pause` interrupt a batch in the same way, between two tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.config.models import weight_options
from RL2.engines.protocol import Completion, SamplingParams, check_request
from RL2.engines.transformers.decoding import Decoder
from RL2.engines.transformers.noise import signed
from RL2.engines.transformers.pausing import PauseSwitch
from RL2.engines.transformers.requests import Request, aborted, fail, plan_batches
from RL2.models.saved import load_whole, own_memory
from RL2.ops.fp32 import accelerate_linears
from RL2.runtime.errors import EngineError

# Event-loop turns without a new request before the waiting requests are run. A sample whose
# environment has answered sends its next request within a few turns.
_QUIET_TURNS = 16


class TransformersEngine:
    """Engine over a transformers causal language model in this process (see `protocol.Engine`).

    model_name: folder or hub name. The engine loads its own copy of the weights.
    dtype, device, attn_implementation: as for `from_pretrained`, except that the dtype "auto" is
        float32 on a CPU; "auto" for the attention leaves the choice to transformers.
    max_batch_size: most requests in one batch (bounds the key-value cache).
    options: more options of `from_pretrained`, see `RL2.config.models.weight_options`.
    eager: for partial rollouts: requests are served in order of arrival, and finished completions
        are returned each time that their batch gets smaller. Otherwise requests of similar length
        share a batch, which is returned as a whole, so that the order of the next turn's requests
        does not depend on what was written.

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
        model = model.to(device).eval().requires_grad_(False)
        own_memory(model)
        accelerate_linears(model)
        self.max_batch_size = max_batch_size
        self.eager = eager
        text_config = model.config.get_text_config()
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self._waiting: list[Request] = []
        self._open: list[Request] = []  # in a batch, or about to be
        self._pause = PauseSwitch()
        self.decoder = Decoder(model, tokenizer, self._pause)
        self._batcher: asyncio.Task | None = None
        self._settled: asyncio.Event | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="transformers-engine")
        self._closed = False

    @property
    def weight_version(self) -> int:
        return self.decoder.weight_version

    async def start(self, settled: asyncio.Event | None = None) -> None:
        """The model was loaded by the constructor. Batches wait for `settled`, unless `eager`."""
        self._settled = settled

    async def generate(
        self, token_ids: list[int], sampling: SamplingParams, *, seed: int
    ) -> Completion:
        """Complete `token_ids`. See `Engine.generate`; seed: any 64-bit integer.

        Raises EngineError for an empty prompt, a request that does not fit the model's context,
        NaN logits, and a closed engine.
        """
        if self._closed:
            raise EngineError("transformers engine: generate called after close")
        check_request(token_ids, sampling, self.context_length)
        request = Request(
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
        weights after `resume`, with a new key-value cache. A tied parameter may come under any one
        of its names.
        Raises EngineError naming a parameter that is unknown, missing or has the wrong shape; the
        weights are then partly new, and the run should stop.
        """
        if not self._pause.paused:
            await self._idle()
        # In the caller's thread: iterating may be a collective that needs its device.
        self.decoder.copy_weights(named_tensors, version)

    async def abort(self) -> None:
        """End every open request, with the tokens so far; waiting requests have none."""
        for request in self._waiting:
            if not request.future.done():
                request.future.set_result(aborted())
        self._waiting = []
        for request in self._open:
            request.aborted = True
        self._pause.poke()

    async def pause(self) -> None:
        """Once this returns, no token is written until `resume`."""
        self._pause.set_paused(True)
        await asyncio.to_thread(self._pause.wait_until_still)

    async def resume(self) -> None:
        """Continue after `pause`."""
        self._pause.set_paused(False)

    def metrics(self) -> dict[str, float]:
        """No metrics."""
        return {}

    async def healthy(self) -> bool:
        """Whether the engine is open."""
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
        fail(self._waiting, EngineError("transformers engine: closed with requests waiting"))
        await self.abort()
        await self._idle()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)
        self.decoder.model = None

    async def _idle(self) -> None:
        """Wait until no request is open."""
        while self._batcher is not None and not self._batcher.done():
            await asyncio.wait([self._batcher])

    async def _run_batches(self) -> None:
        """Run waiting requests until there are none."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._quiet()
            self._open, self._waiting = self._waiting, []
            for batch in plan_batches(self._open, self.max_batch_size, sort=not self.eager):
                for request in batch:
                    if request.aborted and not request.future.done():
                        request.future.set_result(aborted())
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
                            self._worker, self.decoder.complete, batch, deliver_soon
                        )
                    )
                except Exception as error:  # raised in the requests of the batch
                    fail(batch, error)
            self._open = []

    async def _quiet(self) -> None:
        """Return when all samples wait for the engine (unless it is `eager`), and `_QUIET_TURNS`
        turns of the event loop brought no new request."""
        count, quiet = -1, 0
        while quiet < _QUIET_TURNS:
            if not (self.eager or self._settled is None or self._settled.is_set()):
                await self._settled.wait()
                quiet = 0
            quiet = quiet + 1 if len(self._waiting) == count else 0
            count = len(self._waiting)
            await asyncio.sleep(0)


def transformers_engine(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> TransformersEngine:
    """The in-process engine that a run's config asks for."""
    return TransformersEngine(
        config.rollout.model_name,
        tokenizer=tokenizer,
        dtype=config.rollout.dtype,
        device=device,
        max_batch_size=config.rollout.max_batch_size,
        eager=config.rollout.partial_rollout,
        options=weight_options(config.actor),
    )
