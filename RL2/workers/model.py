"""A transformers causal LM behind the one question the losses ask: statistics per token."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from RL2.config import ConfigError
from RL2.ops.attention import register_attention
from RL2.ops.token_stats import (
    LossFunction,
    linear_token_loss,
    linear_token_stats,
    loss_of,
    token_stats,
)

# Models that do more than a matrix product between hidden states and logits name it so.
_NON_LINEAR_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class TokenStatsModel(nn.Module):
    """Wraps a causal LM so that FSDP gathers the head's weight where the statistics need it.

    `forward` takes a pack of sequences and returns statistics of the chosen positions only;
    logits of prompt tokens are never computed, nor, with a linear head, all logits of a token.

    Args:
        model: the causal LM.
        implementation: of `RL2.ops.token_stats.linear_token_stats`.
    """

    def __init__(self, model: PreTrainedModel, implementation: str = "auto"):
        super().__init__()
        self.model = model
        self.implementation = implementation
        head = model.get_output_embeddings()
        self.linear_head = isinstance(head, nn.Linear) and not any(
            getattr(model.config, name, None) for name in _NON_LINEAR_HEADS
        )

    def forward(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        positions: torch.Tensor,
        actions: torch.Tensor,
        temperature: float,
        wanted: Sequence[str],
        top_k: int = 0,
        loss_fn: LossFunction | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            states: `[N]` input tokens, sequences one after the other.
            lengths: `[n]` tokens of each sequence, summing to N; in CPU memory, so that no
                kernel waits for the host.
            positions: `[A]` indices into the pack whose next token is asked about.
            actions: `[A]` those next tokens.
            temperature: divides the logits.
            wanted: names of the statistics, of `RL2.ops.token_stats.STATISTICS`.
            top_k: how many `top_logps`.
            loss_fn: as in `linear_token_loss`.

        Returns:
            `{name: [A]}` in fp32 (`top_logps [A, top_k]`), or with `loss_fn` the sums of its loss,
            as `loss`, and of its metrics. A plain dict, because FSDP finds its hooks' tensors in
            those.
        """
        device, longest = states.device, int(lengths.max())
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        starts = torch.repeat_interleave(offsets[:-1], lengths).to(device)
        offsets = offsets.to(device, torch.int32)
        inputs = {
            "input_ids": states[None],
            "position_ids": (torch.arange(len(states), device=device) - starts)[None],
            "use_cache": False,
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if self.linear_head:
            hidden = self.model.base_model(**inputs).last_hidden_state[0]
            head = self.model.get_output_embeddings()
            arguments = hidden.index_select(0, positions), head.weight, actions, temperature, wanted
            options = {"bias": head.bias, "top_k": top_k, "implementation": self.implementation}
            if loss_fn is not None:
                loss, metrics = linear_token_loss(*arguments, loss_fn, **options)
                return {"loss": loss, **metrics}
            stats = linear_token_stats(*arguments, **options)
        else:
            logits = self.model(**inputs).logits[0].index_select(0, positions)
            stats = token_stats(logits, actions, temperature, wanted, top_k)
            if loss_fn is not None:
                loss, metrics = loss_of(stats, len(actions), loss_fn)
                return {"loss": loss, **metrics}
        return stats.as_dict()


def load_model(config, *, train: bool) -> tuple[TokenStatsModel, torch.dtype]:
    """Load `config.model_name` with fp32 weights for FSDP to shard.

    Args:
        config: an `actor` or `ref_actor` node (model_name, dtype, attn_implementation, …).
        train: whether gradients will be asked for (decides on gradient checkpointing).

    Returns:
        The model and the dtype to compute in (`config.dtype`, or what the checkpoint says).

    Raises:
        ConfigError: the model cannot be loaded.
    """
    register_attention()
    try:
        saved = AutoConfig.from_pretrained(
            config.model_name, trust_remote_code=config.trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name,
            dtype=torch.float32,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"actor.model_name={config.model_name}: cannot be loaded as a causal language model "
            f"({str(error).splitlines()[0]}); give a folder made by save_pretrained or a model id"
        ) from error
    if config.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if train and config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dtype = config.dtype if config.dtype != "auto" else saved.dtype or torch.float32
    model = TokenStatsModel(model, str(config.token_stats))
    if not model.linear_head and model.implementation not in ("auto", "naive"):
        raise ConfigError(
            f"actor.token_stats={model.implementation}: {config.model_name} does more than one "
            "matrix product between hidden states and logits, which are computed whole; use auto"
        )
    return model, getattr(torch, dtype) if isinstance(dtype, str) else dtype
