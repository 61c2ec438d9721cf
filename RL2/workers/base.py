"""What every worker is: a sharded model on this rank, and an optimizer where it trains."""

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from RL2.distributed import build_mesh, shard
from RL2.distributed.comm import Batch
from RL2.ops.token_stats import LossFunction
from RL2.workers.model import load_model


class Worker:
    """A model sharded over all ranks.

    Args:
        config: an `actor` or `ref_actor` node.
        device: this rank's device.
        train: whether it gets an optimizer (AdamW over fp32 weights).
    """

    def __init__(self, config, device: torch.device, *, train: bool):
        self.config = config
        self.device = device
        self.model, dtype = load_model(config, train=train)
        self.model.to(device)
        layers = set(self.hf_model._no_split_modules or ())
        shard(self.model, layers, build_mesh(device.type, config.ddp_size), dtype)
        self.dtype = dtype
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        if train:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
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

    def prepare_scheduler(self, n_updates: int) -> None:
        """Warm-up and decay of the learning rate over `n_updates` optimizer steps."""
        name = self.config.scheduler
        self.scheduler = get_scheduler(
            # transformers' `constant` ignores the warm-up that `warmup_ratio` asks for
            "constant_with_warmup" if name == "constant" else str(name),
            self.optimizer,
            num_warmup_steps=int(self.config.warmup_ratio * n_updates),
            num_training_steps=n_updates,
        )

    def to_device(self, micro_batch: Batch) -> Batch:
        """Keep what the statistics need of a micro-batch and put it on the device.

        Every field but `states` and `lengths` shrinks from all `[N]` tokens to the `[A]` action
        tokens; `positions [A]` says where those stand in the pack.
        """
        positions = micro_batch["action_mask"].nonzero().squeeze(-1)
        whole = {"states": micro_batch["states"], "positions": positions}
        chosen = {
            name: field[positions]
            for name, field in micro_batch.items()
            if name not in ("states", "lengths", "action_mask")
        }
        moved = {
            name: field.to(self.device, non_blocking=True)
            for name, field in (whole | chosen).items()
        }
        return moved | {"lengths": micro_batch["lengths"]}

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
        )

    def clip_gradients(self) -> torch.Tensor:
        """Clip to `max_grad_norm`; returns the norm before clipping, over all ranks."""
        norm = clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
