"""The reference policy, which may follow the actor."""

import torch
from torch.distributed.tensor import DTensor

from RL2.distributed import Traffic
from RL2.models.loading import local_part, plain_name
from RL2.models.lora import has_adapters
from RL2.runtime.errors import ConfigError
from RL2.workers.sharded_model import ShardedModel


class Reference(ShardedModel):
    """A frozen policy that is replaced by the actor every `renew_every` steps, if that is not 0.

    Args: see `ShardedModel`.

    Attributes:
        renewed: whether that has happened: checkpoints then hold it.
    """

    def __init__(self, config, device: torch.device, traffic: Traffic | None = None):
        super().__init__(config, device, traffic)
        self.renewed = False

    @property
    def every(self) -> int:
        return self.config.get("renew_every", 0)

    def check(self, actor: ShardedModel) -> None:
        """ConfigError if the actor cannot replace it."""
        own, other = _shapes(self), _shapes(actor)
        different = sorted(name for name in own | other if own.get(name) != other.get(name))
        if different:
            raise ConfigError(
                f"ref_actor.renew_every={self.every}: the actor cannot replace "
                f"{self.config.model_name}, as {different[0]} has the shape "
                f"{_words(own.get(different[0]))} there and {_words(other.get(different[0]))} in "
                "the actor; use models of one shape, or 0"
            )

    @torch.no_grad()
    def follow(self, actor: ShardedModel, step: int) -> None:
        """After the updates of a step: take the actor's weights, or `renew_mix` of them, if it is
        time to (a collective).

        Each rank mixes its own parts. Only if the two are spread in different ways, or adapters are
        merged, whole tensors are gathered, one by one.
        """
        if not self.every or step % self.every:
            return
        self.load()
        own = dict(self.hf_model.named_parameters())
        theirs = dict(actor.hf_model.named_parameters())
        alike = all(_spread(own[name]) == _spread(theirs.get(name)) for name in own)
        if alike and not has_adapters(actor.hf_model):
            parts = ((name, theirs[name].to_local()) for name in own)
        else:
            parts = ((name, whole[local_part(own[name])]) for name, whole in actor.weights())
        for name, part in parts:
            own[name].to_local().lerp_(part, self.config.renew_mix)
        self.offload()
        self.renewed = True


def _spread(parameter: torch.Tensor | None) -> tuple | None:
    return (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None


def _shapes(model: ShardedModel) -> dict[str, torch.Size]:
    """Of its weights, by their names without adapters."""
    names = ((plain_name(name), p) for name, p in model.hf_model.named_parameters())
    return {name: parameter.shape for name, parameter in names if name is not None}


def _words(shape: torch.Size | None) -> str:
    return "of none" if shape is None else str([*shape])
