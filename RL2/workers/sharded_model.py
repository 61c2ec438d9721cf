"""A model spread over all ranks: a frozen policy, or the base of a learner."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from RL2.distributed import (
    Layout,
    Traffic,
    build_mesh,
    full_tensors,
    gather,
    parallelize,
    scatter,
    sequence_parallel_mesh,
    shard,
    world_size,
)
from RL2.distributed.comm import Batch
from RL2.models.build import (
    attention_cost,
    check_dropout,
    checkpoint_layers,
    compile_layers,
    load_model,
)
from RL2.models.copies import check_copies
from RL2.models.dtypes import resolve_attention
from RL2.models.heads import HEADS, LossOfStatistics
from RL2.models.loading import materialize
from RL2.models.lora import has_adapters, init_adapters, merged
from RL2.models.saved import own_memory
from RL2.models.self_check import self_check

ALWAYS = ("states", "actions", "action_mask")
"""Fields of a batch that every forward takes."""

_PACK_FIELDS = {"lengths", "start", "pack"}


class ShardedModel:
    """A model spread over all ranks, frozen unless it is a `RL2.workers.learner.Learner`.

    Args:
        config: an `actor` or `ref_actor` node.
        device: this rank's device.
        traffic: counts the bytes that cross ranks.
        head: a name in `RL2.models.heads.HEADS`.
        train: whether gradients are needed.
        name: the name of the node, for the log.
    """

    def __init__(
        self,
        config,
        device: torch.device,
        traffic: Traffic | None = None,
        *,
        head: str = "token_stats",
        train: bool = False,
        name: str = "actor",
    ):
        self.config = config
        self.device = device
        self.traffic = traffic or Traffic()
        self.layout = Layout(world_size(), config.sp_size, config.tp_size)
        self.model, self.dtypes, files = load_model(
            config, train=train, head=HEADS[head], node=name
        )
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
        exact = {self.model.head.layer} - {None}
        shard(self.model, layers, mesh["ddp", "fsdp"], self.dtypes.compute, exact)
        if files is not None:
            materialize(self.model, self.hf_model, files, device)
        if has_adapters(self.hf_model):
            init_adapters(self.hf_model, config.lora.seed)
        check_copies(self.hf_model, config.model_name)
        attention = resolve_attention(config.attn_implementation, self.dtypes.compute)
        self_check(self.model, attention, device, train)
        self.model.head.check(config)
        # Whole parameters of whose gradient a tensor-parallel rank sees a part.
        self.partial_gradients = [self.hf_model.get_parameter(name) for name in partial]
        self.frozen = not train
        if self.frozen:
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

    def annotate(
        self, batch: Batch | None, fields: Mapping[str, str], top_k: int = 0
    ) -> Batch | None:
        """Add this model's statistics of the actions to rank 0's batch, in one forward. fields:
        the names of the new fields, `[B, T]` or `[B, T, top_k]`, each with its statistic."""
        length, wanted = self.config.max_inference_length_per_device, (*fields.values(),)
        micro_batches, plan = self.scatter(batch, ALWAYS, length)
        found: dict[str, list[torch.Tensor]] = {statistic: [] for statistic in wanted}
        with self.inference():
            for micro_batch in micro_batches:
                stats = self.forward(self.to_device(micro_batch), wanted, top_k)
                for statistic in wanted:
                    values = stats[statistic].cpu()
                    flat = values.new_zeros(len(micro_batch["states"]), *values.shape[1:])
                    flat[micro_batch["action_mask"]] = values
                    found[statistic].append(flat)
        values = {name: gather(found[of], plan, self.traffic) for name, of in fields.items()}
        values = {name: value for name, value in values.items() if value is not None}
        if self.frozen:  # it has nothing else to do in this step
            self.offload()
        return batch | values if values else batch

    def scatter(self, batch: Batch | None, fields: tuple[str, ...], max_length: int):
        """This rank's micro-batches of rank 0's batch, and the plan by which `gather` puts their
        results together, see `RL2.distributed.comm.scatter`."""
        return scatter(batch, fields, max_length, self.layout, self.attention_cost, self.traffic)

    def to_device(self, micro_batch: Batch) -> Batch:
        """Keep what the statistics need of a micro-batch and put it on the device.

        Every field but `states` and those of the pack shrinks from all `[N]` tokens to the `[A]`
        action tokens; `positions [A]` says where those are.
        """
        positions = micro_batch["action_mask"].nonzero().squeeze(-1)
        whole = {"states": micro_batch["states"], "positions": positions}
        chosen = {
            name: field[positions]
            for name, field in micro_batch.items()
            if name not in ("states", "action_mask", *_PACK_FIELDS)
        }
        moved = {
            name: field.to(self.device, non_blocking=True)
            for name, field in (whole | chosen).items()
        }
        return moved | {name: micro_batch[name] for name in _PACK_FIELDS & micro_batch.keys()}

    def forward(
        self,
        micro_batch: Batch,
        wanted: tuple[str, ...],
        top_k: int = 0,
        loss_fn: LossOfStatistics | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the head computes for the actions of a micro-batch from `to_device`, `{name: [A]}`.

        wanted: names in `RL2.ops.token_stats.STATISTICS`, or `values`. The tokens of `at_logps` are
            the micro-batch's `teacher_top_ids`.
        loss_fn: if given, the result is the sum of its loss, as `loss`, and those of its metrics.
        """
        return self.model(
            micro_batch["states"],
            micro_batch["lengths"],
            micro_batch["positions"],
            micro_batch["actions"],
            self.config.get("temperature", 1.0),
            wanted,
            top_k,
            loss_fn,
            micro_batch["start"],
            micro_batch["teacher_top_ids"] if "at_logps" in wanted else None,
        )

    @contextmanager
    def inference(self) -> Iterator[None]:
        """For forwards without a backward.

        FSDP keeps the root's weights (embedding, head, last norm) gathered after a forward, for
        the backward to come, and module parameters are the gathered tensors until then. Code that
        reads, saves or offloads the weights next expects this rank's parts.
        """
        self.load()
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.reshard()

    def load(self) -> None:
        """Move the weights back to the device after `offload`."""
        if self.config.offload_model:
            self.model.to(self.device)

    def offload(self) -> None:
        """Move the weights to CPU memory, if `offload_model`. Only `load` may follow."""
        if self.config.offload_model:
            self.model.to("cpu")
