"""Mistakes in how an update is spread over ranks and micro-batches."""

from tests.invariance.mutations.mutation import Mutation

UPDATE = "tests/invariance/test_invariance.py::test_update"
LOGPS = "tests/invariance/test_invariance.py::test_logps"

LEARNER, FSDP = "RL2/workers/learner.py", "RL2/distributed/fsdp.py"
COMM, SWEEP = "RL2/distributed/comm.py", "RL2/ops/token_stats/sweep.py"

_BACKWARD = """            loss.backward()
"""
_LOCAL_COUNT = """            local = sum(one["loss_weights"].sum() for one in micro_batches) + 1e-9
            (loss / (local * self.layout.world_size)).backward()
"""

MUTATIONS: dict[str, Mutation] = {
    # (a) backward skipped on a rank without correct sequences
    "a-backward-skipped-fsdp": Mutation(
        LEARNER,
        _BACKWARD,
        """            if micro_batch["loss_weights"].any():
                loss.backward()
""",
        f"{UPDATE}[qwen3-fsdp2-one_correct-max_target_kl-correct]",
    ),
    "a-backward-skipped-hsdp": Mutation(
        LEARNER,
        _BACKWARD,
        """            if micro_batch["loss_weights"].any():
                loss.backward()
""",
        f"{UPDATE}[qwen3-ddp2-fsdp2-one_correct-max_target_kl-correct]",
    ),
    # (b) gradients divided by the local count
    "b-local-count-fsdp": Mutation(
        LEARNER, _BACKWARD, _LOCAL_COUNT, f"{UPDATE}[qwen3-fsdp2-one_correct-max_target_kl-correct]"
    ),
    "b-local-count-ddp": Mutation(
        LEARNER, _BACKWARD, _LOCAL_COUNT, f"{UPDATE}[qwen3-ddp2-one_correct-max_target_kl-correct]"
    ),
    # (c) summed over ranks what is one number, or averaged what is a sum
    "c-loss-of-tp-ranks-summed": Mutation(
        LEARNER,
        "totals = totals / self.layout.tp_size",
        "totals = totals / 1",
        f"{UPDATE}[qwen3-tp2-ppo-token-reinforce]",
    ),
    "c-loss-not-summed": Mutation(
        LEARNER,
        "totals = sum_over_ranks(torch.stack([sums.get(name, zero).double() for name in names]))",
        "totals = torch.stack([sums.get(name, zero).double() for name in names])",
        f"{UPDATE}[qwen3-sp2-ppo-token-reinforce]",
    ),
    "c-gradients-averaged": Mutation(
        FSDP,
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(mesh.size()))",
        f"{UPDATE}[qwen3-ddp2-ppo-sequence-reinforce]",
    ),
    "c-replicas-summed-too-early": Mutation(
        LEARNER,
        "(number == len(micro_batches))",
        "(number == 1)",
        f"{UPDATE}[qwen3-ddp2-ppo-sequence-reinforce]",
    ),
    "c-norm-of-one-rank": Mutation(
        FSDP,
        "_norm([p.grad for p in group], dtype).full_tensor()",
        "_norm([p.grad.to_local() for p in group], dtype)",
        f"{UPDATE}[qwen3-fsdp2-clipped-gradient]",
    ),
    "c-qk-norms-of-one-rank": Mutation(
        LEARNER,
        "for parameter in self.partial_gradients:",
        "for parameter in ():",
        f"{UPDATE}[qwen3-tp2-ppo-token-reinforce]",
    ),
    # (d) a vocabulary shard as if it were the vocabulary
    "d-argmax-on-a-shard": Mutation(
        SWEEP,
        "        state = states.merge_all(head.shard.all_gather(state).unbind())\n",
        "        own = state\n"
        "        state = states.merge_all(head.shard.all_gather(state).unbind())\n"
        "        state = torch.cat([own[:2], state[2:]])\n",
        f"{UPDATE}[qwen3-tp2-max_target_kl-correct-spo]",
    ),
    "d-columns-count-from-the-shard": Mutation(
        "RL2/ops/token_stats/tiling.py",
        "return 0 if self.shard is None else self.shard.start",
        "return 0",
        f"{UPDATE}[qwen3-tp2-max_target_kl-correct-spo]",
    ),
    "d-ranks-on-a-shard": Mutation(
        SWEEP,
        "        head.shard.all_reduce(above)\n",
        "        pass\n",
        f"{UPDATE}[qwen3-tp2-above-token-spo]",
    ),
    "d-top-k-on-a-shard": Mutation(
        SWEEP,
        "all_z = head.shard.all_gather(top_z).transpose(0, 1).flatten(1)",
        "all_z = top_z.repeat(1, len(head.shard.all_gather(top_z)))",
        f"{UPDATE}[qwen3-tp2-rank_jsd-sequence-spo]",
    ),
    # (e) denominators counted per micro-batch
    "e-loss-per-micro-batch": Mutation(
        LEARNER,
        _BACKWARD,
        """            (loss / micro_batch["loss_weights"].sum().clamp(min=1e-9)).backward()
""",
        f"{UPDATE}[qwen3-small-ppo-token-reinforce]",
    ),
    "e-metrics-per-micro-batch": Mutation(
        LEARNER,
        "sums[name] = sums.get(name, 0.0) + value.detach()",
        "n = 1 if name == f'{self.name}/loss' else max(1, int(micro_batch['action_mask'].sum()))\n"
        "                share = n_actions / (n * len(micro_batches) * self.layout.dp_size)\n"
        "                sums[name] = sums.get(name, 0.0) + value.detach() * share",
        f"{UPDATE}[qwen3-small-margin-token-spo]",
    ),
    "e-rows-counted-for-samples": Mutation(
        LEARNER,
        "self.config.avg_level, samples)",
        "self.config.avg_level)",
        f"{UPDATE}[qwen3-packed-ppo-sequence-reinforce]",
    ),
    "e-ratio-of-now-to-the-engine": Mutation(
        "RL2/workers/actor.py",
        'each(tokens["old_logps"]), each(tokens["llm_logps"])',
        'each(tokens["logps"]), each(tokens["llm_logps"])',
        f"{UPDATE}[qwen3-packed-tis-mask-ppo]",
    ),
    # (f) one padding row or token too many
    "f-padding-row-counts": Mutation(
        LEARNER,
        "        weights = token_weights(mask, correct, self.config.avg_level, samples)\n",
        """        pad = torch.nn.functional.pad
        padded = pad(mask, (0, 0, 0, 1)), pad(correct, (0, 1)), pad(samples, (0, 1), value=-1)
        weights = token_weights(padded[0], padded[1], self.config.avg_level, padded[2])[:-1]
""",
        f"{UPDATE}[qwen3-packed-ppo-sequence-reinforce]",
    ),
    "f-filler-counts": Mutation(
        COMM,
        "            target.index_fill_(0, filler, 0)\n",
        "            target.index_fill_(0, filler, 1 if values.dtype == torch.bool else 0)\n",
        f"{UPDATE}[qwen3-sp2-entropy]",
    ),
    "f-filler-stripped-at-the-end": Mutation(
        COMM,
        "    out.index_copy_(0, plan.index(n_tokens), flat)\n",
        "    index = plan.index(n_tokens)\n"
        "    valid = index < n_rows * n_tokens\n"
        "    out[index[valid]] = flat[: int(valid.sum())]\n",
        f"{LOGPS}[qwen3-sp2]",
    ),
    "f-filler-belongs-to-the-first-row": Mutation(
        COMM,
        "torch.cat([lengths[p], fillers[p][fillers[p] > 0]])",
        "torch.cat([fillers[p][fillers[p] > 0], lengths[p]])",
        f"{LOGPS}[qwen3-sp2]",
    ),
    "f-one-slice-too-far": Mutation(
        COMM,
        "sp * sizes[p])",
        "sp * (sizes[p] + 1))",
        f"{UPDATE}[qwen3-sp2-ppo-token-reinforce]",
    ),
}

