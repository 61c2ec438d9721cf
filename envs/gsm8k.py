"""Grade-school maths: the reward is 1.0 if the answer after the last `####` is the gold one.

This file stands alone: copy it to begin an environment of your own. The library calls `step` with
the text of the conversation so far (`state`), what the policy wrote (`action`, without the token
that ended it), and the `extra_info` of the data set row, here {"answer": gold answer}.

Nothing that the policy wrote is evaluated, and every function is linear in the length of the text.
"""

from __future__ import annotations

THOUGHT_END = "</think>"
ANSWER_MARK = "####"


def extract_answer(text: str) -> str | None:
    """What follows the last `####` on its line, after the last `</think>`; None if nothing does."""
    conclusion = text.rpartition(THOUGHT_END)[2]
    _, mark, rest = conclusion.rpartition(ANSWER_MARK)
    answer = rest.partition("\n")[0].strip()
    return answer if mark and answer else None


def normalize_number(text: str) -> str | None:
    """Canonical form of a number, None if the text is not one number.

    Taken off: spaces, `**`, `$`, `%`, a final period, `+`, leading zeros, zeros that end the
    decimals. Commas and spaces may part the digits before the decimal point into groups, the last
    of three: `1,000` and `1 000` are a thousand, `1,5` and `3, 4` are not numbers.
    """
    # The emphasis may stand inside or outside of the period: **5.** and **5**.
    text = text.strip(" \t\r*").removesuffix(".").strip(" \t\r*")
    text = text.removesuffix("%").removesuffix("$").rstrip()
    sign, text = _take_sign(text)
    if text.startswith("$"):
        text = text[1:].lstrip()
        if not sign:
            sign, text = _take_sign(text)
    whole, _, decimals = text.partition(".")
    whole = _join_groups(whole)
    if whole is None or not (whole or decimals) or not _is_digits(decimals):
        return None
    whole = whole.lstrip("0") or "0"
    decimals = decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if sign == "-" and number != "0" else number


def _take_sign(text: str) -> tuple[str, str]:
    """The leading sign (`-`, `+` or none) and the text behind it."""
    if text[:1] in ("-", "\N{MINUS SIGN}"):
        return "-", text[1:].lstrip()
    if text[:1] == "+":
        return "+", text[1:].lstrip()
    return "", text


def _is_digits(text: str) -> bool:
    # isdigit() alone takes superscripts and the digits of all scripts.
    return not text or (text.isascii() and text.isdigit())


def _join_groups(text: str) -> str | None:
    """Digits without separators of thousands (`1,234,567`, Indian `12,34,567`), or None."""
    first, *others = text.split(",") if "," in text else text.split() or [""]
    groups_fit = not others or (
        1 <= len(first) <= 3
        and all(2 <= len(group) <= 3 for group in others)
        and len(others[-1]) == 3
    )
    digits = first + "".join(others)
    return digits if groups_fit and _is_digits(digits) else None


def is_correct(answer: str, gold: str) -> bool:
    """Whether the two are the same number, or the same text where either is not a number."""
    number, gold_number = normalize_number(answer), normalize_number(gold)
    if number is None or gold_number is None:
        return answer.strip() == gold.strip()
    return number == gold_number


async def step(state: str, action: str, extra_info: dict, *, finish_reason: str = "stop") -> dict:
    """Grade one response. One that was cut off has not come to its answer: what stands behind
    `####` may be a thought, or the beginning of a number.

    Raises:
        ValueError: extra_info holds no gold answer. Only the data set can be at fault, so this is
            an error of the sample and not a reward of zero.
    """
    gold = extra_info.get("answer")
    if gold is None or not str(gold).strip():
        raise ValueError(f"extra_info without a gold answer: it has the keys {sorted(extra_info)}")
    answer = None if finish_reason == "length" else extract_answer(action)
    score = float(answer is not None and is_correct(answer, str(gold)))
    return {
        "next_state": state + action,
        "reward": score,
        "score": score,
        "done": True,
        "extra_info": extra_info,
    }
