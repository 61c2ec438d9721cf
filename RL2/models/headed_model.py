"""A transformers model with one forward: from packs of sequences to the output of its head."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from RL2.models.heads import Head, LossOfStatistics, Question


class HeadedModel(nn.Module):
    """Wraps a transformers model so that FSDP gathers the head's weights where they are needed.

    `forward` takes a pack of sequences and returns results for the chosen positions only; the head
    computes nothing for prompt tokens.

    Args:
        model: as `head.auto_class` builds it.
        head: see `RL2.models.heads`.
        offload_activations: keep the activations that the backbone's backward needs in CPU memory.

    `sp_group` and `tp_group` are the groups over which packs and weights are split, None without.
    """

    def __init__(self, model: PreTrainedModel, head: Head, offload_activations: bool = False):
        super().__init__()
        self.model = model
        self.head = head
        self.offload_activations = offload_activations
        self.sp_group: dist.ProcessGroup | None = None
        self.tp_group: dist.ProcessGroup | None = None

    def forward(
        self,
        states: Tensor,
        lengths: Tensor,
        positions: Tensor,
        actions: Tensor,
        temperature: float,
        wanted: Sequence[str],
        top_k: int = 0,
        loss_fn: LossOfStatistics | None = None,
        start: int = 0,
        at: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            states: `[N]` input tokens, sequences one after the other; with sequence parallelism
                this rank's slice of them.
            lengths: `[n]` tokens of each sequence of the whole pack; in CPU memory, so that no
                kernel waits for the host.
            positions: `[A]` indices into `states`; the head's results are about their next tokens.
            actions: `[A]` those next tokens.
            temperature, wanted, top_k, loss_fn, at: see `RL2.models.heads.Question`.
            start: where in the pack the slice begins.

        Returns:
            The head's output.
        """
        inputs = self.inputs(states, lengths, start)

        def hidden() -> Tensor:
            offload = self.offload_activations and torch.is_grad_enabled()
            with save_on_cpu(pin_memory=states.is_cuda) if offload else nullcontext():
                of_all = self.model.base_model(**inputs).last_hidden_state[0]
            return of_all.index_select(0, positions)

        def logits() -> Tensor:
            return self.model(**inputs).logits[0].index_select(0, positions)

        return self.head(
            Question(
                self.model, hidden, logits, actions, temperature, wanted, top_k, at,
                loss_fn, self.tp_group,
            )
        )  # fmt: skip

    def run(self, function: Callable[..., Tensor], *args) -> Tensor:
        """`function(self, *args)` with the weights gathered, as `forward` has them."""
        return function(self, *args)

    def inputs(self, states: Tensor, lengths: Tensor, start: int) -> dict:
        """The inputs of a transformers model for a pack, or a slice of one."""
        device, longest = states.device, int(lengths.max())
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        token = torch.arange(start, start + len(states))
        row = torch.searchsorted(offsets, token, right=True) - 1
        offsets_32 = offsets.to(device, torch.int32)
        inputs = {
            "input_ids": states[None],
            "position_ids": (token - offsets[row]).to(device)[None],
            "use_cache": False,
            "cu_seq_lens_q": offsets_32,
            "cu_seq_lens_k": offsets_32,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return inputs if self.sp_group is None else inputs | {"sp_group": self.sp_group}
