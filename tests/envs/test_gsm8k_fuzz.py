"""Whatever a policy writes, the reward's parser answers, means what it says, and is quick."""

import gc
import random
import re
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from envs.gsm8k import ANSWER_MARK, THOUGHT_END, extract_answer, is_correct, normalize_number, step
from tests.faults.support import points

MOST_SECONDS = 0.05  # of a processor, in one call
PER_CHUNK = 10_000  # inputs; 100 chunks with RL2_FAULTS=long
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9]|/[1-9][0-9]*)?")
MINUS = "-\N{MINUS SIGN}"

PIECES = [
    ANSWER_MARK, THOUGHT_END, "<think>", "#", "##", "</", "think>", "\n", "\r\n", "\r", " ", "\t",
    "\x00", "\x1c", "\x85", "\u00a0", "\u2028", "\u202f", "\ufeff", "\ud800", "\udfff", "\ud83d",
    "**", "*", "$", "%", "€", "£", ".", ",", "+", "-", "\N{MINUS SIGN}", "\N{EN DASH}", "0", "7",
    "00", "1,000", "12,34,567", "1 000", ".5", "5.", "-0", "1e9", "nan", "inf", "0x1F", "1_000",
    "\N{ARABIC-INDIC DIGIT FIVE}", "\N{DEVANAGARI DIGIT SEVEN}", "\N{FULLWIDTH DIGIT NINE}",
    "\N{SUPERSCRIPT TWO}", "\N{VULGAR FRACTION ONE HALF}", "\N{MATHEMATICAL BOLD DIGIT ONE}",
    "\N{ROMAN NUMERAL FIVE}", "e\N{COMBINING ACUTE ACCENT}", "\N{RIGHT-TO-LEFT OVERRIDE}", "İ", "ß",
    "\\boxed{5}", "\\frac{1}{2}", "\\frac{-3}{2}", "^\\circ", "\\text{", "}", "{", "\\(", "\\$",
    "`", "(", ")", "[", "]",
    "x = ", "=", "≈", "!=", "/", "/h", "1/2", "10/4", "^2", "m^2", "5-6", " or ", " apples",
    "dozen", "not ", "Rs.", "-year", "<eos>", "<|end|>", "<<3+4=7>>", "__import__('os')",
    "so it is", "\N{PILE OF POO}", "x",
]  # fmt: skip


def result_of(action, gold):
    """What `step` returns; it waits for nothing."""
    try:
        step("Q: ", action, {"answer": gold}).send(None)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("step waits for something")


class Clock:
    """Calls functions; the longest call's seconds, of this thread on a processor."""

    most = 0.0

    def __call__(self, function, *arguments):
        start = time.thread_time()
        try:
            return function(*arguments)
        finally:
            seconds = time.thread_time() - start
            self.most = max(self.most, seconds)
            assert seconds <= MOST_SECONDS, f"{function.__name__} took {seconds:.3f} s"


def check_number(text, clock):
    number = clock(normalize_number, text)
    assert clock(is_correct, text, text) is True
    if number is None:
        return
    assert NUMBER.fullmatch(number) and number != "-0"
    assert normalize_number(number) == number
    assert clock(is_correct, text, number) and clock(is_correct, number, text)
    # The same value, read in another way: every digit of one side of the equation counts.
    text = re.sub(r"\\[A-Za-z]+|(?<=[A-Za-z])\}?\^\{?[23]", "", text)  # m^2
    side = [side for side in re.split("=|≈", text) if re.search("[0-9]", side)][-1]
    found = re.search(r"\.?[0-9](?:.*[0-9])?", side, re.DOTALL)
    above, slash, below = found[0].replace("}{", "/").partition("/")
    above, below = (re.sub("[^0-9.]", "", part) for part in (above, below))
    if re.search(r"[^\W\d_]\.$", side[: found.start() + 1]):  # the period of Rs.
        above = above[1:]
    if slash:
        assert Fraction(int(above), int(below)) == abs(Fraction(number))
    else:
        assert Decimal(number).copy_abs() == Decimal(above)
    before = side[: found.start()]
    if not re.search(r"[^\W\d_]", before):  # a hyphen between letters is no sign
        assert number.startswith("-") == (number != "0" and any(sign in before for sign in MINUS))