# (g) what belongs together is cut, or not brought together
SEGMENTS, PACKS = "RL2/algorithms/segments.py", "RL2/workers/packs.py"
SLICES = "RL2/distributed/sequence_parallel.py"
MUTATIONS |= {
    "g-sums-of-one-slice": Mutation(
        PACKS,
        "        table = of_all_slices(torch.cat(columns, -1), self.sizes, self.group)\n",
        "        from RL2.distributed import sequence_parallel as sp\n"
        "        own, which = torch.cat(columns, -1), sp.dist.get_rank(self.group)\n"
        "        table = own.new_zeros(sum(self.sizes), own.shape[1])\n"
        "        start = sum(self.sizes[:which])\n"
        "        table[start : start + len(own)] = own\n",
        f"{UPDATE}[qwen3-sp2-gspo-sequence]",
    ),
    "g-sums-without-the-gradient-of-others": Mutation(
        SLICES,
        "return len(ctx.sizes) * gradient.split",
        "return gradient.split",
        f"{UPDATE}[qwen3-sp2-gspo-sequence]",
    ),
    "g-sequences-counted-by-each-slice": Mutation(
        LEARNER,
        "loss = weighted_sum(losses, weights) / len(pack.sizes)",
        "loss = weighted_sum(losses, weights)",
        f"{UPDATE}[qwen3-sp2-dpo-token]",
    ),
    "g-pair-cut-by-a-pack": Mutation(
        PACKS,
        "kept_together(batch, names)",
        'kept_together(batch, ("sequences",))',
        f"{UPDATE}[qwen3-small-dpo-token]",
    ),
    "g-group-cut-by-a-rank": Mutation(
        PACKS,
        "kept_together(batch, names)",
        'kept_together(batch, ("sequences",))',
        f"{UPDATE}[qwen3-fsdp2-best_of_group-sequence]",
    ),
    "g-sample-cut-by-a-rank": Mutation(
        PACKS, "row_fields, units,", "row_fields, None,", f"{UPDATE}[qwen3-fsdp4-gspo-sequence]"
    ),
    "g-pair-cut-by-an-update": Mutation(
        LEARNER,
        "split_batch(batch, n_parts, self.segments, order)",
        "split_batch(batch, n_parts)",
        f"{UPDATE}[qwen3-packed-three_updates-dpo]",
    ),
    "g-mean-divided-by-padding": Mutation(
        SEGMENTS,
        "return self.sum(x) / self.sizes",
        "return self.sum(x) / self.sizes.max().clamp(min=1)",
        f"{UPDATE}[qwen3-packed-gspo-sequence]",
    ),
    "g-mean-of-rows": Mutation(
        SEGMENTS,
        'samples, of_row = rows["sample_ids"].unique(return_inverse=True)',
        'samples = of_row = torch.arange(len(rows["sample_ids"]))',
        f"{UPDATE}[qwen3-packed-gspo-sequence]",
    ),
    "g-teachers-tokens-of-a-shard": Mutation(
        SWEEP,
        "head.shard.all_gather(top_index).transpose(0, 1)",
        "top_index.repeat(2, 1, 1).transpose(0, 1)",
        f"{LOGPS}[qwen3-tp2]",
    ),
    "g-metric-by-tokens": Mutation(
        PACKS,
        'count(batch, "tokens") / count(batch, kind)',
        "1.0",
        f"{UPDATE}[qwen3-packed-gspo-sequence]",
    ),
}
