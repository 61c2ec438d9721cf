"""Check that a model computes for packed sequences what transformers computes for each one alone.

Attention, masks, positions, recurrent states and heads differ between some two hundred families. A
family that the packed path gets wrong would silently train on wrong numbers. So every model is
checked once, when its weights are loaded and it is spread over the ranks: two short sequences in a
pack, against transformers' own forward of one at a time.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from RL2.distributed import shard_of
from RL2.models.headed_model import HeadedModel
from RL2.ops.attention import register_attention
from RL2.runtime.errors import ConfigError, first_line

_LENGTHS = (23, 25)  # tokens of the two sequences
# Limits of a model on how many tokens a token sees, or from which position on it scales something,
# are mostly beyond these sequences; the check lowers them to this.
_LIMIT = 6
_LIMITS = re.compile(r"sliding_window|window_size|attention_window|attention_chunk|local_attention|"
                     r"floor_scale|log_scaling_n_floor")  # fmt: skip
# Tolerated error of a token's logits relative to their size: in fp32 of the worst token, in 16 bits
# of the median token of a sequence, as single tokens may be sent to other experts there.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.1
# Hidden states are scaled until logits are about this large, which reveals a head that caps them.
_LOGITS = 32.0
_NOISE = 0.1  # added to weights that are all one number
# Errors of the machine; the model is at fault for all others.
_MACHINE_ERRORS = (torch.OutOfMemoryError, dist.DistError, MemoryError)


@dataclass(frozen=True)
class _Probe:
    """This rank's slice of the pack, and the logits of its sequences alone.

    Attributes:
        states: the tokens, `[N]`.
        lengths: the lengths of the whole pack's sequences, `[2]`.
        start: where in the pack the slice begins.
        alone: logits of the sequences alone, from hidden states times `scale`, `[N, V]`.
        scale: a power of two.
    """

    states: Tensor
    lengths: Tensor
    start: int
    alone: Tensor
    scale: float


def self_check(model: HeadedModel, attention: str, device: torch.device, train: bool) -> None:
    """Set `model.head.linear`, or reject the model.

    A collective, with the same result on all ranks. Weights and random state are not changed.

    Args:
        attention: the attention in the config.
        train: whether gradients will be needed.

    Raises:
        ConfigError: the results of packed sequences differ from those of each alone.
    """
    family = model.model.config.model_type
    register_fsdp_forward_method(model, "run")
    with _probing(model):
        probe = _probe(model, family, device)
        for linear in (True, False) if model.head.linear else (False,):
            model.head.linear = linear
            fault = _fault(model, probe, train)
            if fault is None:
                return
        others = [] if model.sp_group is not None else _others(model, attention, probe)
    way_out = f"use {' or '.join(others)}" if others else "use a model of another family"
    raise ConfigError(
        f"actor.attn_implementation={attention}: {family} does not compute the same for packed "
        f"sequences as for each of them alone ({fault}); {way_out}"
    )


def _probe(model: HeadedModel, family: str, device: torch.device) -> _Probe:
    lengths = _lengths(model)
    vocab_size = model.model.get_input_embeddings().weight.shape[0]
    n = torch.arange(sum(lengths), device=device)
    tokens = (n * n * 7 + n * 13 + 5) % vocab_size
    padding = getattr(model.model.config.get_text_config(), "pad_token_id", None)
    if padding is not None:
        tokens = torch.where(tokens == padding, (tokens + 1) % vocab_size, tokens)
    rows = tokens.split(lengths)
    try:
        with torch.no_grad(), _attention(model.model, "eager"):
            scale: list[float] = []
            # partial: FSDP copies the lists among the arguments of a forward
            alone = torch.cat([model.run(partial(_logits_alone, scale=scale), row) for row in rows])
    except _MACHINE_ERRORS:
        raise
    except Exception as error:
        raise ConfigError(
            f"actor.model_name: {family} cannot be checked, as transformers' own forward of "
            f"{lengths[0]} tokens fails ({first_line(error)}); use a model of another family"
        ) from error
    if not alone.isfinite().all():
        raise ConfigError(
            "actor.model_name: its logits are not finite; the weights are damaged, or its numbers "
            "do not fit actor.dtype"
        )
    start, n_tokens = 0, len(tokens)
    if model.sp_group is not None:
        n_tokens //= dist.get_world_size(model.sp_group)
        start = n_tokens * dist.get_rank(model.sp_group)
    here = slice(start, start + n_tokens)
    return _Probe(tokens[here], torch.tensor(lengths), start, alone[here], scale[0])


def _lengths(model: HeadedModel) -> list[int]:
    config = model.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or max(_LENGTHS)
    lengths = [min(length, longest) for length in _LENGTHS]
    if model.sp_group is not None:
        lengths[0] -= sum(lengths) % dist.get_world_size(model.sp_group)
    return lengths


def _logits_alone(model: HeadedModel, row: Tensor, scale: list[float]) -> Tensor:
    """Logits `[N, V]` of one sequence by the model's own forward; the first sets the scale."""
    head = model.model.get_output_embeddings()

    def choose(hidden: Tensor) -> None:
        size = head(hidden).float().square().mean().sqrt().item()
        scale.append(2.0 ** max(0, round(math.log2(_LOGITS / size))) if size > 0 else 1.0)

    inputs = {"input_ids": row[None], "use_cache": False}
    logits = _logits(model.model, inputs, scale, choose if model.head.linear else None)
    if not scale:  # the head does not simply read hidden states
        scale.append(1.0)
    return logits


