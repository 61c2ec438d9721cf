"""Time of a head under a loss over sequences, against one over tokens.

Both are what an update does with the hidden states `[T, H]` of a micro-batch and the head's weight
`[V, H]`, to the gradients of both:

- tokens: `ppo` by `linear_token_loss`, which forms the gradients in the forward pass;
- gspo: `linear_token_stats`, sequences, GSPO's loss, and the recomputing backward pass;
- dpo: the same with pairs of sequences and DPO's loss.

    python benchmarks/sequence_losses.py --shapes 1024,576,49152 --rounds 7

They are timed in turns (A B C A B C …) after a round that warms up; a ratio is the median over the
rounds of one's time over that of `tokens` in the same round, in wall time and in CPU time: on a
machine that others use as well, the second one tells more.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from RL2.algorithms.losses import ppo
from RL2.algorithms.segments import segments_of
from RL2.ops.token_stats import linear_token_loss, linear_token_stats

WANTED = ("logps", "entropy", "max_logps")  # what an update asks for in any case
N_SEQUENCES = 16


class Head:
    """Inputs of a call; `tokens`, `gspo` and `dpo` are the calls."""

    def __init__(self, n_tokens: int, size: int, n_columns: int, device: str):
        torch.manual_seed(0)
        self.hidden = torch.randn(n_tokens, size, device=device).requires_grad_()
        weight = torch.randn(n_columns, size, device=device) * 2.5 / size**0.5
        self.weight = weight.requires_grad_()
        self.actions = torch.randint(n_columns, (n_tokens,), device=device)
        self.row = torch.arange(n_tokens) * N_SEQUENCES // n_tokens
        ids = torch.arange(N_SEQUENCES)
        self.rows = {"sample_ids": ids, "pair_ids": ids // 2, "chosen": ids % 2}
        with torch.no_grad():  # near, so that nothing is clipped: every token owes a gradient
            self.old_logps = self._logps() + 0.05 * torch.randn(n_tokens, device=device)
        self.advantages = torch.randn(N_SEQUENCES, device=device)[self.row]

    def tokens(self) -> Tensor:
        def loss_fn(stats, rows):
            losses, _ = ppo(stats.logps, self.old_logps[rows], self.advantages[rows])
            return losses.sum() / len(self.actions), {"entropy": stats.entropy.sum()}

        return linear_token_loss(self.hidden, self.weight, self.actions, 1.0, WANTED, loss_fn)[0]

    def gspo(self) -> Tensor:
        logps, segments = self._logps(), self._segments()
        sequences = segments["sequences"]
        ratio = sequences.mean(logps - self.old_logps).exp()
        a = sequences.mean(self.advantages)
        return -torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2)).mean()

    def dpo(self) -> Tensor:
        logps, segments = self._logps(), self._segments()
        sums = segments["sequences"].sum(logps - self.old_logps)
        return -F.logsigmoid(0.1 * segments["pairs"].difference(sums)).mean()

    def _logps(self) -> Tensor:
        return linear_token_stats(self.hidden, self.weight, self.actions, 1.0, WANTED).logps

    def _segments(self) -> dict:
        return segments_of(self.row, self.rows, ("sequences", "pairs"), self.hidden.device)


def timed(head: Head, call: Callable[[], Tensor]) -> tuple[float, float]:
    """Wall and CPU seconds to the gradients."""
    head.hidden.grad = head.weight.grad = None
    if head.hidden.is_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call().backward()
    if head.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024,576,49152"], help="T,H,V each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        head = Head(*map(int, shape.split(",")), args.device)
        calls = {"tokens": head.tokens, "gspo": head.gspo, "dpo": head.dpo}
        seconds = {name: [] for name in calls}
        for number in range(args.rounds + 1):
            for name, call in calls.items():
                one = timed(head, call)
                if number:
                    seconds[name].append(one)
        result = {"T,H,V": shape, "threads": args.threads, "rounds": args.rounds}
        for which, kind in enumerate(("wall", "cpu")):
            for name, them in seconds.items():
                times = [one[which] for one in them]
                base = [one[which] for one in seconds["tokens"]]
                ratios = [a / b for a, b in zip(times, base, strict=True)]
                result[f"{name}_{kind}_s"] = round(statistics.median(times), 3)
                result[f"{name}_{kind}_ratio"] = round(statistics.median(ratios), 3)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
