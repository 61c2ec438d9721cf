"""What is updated: models, batches, and the table of cases."""

import itertools
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from RL2.algorithms import resolve_advantage, sample_returns
from RL2.algorithms.algorithm import Algorithm, resolve_penalty
from tests.invariance.reference import plain_model

TEMPERATURE = 0.9
# Weights this large make attention and the q and k norms matter to the fifth digit, and some
# tokens likely (`fixed_target_kl` looks at p > 1/2).
_SHAPE = {
    "vocab_size": 67, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "qwen3": Qwen3Config(
        **_SHAPE | {"head_dim": 8, "tie_word_embeddings": True, "num_hidden_layers": 1}
    ),
    "qwen3_untied": Qwen3Config(**_SHAPE | {"head_dim": 8}),
    "qwen2": Qwen2Config(**_SHAPE | {"tie_word_embeddings": True}),  # with biases
    "llama": LlamaConfig(**_SHAPE | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**_SHAPE | {"sliding_window": 5}),
    # Four ranks hold 2, 2, 2 and 1 of the columns of the head.
    "few_words": LlamaConfig(
        **_SHAPE | {"num_key_value_heads": 4, "vocab_size": 7, "tie_word_embeddings": True}
    ),
    # Nothing but the heads divides evenly.
    "odd": Qwen3Config(**_SHAPE | {"head_dim": 6, "hidden_size": 15, "intermediate_size": 22}),
    "three_key_heads": Qwen3Config(
        **_SHAPE
        | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
        | {"intermediate_size": 33}
    ),
    "gpt2": GPT2Config(
        vocab_size=67, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, initializer_range=0.4,
    ),
}  # fmt: skip