def check(text, gold, clock):
    """All that holds for any text of a policy and any gold answer."""
    answer = clock(extract_answer, text)
    if answer is not None:
        assert answer and answer == answer.strip() and "\n" not in answer
        assert ANSWER_MARK not in answer and THOUGHT_END not in answer and answer in text
        assert extract_answer(f"#### 1\n{THOUGHT_END}#### 2\n#### {answer}\n3") == answer
        check_number(answer, clock)
        assert is_correct(answer, str(gold)) == is_correct(str(gold), answer)
    check_number(text, clock)
    if gold is None or not str(gold).strip():
        with pytest.raises(ValueError, match="without a gold answer"):
            clock(result_of, text, gold)
        return
    result = clock(result_of, text, gold)
    right = answer is not None and is_correct(answer, str(gold))
    assert result == {
        "next_state": f"Q: {text}",
        "reward": float(right),
        "score": float(right),
        "done": True,
        "extra_info": {"answer": gold},
    }
    assert type(result["reward"]) is type(result["score"]) is float


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collections():
    """One that looks through all of torch would be most of a call's time."""
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------ hypothesis

pieces = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
anything = st.text(st.characters(codec=None), max_size=60)  # surrogates and NUL as well
numbers = st.from_regex(
    r"[-+]?\$?[ *]?([0-9]{1,4}[, ]?){0,4}\.?[0-9]{0,3}[%$.* ]{0,3}", fullmatch=True
)
golds = st.none() | st.integers(-(10**9), 10**9) | st.floats() | numbers | anything


@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@example(thought="", text="#### 5", gold="5")
@example(thought=f"#### 5{THOUGHT_END}", text="5", gold=5.0)
@given(thought=anything | pieces, text=anything | pieces | numbers, gold=golds)
def test_any_text(thought, text, gold):
    clock = Clock()
    check(f"{thought}#### {text}", gold, clock)
    check(text + thought, gold, clock)


@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@given(text=numbers | pieces)
def test_any_number(text):
    check_number(text, Clock())


# ------------------------------------------------------------------------ seeds


def plausible(rng):
    """Something that a policy might have written, and its gold answer."""
    value = rng.choice((rng.randrange(20), rng.randrange(-(10**6), 10**12)))
    gold = rng.choice((str, "{:,}".format, "${:,}".format, "{:.2f}".format, "{}.".format))(value)
    answer = rng.choice((
        gold, str(value), f"**{gold}**", f"{value}%", f" {value} apples", f"({gold}).",
        f"\\boxed{{{gold}}}", f"x = {gold}", f"-${value}", f"{value}/40", f"{gold} km/h",
        f"\\frac{{{value}}}{{8}}", f"{value} or {value}",
    ))  # fmt: skip
    parts = [rng.choice(("", "<think>", "so\n")), rng.choice(("", f"it is {gold}", "#### 3\n"))]
    parts += [rng.choice(("", THOUGHT_END, f"{THOUGHT_END}\n")), "#### ", answer]
    return rng.choice(("".join(parts), answer)), gold


def mutated(rng, text):
    """A text with a piece put in, taken out, copied or repeated."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.randrange(6))
    how = rng.randrange(5)
    if how == 0:
        return text[:start] + rng.choice(PIECES) + text[start:]
    if how == 1:
        return text[:start] + text[end:]
    if how == 2:
        return text[:start] + rng.choice(PIECES) + text[end:]
    if how == 3:
        return text[:end] + text[start:]
    return text[:start] + chr(rng.randrange(0x110000)) + text[end:]


def hostile(rng, n=100_000):
    """n characters: one that repeats, or one that repeats what was plausible."""
    unit = plausible(rng)[0] if rng.randrange(2) else ""
    for _ in range(rng.randrange(1, 4)):
        unit = mutated(rng, unit)
    long = ((unit or "1,") * (n // max(1, len(unit)) + n % 2 + 1))[:n]
    return (
        rng.choice(("", "#### ", "#### $", "</think>#### -")) + long + rng.choice(("", "5", "\n"))
    )


@pytest.mark.parametrize("beginning", ["", "#### ", "#### -$", "</think>#### 1", "#### 0."])
def test_any_piece_may_repeat(beginning):
    clock = Clock()
    for piece in PIECES:
        check(beginning + (piece * 100_000)[:100_000], "5", clock)
        check(beginning + (piece * 100_000)[:100_000] + "5", piece, clock)


def texts(chunk):
    """(text, gold) of a chunk; one text in 1,000 has 100,000 characters."""
    for i in range(PER_CHUNK):
        rng = random.Random(chunk * PER_CHUNK + i)
        text, gold = plausible(rng)
        for _ in range(rng.randrange(5)):
            text = mutated(rng, text)
        yield (hostile(rng) if i % 1000 == 0 else text), mutated(rng, gold) if i % 5 == 0 else gold


@pytest.mark.parametrize("chunk", points(1, 100))
def test_a_million_answers(chunk):
    clock = Clock()
    for text, gold in texts(chunk):
        try:
            check(text, gold, clock)
        except BaseException as error:
            raise AssertionError(f"text={text[:200]!r} ({len(text)}) gold={gold!r}") from error
