"""Completes a batch of requests with transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput

from RL2.datasets.end_of_turn import end_tokens
from RL2.engines.protocol import Completion
from RL2.engines.transformers.pausing import PauseSwitch
from RL2.engines.transformers.requests import Request
from RL2.engines.transformers.sampling import RowEnds, Sampler
from RL2.runtime.errors import EngineError

# transformers 5.24 renamed it, and warns about the old name.
_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


class Decoder:
    """A model and the version of its weights.

    model: the model; its generation config is replaced. pause: checked before each call of the
    model. eos_ids: tokens that end every completion.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pause: PauseSwitch
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.weight_version = 0
        self._pause = pause
        self._n_updates = 0
        self.eos_ids = end_tokens(tokenizer, model.generation_config, model.config).ids
        # The checkpoint's own sampling settings (top_k, repetition penalty, …) must not be used:
        # `generate` takes from the generation config all that a call does not set.
        rows = model.get_input_embeddings().num_embeddings  # a tokenizer may have more tokens
        known = [token for token in (tokenizer.pad_token_id, *self.eos_ids) if token is not None]
        self._fill = fill = next((token for token in known if token < rows), 0)
        model.generation_config = GenerationConfig(
            eos_token_id=list(self.eos_ids) or None, pad_token_id=fill
        )
        self._stop_criteria: dict[tuple[str, ...], StopStringCriteria] = {}

    def complete(
        self, batch: list[Request], so_far: Callable[[list[Completion | None]], None]
    ) -> list[Completion]:
        """Complete a batch of requests with equal sampling parameters (worker thread).

        so_far: called with the finished completions each time that the batch gets smaller.
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
        versions: list[int] = []  # weight version of each token, the same for all rows
        cache, n_updates = None, self._n_updates
        while rows.numel():
            if not self._pause.begin(unwanted):
                stopped = torch.zeros_like(rows, dtype=torch.bool)
                lengths = torch.full_like(rows, ids.shape[1] - width)
                self._finish(
                    completions, rows, ~stopped, stopped, lengths, ids[:, width:], logps, versions,
                    otherwise="abort",
                )  # fmt: skip
                break
            if n_updates != self._n_updates:
                cache, n_updates = None, self._n_updates  # made with the old weights
            if cache is None:
                cache = self._read(ids, mask)
            sampler = Sampler(sampling, seeds, width)
            ends = RowEnds(
                len(rows), width, eos, stop_strings, lambda: self._pause.paused or unwanted()
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
                self._pause.end()
            # A model that does not return its cache reads its rows again.
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
        """The cache of all tokens but the last; rows that are equal up to there are read once.

        None if there is nothing to read, and for models without a cache that can be reordered.
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
        """Fill in the completions of rows that ended; `rows` are their places in the batch.

        otherwise: finish reason of rows that did not stop.
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
        """transformers' matcher for these strings; made once, as it goes through the vocabulary."""
        if not stop:
            return None
        if stop not in self._stop_criteria:
            try:
                self._stop_criteria[stop] = StopStringCriteria(self.tokenizer, list(stop))
            except ValueError as error:
                raise EngineError(f"stop={list(stop)}: {error}") from error
        return self._stop_criteria[stop]

    @torch.no_grad()
    def copy_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `TransformersEngine.update_weights`."""
        targets = self.model.state_dict(keep_vars=True)
        pending = {name: id(parameter) for name, parameter in self.model.named_parameters()}
        seen: set[int] = set()
        for name, tensor in named_tensors:
            target = targets.get(name)
            if target is None:
                raise EngineError(
                    f"weight update {version}: {name} is not a parameter of the engine"
                )
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