def make_model(name: str, folder: Path) -> str:
    """A model with weights that are all different from 0 and 1, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(len(parameter)))
    model.save_pretrained(folder / name)
    return str(folder / name)


# (tokens of the prompt, of the response) of each row; the samples that the rows belong to; the
# reward of each sample. A row has one token less than prompt and response together. Two samples
# form a group.
@dataclass(frozen=True)
class Rows:
    sizes: tuple[tuple[int, int], ...]
    samples: tuple[int, ...]
    rewards: tuple[float, ...]


LONGEST = 24
# One with which the losses are well-conditioned. Elsewhere one process alone is 2e-5 away from
# float64: the gradient of JSD(p', p) is a difference of almost equal numbers where two tokens are
# almost equally likely, that of `fixed_target_kl` where the only tokens above 1/2 are just above.
_SEED = 4
# 125 tokens in all: not every pack is divisible by the size of a sequence-parallel group.
_SIZES = ((3, 9), (5, 2), (2, 17), (1, 1), (4, 21), (6, 5), (3, 3), (9, 16), (2, 6), (1, 8), (7, 5))
_SAMPLES = (0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7)  # several turns: a sample of several rows


def _rows(*rewards: float) -> Rows:
    return Rows(_SIZES, _SAMPLES, rewards)


# Groups and pairs of at most 24 tokens; the last sample has no action.
_PAIRS = ((3, 5), (2, 2), (2, 8), (1, 1), (4, 6), (2, 5), (3, 3), (9, 7), (2, 6), (4, 0))


def _pairs(*rewards: float) -> Rows:
    return Rows(_PAIRS, (0, 0, 1, 2, 3, 3, 4, 5, 6, 7), rewards)


BATCHES: dict[str, Rows | None] = {
    "mixed": _rows(1, 0, 0.5, 0, 1, 0, 0, 2),
    "none_correct": _rows(0, 0, 0, 0, 0, 0, 0, 0),
    "below_zero": _rows(-1, 0, 0, -1, 0, -2, -1, 0),  # none correct, and some better than others
    "one_correct": _rows(0, 0, 0, 0, 1, 0, 0, 0),
    "three_rows_correct": _rows(0, 0, 0, 1, 0, 0, 0, 0),
    "pairs": _pairs(1, 0, 0.5, 0, 1, 0, 0, 2),
    "pairs_none_correct": _pairs(0, 0, 0, 0, 0, 0, 0, 0),
    "pairs_one_correct": _pairs(0, 0, 0, 1, 0, 0, 0, 0),
    "one_row": Rows(((4, 9),), (0,), (1,)),
    "three_rows": Rows(((4, 9), (2, 3), (5, 20)), (0, 1, 2), (1, 0, 1)),
    "rows_of_one_token": Rows(((1, 1),) * 5, (0, 1, 2, 3, 4), (1, 0, 0, 1, 0)),
    "rows_as_long_as_allowed": Rows(((5, 20), (1, 24), (24, 1)), (0, 1, 2), (1, 0, 1)),
    "rows_without_actions": Rows(((4, 9), (5, 0), (5, 8), (9, 0)), (0, 1, 2, 3), (1, 1, 0, 0)),
    "nothing_but_prompts": Rows(((5, 0), (9, 0)), (0, 1), (1, 1)),
    "all_filtered": None,
}


@cache
def make_batch(model: str, name: str) -> dict[str, Tensor] | None:
    """A batch whose policies are near to each other, as they are in training."""
    rows = BATCHES[name]
    if rows is None:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    hf = plain_model(model)
    prompts, responses = torch.tensor(rows.sizes).T
    lengths = prompts + responses - 1
    position = torch.arange(int(lengths.max()))
    valid = position < lengths[:, None]
    mask = (position >= prompts[:, None] - 1) & valid & (responses[:, None] > 0)
    samples = torch.tensor(rows.samples)
    last_row = samples != torch.cat([samples[1:], samples.new_tensor([-1])])

    # Padding that nobody may look at.
    states = torch.randint(0, hf.config.vocab_size, valid.shape, generator=generator)
    actions, logps = torch.zeros_like(states), torch.zeros(valid.shape)
    logps_of_all = torch.zeros(*valid.shape, hf.config.vocab_size)
    for row, length in enumerate(lengths.tolist()):
        with torch.no_grad():
            logits = hf(states[row : row + 1, :length]).logits[0] / TEMPERATURE
        likely = torch.rand(length, generator=generator) < 0.4
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        actions[row, :length] = torch.where(likely, logits.argmax(-1), sampled)
        chosen = logits.log_softmax(-1).gather(-1, actions[row, :length, None])
        logps[row, :length] = chosen[:, 0].float()
        logps_of_all[row, :length] = logits.log_softmax(-1).float()

    def near(size: float) -> Tensor:
        return (logps + size * torch.randn(logps.shape, generator=generator)) * mask

    rewards = torch.zeros(valid.shape)
    rewards[last_row, lengths[last_row] - 1] = torch.tensor(rows.rewards, dtype=torch.float32)
    batch = {
        "states": states,
        "actions": actions * mask,
        "action_mask": mask,
        "lengths": lengths,
        "rewards": rewards,
        "llm_logps": near(0.4),
        "old_logps": near(0.2),
        "ref_logps": near(0.3),
        "sample_ids": samples,
        "group_ids": samples // 2,
        "pair_ids": 2 * (samples // 4) + samples % 2,  # no neighbours
        "chosen": samples % 4 < 2,
        "labels": (1.0 - 2.0 * (samples % 3 == 1))[:, None] * mask,
        "mismatch_kl": 0.3 * mask,
        "correct": sample_returns(rewards, samples) > 0,
        "old_entropy": near(1.0).abs(),
    }
    # The teacher's three likeliest tokens; where there is no action nobody may look at them.
    teacher = logps_of_all + 2.0 * torch.randn(logps_of_all.shape, generator=generator)
    top_logps, top_ids = teacher.log_softmax(-1).topk(3, -1)
    return batch | {"teacher_top_logps": top_logps, "teacher_top_ids": top_ids.int()}


_HERE = Path(__file__).parent
PREFERENCES = ("dpo", "dpop", "ipo", "simpo", "orpo", "kto")
LOSS_NODES = {name: {"name": name} for name in ("ppo", "max_target_kl", "fixed_target_kl", "nll")}
LOSS_NODES |= {
    "rank_jsd": {"name": "rank_jsd", "max_rank": 3},
    "margin": {"import_path": f"{_HERE / 'losses.py'}:margin"},
    "above": {"import_path": "tests.invariance.losses:above"},
}
# With bounds that some tokens of these batches are beyond, and some are not.
_CLIPS = {"clip_low": 0.03, "clip_high": 0.03}
OF_RATIOS = {
    "cispo": {"clip_high": 0.2},
    "sapo": {},
    "dppo": {"max_divergence": 0.03},
    "clip_cov": {"share": 0.2, "min_covariance": 0.05, "clip_low": 0.2, "clip_high": 0.2},
    "kl_cov": {"share": 0.2},
    "entropy_80_20": {"clip_low": 0.1},
}
OF_SEGMENTS = ("gspo", "likelihood", "best_of_group")
_OWN_OF_SEGMENTS = ("ratios", "likelihood", "best_of_group")
LOSS_NODES_OF_SEGMENTS = {
    name: {"import_path": f"tests.invariance.losses:{name}"} for name in _OWN_OF_SEGMENTS
} | {name: {"name": name} | _CLIPS for name in ("gspo", "gspo_token", "gmpo")}
LOSS_NODES_OF_SEGMENTS |= {name: {"name": name} for name in PREFERENCES}
OTHER_NODES = LOSS_NODES_OF_SEGMENTS | {
    name: {"name": name} | options for name, options in OF_RATIOS.items()
}
OTHER_NODES["topk_kl"] = {"name": "topk_kl"}
OTHER_NODES["topk_jsd"] = {"name": "topk_jsd", "jsd_beta": 0.3}
OTHER_NODES["dual_clip"] = {"name": "ppo", "dual_clip": 1.1}
ESTIMATORS = {
    "reinforce": {"estimator": "reinforce", "global_norm": False, "norm_var": False},
    "grpo": {"estimator": "reinforce", "global_norm": True, "norm_var": True},
    "spo": {"estimator": "spo"},
}
_SHELF = ("rloo", "opo", "maxrl", "pass_k", "reinforce_pp", "reinforce_pp_baseline")
ESTIMATORS |= {name: {"estimator": name} for name in _SHELF}


@dataclass(frozen=True)
class Case:
    """One update.

    Attributes:
        changes: of the config of the actor.
        without: fields that the batch lacks.
    """

    loss: str = "ppo"
    level: str = "token"
    advantage: str = "reinforce"
    batch: str = "mixed"
    changes: dict = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def task(self, model: str) -> SimpleNamespace:
        """What `Actor.update` needs: the loss's node, changes of the config, and the batch."""
        changes = {"avg_level": self.level} | self.changes
        batch = make_batch(model, self.batch)
        if batch is not None:
            kl = {"coef": 0.0, "type": None, "reward_estimator": "k1"} | self.changes.get("kl", {})
            config = OmegaConf.create({"actor": {"kl": kl}})
            estimator = resolve_advantage(ESTIMATORS[self.advantage])
            algorithm = Algorithm(None, estimator, penalty=resolve_penalty(config))
            batch = algorithm.advantages(batch)
            batch = {name: x for name, x in batch.items() if name not in self.without}
        node = (LOSS_NODES | OTHER_NODES)[self.loss]
        return SimpleNamespace(loss=node, changes=changes, batch=batch)


