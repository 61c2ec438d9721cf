"""Whether a model computes for packed sequences what transformers computes for each of them alone.

Attention, masks, positions, recurrent states and heads differ between some two hundred families,
and one that the packed path gets wrong would train on wrong numbers without a word. So every model
is asked once, when its weights are in place and it is spread as it will be: two short sequences in
a pack, against transformers' own forward of one at a time.
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
# Where a model limits how many tokens a token sees, or from where on it scales something, the limit
# is mostly beyond these sequences; in the check it is no more than this.
_LIMIT = 6
_LIMITS = re.compile(r"sliding_window|window_size|attention_window|attention_chunk|local_attention|"
                     r"floor_scale|log_scaling_n_floor")  # fmt: skip
# The largest error of a token's logits, as part of their size, in fp32; in 16 bits the largest that
# half of a sequence's tokens may have, as single tokens may be sent to other experts there.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.1
# Hidden states are scaled until logits are about so large: a head that caps them shows it then.
_LOGITS = 32.0
_NOISE = 0.1  # of weights that are one number all over
# Where the model was asked for a pack and raised; of the machine is everything else.
_NOT_THE_MODELS = (torch.OutOfMemoryError, dist.DistError, MemoryError)


@dataclass(frozen=True)
class _Probe:
    """This rank's slice of the pack, and what its sequences are alone.

    Attributes:
        states: `[N]` tokens.
        lengths: `[2]` of the whole pack.
        start: where in the pack the slice begins.
        alone: `[N, V]` logits, of hidden states times `scale`.
        scale: a power of two.
    """

    states: Tensor
    lengths: Tensor
    start: int
    alone: Tensor
    scale: float


def self_check(model: HeadedModel, attention: str, device: torch.device, train: bool) -> None:
    """Set `model.head.linear`, or refuse the model.

    A collective, after which all ranks know the same. Weights and random state are left alone.

    Args:
        attention: as the config has it.
        train: whether gradients will be asked for.

    Raises:
        ConfigError: packed, the sequences are not what they are alone.
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
        f"actor.attn_implementation={attention}: {family} does not compute for packed sequences "
        f"what each of them is alone ({fault}); {way_out}"
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
    except _NOT_THE_MODELS:
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
    """`[N, V]` of one sequence, by the model's own forward; the first one sets the scale."""
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
    """`[N, V]`, or this rank's columns, of a slice of a pack, by the way that training takes."""
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
    """Logits of hidden states times `scale`, which `choose` appends where there is none yet; the
    hidden states themselves where the model has no head over words."""

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
    """What is wrong with the logits of the pack, on the rank where it is worst; None if nothing."""
    fault, found = "", torch.full((2,), math.inf)
    try:
        with torch.set_grad_enabled(train):
            logits = model.run(_logits_packed, probe).detach()
        found = _distance(model, probe, logits)
    except _NOT_THE_MODELS:
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
    """How large the error of the logits is, in units of what is tolerated, and in nats."""
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
    """Which other attentions pass."""
    names = ["sdpa_varlen", "sdpa", "eager"]
    found = []
    for name in names:
        if name == attention:
            continue
        try:
            with _attention(model.model, register_attention(name)):
                if _fault(model, probe, train=False) is None:
                    found.append(name)
        except _NOT_THE_MODELS:
            raise
        except (ValueError, ImportError):  # transformers' answer to what it does not know
            continue
    return found


def _reshard(model: HeadedModel) -> None:
    """FSDP leaves the root's weights gathered for a backward, which does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _probing(model: HeadedModel) -> Iterator[None]:
    """No dropout, short limits, nothing compiled, and no weights that are the same number all over
    (zeros, as before training): those would hide what they are multiplied with."""
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
    """`{name: (weight, value)}` of those whose part here is one number all over."""
    found = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        if not weight.numel():
            continue
        value = weight[(0,) * weight.ndim].clone()
        # the first row tells of nearly all that they are not
        if weight[:1].eq(value).all() and weight.eq(value).all():
            found[name] = weight, value
    return found


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """The config, and those of parts, each once."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in configs if isinstance(config, PretrainedConfig)]
    configs += [config.get_text_config() for config in configs]
    return [*{id(config): config for config in configs}.values()]


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention. `set_attn_implementation` leaves out the families that do not look theirs
    up by name, but their masks depend on it as well."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
