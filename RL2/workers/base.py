"""What every worker is: a sharded model on this rank, and an optimizer where it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from RL2.distributed import (
    Layout,
    Traffic,
    build_mesh,
    clip_gradients,
    full_tensors,
    parallelize,
    sequence_parallel_mesh,
    shard,
    world_size,
)
from RL2.distributed.comm import Batch
from RL2.models.causal_lm import (
    attention_cost,
    check_dropout,
    check_head,
    checkpoint_layers,
    compile_layers,
    load_model,
)
from RL2.models.copies import check_copies
from RL2.models.dtypes import resolve_attention
from RL2.models.loading import materialize
from RL2.models.lora import has_adapters, init_adapters, merged
from RL2.models.saved import own_memory
from RL2.models.self_check import self_check
from RL2.ops.token_stats import LossFunction


class Worker:
    """A model spread over all ranks.

    Args:
        config: an `actor` or `ref_actor` node.
        device: this rank's device.
        train: whether it gets an optimizer (AdamW over fp32 weights).
        traffic: counts what crosses ranks.
    """

    def __init__(
        self, config, device: torch.device, *, train: bool, traffic: Traffic | None = None
    ):
        self.config = config
        self.device = device
        self.traffic = traffic or Traffic()
        self.layout = Layout(world_size(), config.sp_size, config.tp_size)
        self.model, self.dtypes, files = load_model(config, train=train)
        if train:
            check_dropout(self.hf_model.config, config)
        self.attention_cost = attention_cost(self.hf_model)
        mesh = build_mesh(device.type, config.ddp_size, config.tp_size)
        self.tp_group: dist.ProcessGroup | None = None
        partial: list[str] = []
        if config.tp_size > 1:
            self.tp_group = self.model.tp_group = mesh["tp"].get_group()
            partial = parallelize(self.hf_model, mesh["tp"])
        if config.sp_size > 1:
            sp_mesh = sequence_parallel_mesh(device.type, self.layout)
            self.model.sp_group = sp_mesh.get_group()
        layers = set(self.hf_model._no_split_modules or ())
        if train and config.compile:
            compile_layers(self.hf_model, layers, config.gradient_checkpointing)
        elif train and config.gradient_checkpointing:
            checkpoint_layers(self.hf_model, layers)
        if files is None:
            own_memory(self.model.to(device))
        shard(self.model, layers, mesh["ddp", "fsdp"], self.dtypes.compute)
        if files is not None:
            materialize(self.model, self.hf_model, files, device)
        if has_adapters(self.hf_model):
            init_adapters(self.hf_model, config.lora.seed)
        check_copies(self.hf_model, config.model_name)
        attention = resolve_attention(config.attn_implementation, self.dtypes.compute)
        self_check(self.model, attention, device, train)
        check_head(self.model, config)
        # Whole parameters of which a tensor-parallel rank sees a part of the gradient.
        self.partial: list[nn.Parameter] = [self.hf_model.get_parameter(name) for name in partial]
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LambdaLR | None = None
        if train:
            self.optimizer = torch.optim.AdamW(
                [parameter for parameter in self.model.parameters() if parameter.requires_grad],
                lr=config.lr,
                weight_decay=config.weight_decay,
                fused=True,
            )
        else:
            self.model.requires_grad_(False).eval()

    @property
    def hf_model(self):
        """The transformers model inside, its parameters sharded."""
        return self.model.model

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`(name, whole tensor)` of the model, one by one, adapters merged into them: what engines
        serve. A collective: every rank must iterate."""
        return merged(self.hf_model, self._full_tensors())

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in full_tensors(self.hf_model):
            held = self.hf_model.get_parameter(name).to_local()
            self.traffic.add("weights", tensor.nbytes - held.nbytes)
            yield name, tensor

    def prepare_scheduler(self, n_updates: int, done: int = 0) -> None:
        """Warm-up and decay of the learning rate over `n_updates` optimizer steps, of which `done`
        lie behind. Rate and weight decay are the config's, whatever was loaded."""
        self.n_updates = n_updates
        for group in self.optimizer.param_groups:
            group |= {"lr": self.config.lr, "initial_lr": self.config.lr}
            group["weight_decay"] = self.config.weight_decay
        name = self.config.scheduler
        self.scheduler = get_scheduler(
            # transformers' `constant` ignores the warm-up that `warmup_ratio` asks for
            "constant_with_warmup" if name == "constant" else str(name),
            self.optimizer,
            num_warmup_steps=int(self.config.warmup_ratio * n_updates),
            num_training_steps=n_updates,
        )
        if done > 0:
            factors = self.scheduler.lr_lambdas
            self.scheduler = LambdaLR(self.optimizer, factors, last_epoch=done - 1)

    def to_device(self, micro_batch: Batch) -> Batch:
        """Keep what the statistics need of a micro-batch and put it on the device.

        Every field but `states`, `lengths` and `start` shrinks from all `[N]` tokens to the `[A]`
        action tokens; `positions [A]` says where those stand.
        """
        positions = micro_batch["action_mask"].nonzero().squeeze(-1)
        whole = {"states": micro_batch["states"], "positions": positions}
        chosen = {
            name: field[positions]
            for name, field in micro_batch.items()
            if name not in ("states", "lengths", "start", "action_mask")
        }
        moved = {
            name: field.to(self.device, non_blocking=True)
            for name, field in (whole | chosen).items()
        }
        return moved | {name: micro_batch[name] for name in ("lengths", "start")}

    def forward(
        self,
        micro_batch: Batch,
        wanted: tuple[str, ...],
        top_k: int = 0,
        loss_fn: LossFunction | None = None,
    ) -> dict[str, torch.Tensor]:
        """Token statistics `{name: [A]}` of a micro-batch from `to_device`: those asked for.

        With `loss_fn` the sum of its loss, as `loss`, and those of its metrics instead.
        """
        return self.model(
            micro_batch["states"],
            micro_batch["lengths"],
            micro_batch["positions"],
            micro_batch["actions"],
            self.config.temperature,
            wanted,
            top_k,
            loss_fn,
            micro_batch["start"],
        )

    @contextmanager
    def inference(self) -> Iterator[None]:
        """For forwards to which no backward belongs.

        FSDP keeps the root's weights (embedding, head, last norm) gathered after a forward, for
        the backward to come, and module parameters are the gathered tensors until then. Whoever
        reads the weights next, saves or offloads them expects this rank's parts.
        """
        self.load()
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.reshard()

    def clip_gradients(self) -> torch.Tensor:
        """Bring the gradients to an end and clip them to `max_grad_norm`; returns the norm before
        clipping, over all ranks."""
        for parameter in self.partial:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.to_local(), group=self.tp_group)
        return clip_gradients(self.model.parameters(), self.config.max_grad_norm)

    def clip_large_gradients(self) -> torch.Tensor:
        """What `clip_gradients` has left as it was on every rank, in float64."""
        parameters = self.model.parameters()
        return clip_gradients(parameters, self.config.max_grad_norm, torch.float64)

    def load(self, *, optimizer: bool = False) -> None:
        """Bring what `offload` has put away back to the device, the moments if `optimizer`."""
        if self.config.offload_model:
            self.model.to(self.device)
        if optimizer and self.config.get("offload_optimizer"):
            _move_moments(self.optimizer, self.device)

    def offload(self) -> None:
        """Put model and moments into CPU memory, as far as `offload_model` and
        `offload_optimizer` say. Only `load` may follow."""
        if self.config.offload_model:
            self.model.to("cpu")
        if self.config.get("offload_optimizer"):
            _move_moments(self.optimizer, torch.device("cpu"))


def _move_moments(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:  # the step count stays
                state[name] = value.to(device)