LEVELS = ("token", "sequence", "correct")
_ENTROPY = {"entropy": {"coef": 0.02}}
_KL = {"coef": 0.1, "loss_estimator": "k2", "reward_estimator": "k3"}
_NO_POLICIES = ("old_logps", "ref_logps", "llm_logps")

CASES: dict[str, Case] = {
    f"{loss}-{level}-{advantage}": Case(loss, level, advantage)
    for loss, level, advantage in itertools.product(LOSS_NODES, LEVELS, ("reinforce", "spo"))
    # the mean over correct samples reads no advantages but those that the loss itself takes
    if level != "correct" or advantage == "spo" or loss in ("ppo", "margin")
}
CASES |= {
    "entropy": Case(changes=_ENTROPY),
    "entropy-sequence": Case("max_target_kl", "sequence", "spo", changes=_ENTROPY),
    # a bonus reaches tokens that the loss gives no gradient
    "entropy-correct": Case("fixed_target_kl", "correct", "spo", changes=_ENTROPY),
    "grpo": Case(advantage="grpo"),
    "no-other-policy": Case(without=_NO_POLICIES),
    "no-other-policy-spo": Case("max_target_kl", "correct", "spo", without=_NO_POLICIES),
    "temperature": Case("rank_jsd", "token", "spo", changes={"temperature": 1.7}),
    "clipped-gradient": Case(changes={"max_grad_norm": 1e-3}),
    "options": Case("ppo", "sequence", changes={"max_grad_norm": 0.2}),
}
CASES |= {
    f"tis-{kind}-{loss}": Case(loss, level, changes={"tis_coef": coef, "tis_type": kind})
    for kind, coef in (("truncate", 1.2), ("mask", 1.5))
    for loss, level in (("ppo", "token"), ("nll", "sequence"), ("max_target_kl", "correct"))
}
CASES |= {
    "kl-k1": Case(changes={"kl": _KL | {"type": "loss", "loss_estimator": "k1"}}),
    "kl-k2": Case("nll", "correct", "spo", changes={"kl": _KL | {"type": "loss"}}),
    "kl-k3": Case(
        "ppo", "sequence", changes={"kl": _KL | {"type": "loss", "loss_estimator": "k3"}}
    ),
    "kl-reward": Case(changes={"kl": _KL | {"type": "reward"}}),
    "kl-advantage": Case(
        "max_target_kl", "token", "spo", changes={"kl": _KL | {"type": "advantage"}}
    ),
}  # fmt: skip
CASES |= {
    f"kl-{name}": Case(loss, level, changes={"kl": _KL | {"type": "loss"} | changes})
    for name, loss, level, changes in (
        ("sequence_sum", "ppo", "token", {"avg_level": "sequence_sum", "clamp": 0.02}),
        ("of-all", "max_target_kl", "correct", {"avg_level": "token", "loss_estimator": "k3"}),
        ("unbiased", "nll", "sequence", {"unbiased": True, "loss_estimator": "k3"}),
    )
}
CASES |= {name: Case(advantage=name) for name in _SHELF}
CASES |= {  # a rank, or all of them, has little or nothing to learn from
    f"{batch}-{loss}-{level}": Case(loss, level, "spo", batch)
    for batch in ("none_correct", "one_correct", "three_rows_correct")
    for loss, level in (("max_target_kl", "correct"), ("rank_jsd", "sequence"), ("ppo", "token"))
}
CASES["below_zero-nll"] = Case("nll", "sequence", "reinforce", "below_zero")
CASES |= {
    f"{batch}-{loss}": Case(loss, level, advantage, batch, _ENTROPY)
    for batch in (
        "one_row", "three_rows", "rows_of_one_token", "rows_as_long_as_allowed",
        "rows_without_actions", "nothing_but_prompts", "all_filtered",
    )
    for loss, level, advantage in (
        ("ppo", "sequence", "reinforce"), ("fixed_target_kl", "correct", "spo"),
    )
}  # fmt: skip
CASES |= {
    f"three_updates-{loss}-{batch}": Case(
        loss, level, advantage, batch, {"update_per_rollout": 3, "max_grad_norm": 1.0}
    )
    for loss, level, advantage, batch in (
        ("ppo", "token", "reinforce", "mixed"),
        ("max_target_kl", "sequence", "spo", "mixed"),
        ("nll", "correct", "spo", "three_rows_correct"),  # two of the three are skipped
        ("margin", "sequence", "spo", "one_row"),  # two of the three are empty
    )
}

