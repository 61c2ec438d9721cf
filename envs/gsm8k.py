"""Grade-school maths: the reward is 1.0 if the answer after the last `####` is the gold one.

This file is self-contained: copy it to start an environment of your own. The library calls `step`
with the text of the conversation so far (`state`), what the policy wrote (`action`, without the
token that ended it), and the `extra_info` of the data set row, here {"answer": gold answer}.

Nothing that the policy wrote is executed, and every function is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, localcontext
from fractions import Fraction

THOUGHT_END = "</think>"
ANSWER_MARK = "####"

_LONGEST = 1000  # characters before or after a number
# Formatting, and what it is replaced with.
_PLAIN = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"</?[A-Za-z_]+>|<\|[A-Za-z_]+\|>", ";"),  # <answer>, <|im_end|>
        (r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", r" \1/\2"),
        (r"\\[dt]?frac ?([0-9])([0-9])(?![0-9])", r" \1/\2"),
        (r"(?<=[0-9])\{,\}(?=[0-9])", ","),  # a comma without a space after it
        (r"\\(?:[fm]box|boxed|emph|underline|left|right)(?![A-Za-z])", ""),
        (r"\\(?:text|math)(?:bf|it|rm)?(?![A-Za-z])", ""),
        (r"\^\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\([$%])", r"\1"),
        (r"\\[()\[\],;:! ]|\\\\|~", " "),
        (r"≈|\\approx(?![A-Za-z])", "="),
        (r"(?<=[A-Za-z])(\}?)(?:\^[23]|\^\{[23]\}|[²³])", r"\1"),  # m^2
        (r"(?<=[A-Za-z0-9])-(?=[A-Za-z])", " "),  # 18-year-old
        (r"/(?= ?[A-Za-z])", " "),  # km/h
    )
]
# Words that change the value of the number next to them.
_CHANGES_VALUE = frozenset(
    "not minus negative plus and or than least most half twice double point k hundred thousand "
    "million billion trillion lakh crore dozen hundreds thousands millions billions dozens".split()
)
_WRAPPING = " \t*_`\"'([{"


def extract_answer(text: str) -> str | None:
    """The text after the last `####` on its line, after the last `</think>`; None if empty."""
    conclusion = text.rpartition(THOUGHT_END)[2]
    _, mark, rest = conclusion.rpartition(ANSWER_MARK)
    answer = rest.partition("\n")[0].strip()
    return answer if mark and answer else None


def normalize_number(text: str) -> str | None:
    """Canonical form of the one number in a text, None if there is not exactly one.

    All digits of the text must belong to that number, so that "5" is never read as "15", nor "5 or
    6" as either. Words, currencies, units, Markdown and LaTeX around it do not matter, unless they
    change the value (`_CHANGES_VALUE`). In an equation the last side with digits counts.
    docs/gsm8k.md has a table of examples.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if len(text) <= _LONGEST:
        for pattern, plain in _PLAIN:
            text = pattern.sub(plain, text)
        if re.search("[!<>]=", text):
            return None
        text = next((side for side in reversed(text.split("=")) if re.search("[0-9]", side)), "")
    first = min((text.find(d) for d in "0123456789" if d in text), default=0)
    last = max(text.rfind(d) for d in "0123456789")
    if text[:first].endswith(".") and not text[: first - 1][-1:].isalpha():  # .5, but not Rs.5
        first -= 1
    if max(first, len(text) - last) > _LONGEST:
        return None
    number = _canonical(text[first : last + 1])
    sign, before = _take_sign(text[:first])
    if number is None or sign is None or not (_is_plain(before) and _is_plain(text[last + 1 :])):
        return None
    if before.endswith(",") or (before.endswith(".") and not before[:-1][-1:].isalpha()):
        return None
    return f"-{number}" if sign == "-" and number != "0" else number


def _canonical(text: str) -> str | None:
    """A number without sign, separators and redundant zeros; a fraction is written as a decimal if
    it has one, else reduced."""
    fraction = re.fullmatch(r"([0-9,]{1,20}) ?/ ?([0-9,]{1,20})", text)
    if fraction:
        above, below = map(_join_groups, fraction.groups())
        if not (above and below and int(below)):
            return None
        value = Fraction(int(above), int(below))
        if 10**99 % value.denominator:
            return str(value)
        with localcontext(prec=200):
            text = f"{Decimal(value.numerator) / value.denominator:f}"
    whole, _, decimals = text.partition(".")
    whole = _join_groups(whole)
    if whole is None or not (whole or decimals) or not _is_digits(decimals):
        return None
    whole = whole.lstrip("0") or "0"
    decimals = decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole


def _take_sign(before: str) -> tuple[str | None, str]:
    """The sign (`-`, `+`, none, or None if it may be a dash) and the text before it."""
    rest = before.rstrip(_WRAPPING)
    while rest and unicodedata.category(rest[-1]) == "Sc":  # a currency
        rest = rest[:-1].rstrip(_WRAPPING)
    if not rest.endswith(("-", "+")):
        return "", before
    words = rest[:-1].strip(_WRAPPING)
    is_dash = words and (before[len(rest) :][:1].isspace() or rest[-2].isalnum())
    return (None if is_dash else rest[-1]), rest[:-1]


def _is_plain(text: str) -> bool:
    """Whether the text next to a number keeps its value: no operator, no other number."""
    says_more = any(
        char in "/\\^‰‱"
        or char.isnumeric()
        or unicodedata.category(char) in ("Sm", "Pd", "Cs", "Co", "Cn")
        for char in text
    )
    return not says_more and _CHANGES_VALUE.isdisjoint(re.findall(r"[^\W\d_]+", text.lower()))


def _is_digits(text: str) -> bool:
    # isdigit() alone accepts superscripts and the digits of all scripts.
    return not text or (text.isascii() and text.isdigit())


def _join_groups(text: str) -> str | None:
    """Digits without thousands separators (`1,234,567`, Indian `12,34,567`), or None."""
    first, *others = text.split(",") if "," in text else text.split() or [""]
    groups_fit = not others or (
        1 <= len(first) <= 3
        and all(2 <= len(group) <= 3 for group in others)
        and len(others[-1]) == 3
    )
    digits = first + "".join(others)
    return digits if groups_fit and _is_digits(digits) else None


def is_correct(answer: str, gold: str) -> bool:
    """Whether the two are the same number, or the same text if either is not a number."""
    number, gold_number = normalize_number(answer), normalize_number(gold)
    if number is None or gold_number is None:
        return answer.strip() == gold.strip()
    return number == gold_number


async def step(state: str, action: str, extra_info: dict, *, finish_reason: str = "stop") -> dict:
    """Grade one response. One that was cut off has no answer: the text after `####` may be a
    thought, or the beginning of a number.

    Raises:
        ValueError: extra_info has no gold answer. The data set is at fault, so this is an error of
            the sample and not a reward of zero.
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
