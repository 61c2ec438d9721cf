"""Answers in readable form, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from RL2.rollout.samples import Sample
from RL2.runtime.secrets import readable, redact

_PROMPT_END, _BEGIN, _END = 300, 500, 300  # characters
_LINES = 12


def shown(samples: Iterable[Sample], n: int) -> list[str]:
    """At most n answers, first those to the first prompts: end of the prompt, answer, score."""
    good = [sample for sample in samples if sample.error is None and sample.turns]
    good.sort(key=lambda sample: (sample.response, sample.position))
    return [_text(sample) for sample in good[:n]]


def _text(sample: Sample) -> str:
    last = sample.turns[-1]
    turns = f" in {len(sample.turns)} turns, of which this is the last" * (len(sample.turns) > 1)
    reward = "" if sample.reward == sample.score else f", reward {sample.reward:.4g}"
    head = (
        f"answer to prompt {sample.position}: score {sample.score:.4g}{reward}, {sample.length} "
        f"tokens{turns} ({last.finish_reason})"
    )
    prompt = _block("prompt", _shortened(redact(last.state), 0, _PROMPT_END))
    return "\n".join(
        [head, *prompt, *_block("answer", _shortened(redact(last.action), _BEGIN, _END))]
    )


def _shortened(text: str, begin: int, end: int) -> str:
    left_out = len(text) - begin - end
    if left_out <= 0:
        return text
    return f"{text[:begin]} … {left_out} characters … {text[-end:]}".lstrip()


def _block(name: str, text: str) -> list[str]:
    lines = [readable(line) for line in text.split("\n")]
    if len(lines) > _LINES:
        half = _LINES // 2
        left_out = f"… {len(lines) - 2 * half} lines …"
        lines = [*lines[:half], left_out, *lines[-half:]]
    return [f"  {name if i == 0 else '':6} | {line}" for i, line in enumerate(lines)]