CASES["three_updates-tis"] = Case(
    "nll", "sequence", changes={"update_per_rollout": 3, "tis_coef": 1.2, "max_grad_norm": 1.0}
)

CASES |= {
    f"{loss}-{level}": Case(loss, level, batch="pairs") for loss in OF_SEGMENTS for level in LEVELS
}
CASES |= {f"{loss}-sequence": Case(loss, "sequence", batch="pairs") for loss in PREFERENCES}
CASES["dpo-token"] = Case("dpo", "token", batch="pairs")
CASES |= {
    "gspo-tis-mask": Case("gspo", "sequence", batch="pairs",
                          changes={"tis_coef": 1.2, "tis_type": "mask"}),
    "likelihood-tis": Case("likelihood", "token", batch="pairs", changes={"tis_coef": 1.1}),
    "ratios-tis": Case("ratios", "sequence", batch="pairs", changes={"tis_coef": 1.1}),
    "gspo_token-tis": Case("gspo_token", "sequence", batch="pairs", changes={"tis_coef": 1.1}),
    "gspo-entropy-kl": Case(
        "gspo", "token", batch="pairs", changes=_ENTROPY | {"kl": _KL | {"type": "loss"}}
    ),
    "gspo-kl-sequence_sum": Case(
        "gspo", "token", batch="pairs",
        changes={"kl": _KL | {"type": "loss", "avg_level": "sequence_sum", "unbiased": True}},
    ),
    "gspo-no-other-policy": Case("gspo", "sequence", batch="pairs", without=_NO_POLICIES),
    "gmpo-one_row": Case("gmpo", "sequence", "spo", "one_row"),
    "gspo-one_correct": Case("gspo", "correct", "spo", "pairs_one_correct"),
    "likelihood-none_correct": Case("likelihood", "token", "spo", "pairs_none_correct"),
    "best_of_group-none_correct": Case("best_of_group", "token", "spo", "pairs_none_correct"),
    "gspo-rows_of_one_token": Case("gspo", "token", "spo", "rows_of_one_token"),
    "three_updates-gspo": Case("gspo", "sequence", "spo", "pairs", {"update_per_rollout": 3}),
    "three_updates-best_of_group": Case(
        "best_of_group", "token", "spo", "pairs", {"update_per_rollout": 3}
    ),
    "three_updates-dpo": Case("dpo", "token", "spo", "pairs", {"update_per_rollout": 3}),
}  # fmt: skip
CASES |= {
    f"{loss}-sequence": Case(loss, "sequence", batch="pairs") for loss in ("gmpo", "gspo_token")
}
CASES |= {f"{loss}-token": Case(loss) for loss in OF_RATIOS}
CASES |= {
    "dual_clip": Case("dual_clip", "sequence"),
    "three_updates-kl_cov": Case("kl_cov", changes={"update_per_rollout": 3}),
    "tis-sequence_truncate-nll": Case(
        "nll", changes={"tis_coef": 1.2, "tis_type": "sequence_truncate"}
    ),
    "tis-geometric_mask-ppo": Case(
        "ppo", "sequence", changes={"tis_coef": 1.1, "tis_type": "geometric_mask"}
    ),
    "tis-token_reject-gspo": Case(
        "gspo", "sequence", batch="pairs", changes={"tis_coef": 2.0, "tis_type": "token_reject"}
    ),
    "tis-sequence_reject-gspo_token": Case(
        "gspo_token",
        batch="pairs",
        changes={"tis_coef": 1.5, "tis_type": "sequence_reject", "update_per_rollout": 2},
    ),
}