def _logits_packed(model: HeadedModel, probe: _Probe) -> Tensor:
    """Logits `[N, V]`, or this rank's columns, of a slice of a pack, computed as in training."""
    inputs = model.inputs(probe.states, probe.lengths, probe.start)
    if not model.head.linear:
        return _logits(model.model, inputs, [probe.scale])
    hidden = model.model.base_model(**inputs).last_hidden_state[0]
    return F.linear(hidden * probe.scale, *model.head.weights(model.model))


def _logits(
    model: PreTrainedModel,
    inputs: dict,
    scale: list[float],
    choose: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Logits of hidden states times `scale`, which `choose` appends if there is none yet; the
    hidden states themselves if the model has no head over words."""

    def multiply(module, args, output):
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return
        if not scale and choose is not None:
            choose(hidden)
        if scale and scale[0] != 1:
            output.last_hidden_state = hidden * scale[0]

    hook = None
    if model.base_model is not model:
        hook = model.base_model.register_forward_hook(multiply)
    try:
        if model.get_output_embeddings() is None:
            return model.base_model(**inputs).last_hidden_state[0].clone()
        return model(**inputs).logits[0].clone()  # FSDP warns of views
    finally:
        if hook is not None:
            hook.remove()


def _fault(model: HeadedModel, probe: _Probe, train: bool) -> str | None:
    """What is wrong with the logits of the pack, on the worst rank; None if nothing."""
    fault, found = "", torch.full((2,), math.inf)
    try:
        with torch.set_grad_enabled(train):
            logits = model.run(_logits_packed, probe).detach()
        found = _distance(model, probe, logits)
    except _MACHINE_ERRORS:
        raise
    except Exception as error:
        fault = first_line(error)
    _reshard(model)
    found = found.to(probe.states.device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    error, nats = found.tolist()
    if error <= 1:
        return None
    return fault or f"log-probabilities differ by {nats:.2g}"


def _distance(model: HeadedModel, probe: _Probe, logits: Tensor) -> Tensor:
    """The error of the logits, in units of the tolerance, and in nats."""
    alone, exact = probe.alone.float(), logits.dtype == torch.float32
    if model.head.linear and model.tp_group is not None:
        shard = shard_of(alone.shape[1], model.tp_group)
        alone = alone[:, shard.start : shard.start + shard.columns]
    logits = logits.float()
    size = (alone - alone.mean(1, keepdim=True)).norm(dim=1).clamp(min=torch.finfo().tiny)
    errors = (logits - alone).norm(dim=1) / size
    token = torch.arange(probe.start, probe.start + len(logits), device=logits.device)
    second = token >= probe.lengths[0]
    parts = [part for part in (errors[~second], errors[second]) if len(part)]
    worst = errors.max() if exact else torch.stack([part.median() for part in parts]).max()
    logps, alone = ((x / probe.scale).log_softmax(1) for x in (logits, alone))
    found = torch.stack(
        [worst / (_TOLERANCE if exact else _TOLERANCE_16_BIT), (logps - alone).abs().max()]
    )
    return found.nan_to_num(nan=math.inf)


def _others(model: HeadedModel, attention: str, probe: _Probe) -> list[str]:
    """The other attentions that pass."""
    names = ["sdpa_varlen", "sdpa", "eager"]
    found = []
    for name in names:
        if name == attention:
            continue
        try:
            with _attention(model.model, register_attention(name)):
                if _fault(model, probe, train=False) is None:
                    found.append(name)
        except _MACHINE_ERRORS:
            raise
        except (ValueError, ImportError):  # transformers does not know it
            continue
    return found


def _reshard(model: HeadedModel) -> None:
    """FSDP keeps the root's weights gathered for a backward, but there is none here."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _probing(model: HeadedModel) -> Iterator[None]:
    """No dropout, short limits, nothing compiled, and no weights that are all one number (zeros, as
    before training), which would hide what they are multiplied with."""
    modes = {module: module.training for module in model.modules()}
    limits, constants = [], _constants(model)
    for holder in (*_configs(model), *model.modules()):
        for name, value in vars(holder).items():
            if type(value) is int and value > _LIMIT and _LIMITS.search(name):
                limits.append((holder, name, value))
    try:
        model.eval()
        for holder, name, _ in limits:
            setattr(holder, name, _LIMIT)
        for name, (weight, _) in constants.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight += _NOISE * torch.randn(weight.shape, generator=generator).to(weight)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for holder, name, value in limits:
            setattr(holder, name, value)
        for weight, value in constants.values():
            weight.fill_(value)
        for module, training in modes.items():
            module.training = training
        _reshard(model)


def _constants(model: HeadedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """`{name: (weight, value)}` of those whose part here is all one number."""
    found = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        if not weight.numel():
            continue
        value = weight[(0,) * weight.ndim].clone()
        # the first row rules out nearly all others
        if weight[:1].eq(value).all() and weight.eq(value).all():
            found[name] = weight, value
    return found


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """The config, and the configs of parts, each once."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in configs if isinstance(config, PretrainedConfig)]
    configs += [config.get_text_config() for config in configs]
    return [*{id(config): config for config in configs}.values()]


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention. `set_attn_implementation` skips families that do not look theirs up by
    name, but their masks depend on it too."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