CASES |= {
    "topk_kl-token-spo": Case("topk_kl", "token", "spo"),
    "topk_jsd-sequence": Case("topk_jsd", "sequence"),
    "three_updates-topk_kl": Case("topk_kl", "token", "spo", "mixed", {"update_per_rollout": 3}),
    "topk_jsd-rows_without_actions": Case("topk_jsd", "token", "spo", "rows_without_actions"),
}

# What families and shapes of models are tried with.
FAMILY_CASES = {
    name: CASES[name]
    for name in (
        "ppo-token-reinforce", "max_target_kl-sequence-spo", "fixed_target_kl-correct-spo",
        "rank_jsd-correct-spo", "above-sequence-spo", "margin-token-reinforce",
        "three_updates-ppo-mixed", "gspo-sequence",
        "topk_kl-token-spo",
    )
}  # fmt: skip
# What spreads are tried with that are made of parts which have been tried with everything.
SOME_CASES = FAMILY_CASES | {
    name: CASES[name]
    for name in (
        "nll-sequence-reinforce", "fixed_target_kl-token-spo", "rank_jsd-token-reinforce",
        "entropy-correct", "clipped-gradient", "no-other-policy", "tis-mask-ppo", "kl-k2",
        "none_correct-rank_jsd-sequence", "none_correct-ppo-token",
        "one_correct-max_target_kl-correct", "one_correct-ppo-token",
        "three_rows_correct-rank_jsd-sequence", "one_row-fixed_target_kl",
        "rows_of_one_token-ppo", "rows_as_long_as_allowed-ppo", "rows_without_actions-ppo",
        "nothing_but_prompts-ppo", "all_filtered-ppo", "three_updates-nll-three_rows_correct",
        "three_updates-margin-one_row", "gspo-token", "gspo_token-sequence", "three_updates-kl_cov",
        "tis-geometric_mask-ppo", "tis-token_reject-gspo",
        "best_of_group-sequence", "dpo-token", "dpop-sequence", "kto-sequence",
         "three_updates-dpo",
    )
}  # fmt: skip
