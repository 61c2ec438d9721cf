import asyncio
import json
import re
import time
from pathlib import Path

import pytest

from envs.gsm8k import extract_answer, is_correct, normalize_number, step

TABLE = Path(__file__).parents[2] / "docs" / "gsm8k.md"
REAL = Path(__file__).parents[3] / "shared/data/gsm8k"


def reward(action: str, gold: object) -> float:
    result = asyncio.run(step("Q: ", action, {"answer": gold}))
    assert result["reward"] == result["score"]
    return result["reward"]


def test_step_result():
    extra_info = {"answer": "72", "id": 3}
    result = asyncio.run(step("How many?\n", "48 + 24\n#### 72", extra_info))
    assert result == {
        "next_state": "How many?\n48 + 24\n#### 72",
        "reward": 1.0,
        "score": 1.0,
        "done": True,
        "extra_info": extra_info,
    }
    assert type(result["reward"]) is float


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 5", "5"),
        ("#### 4\nno, wait\n#### 5", "5"),
        ("#### 5\nmore text 6", "5"),
        ("####5", "5"),
        ("##### 5", "5"),
        ("#### 5\r\nmore", "5"),
        ("<think>#### 4</think>#### 5", "5"),
        ("a</think>#### 4</think>\n#### 5", "5"),
        ("<think>it is #### 5", "5"),  # cut off, or no thinking model: the whole text
        ("<think>#### 5</think> it is five", None),
        ("5", None),
        ("", None),
        ("####", None),
        ("####\n5", None),
        ("#### 5 ####", None),
        ("### 5", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5", "5"),
        ("+5", "5"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("005", "5"),
        ("5.", "5"),
        ("5.0", "5"),
        ("5 .", "5"),
        ("5.00.", "5"),
        (".5", "0.5"),
        ("1.50", "1.5"),
        ("1,000", "1000"),
        ("1 000", "1000"),
        ("1\u202f000", "1000"),
        ("1,234,567.50", "1234567.5"),
        ("1,00,000", "100000"),
        ("$5", "5"),
        ("$ 5", "5"),
        ("5$", "5"),
        ("$1,000.00", "1000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("- 5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("50%", "50"),
        ("50 %.", "50"),
        ("**5**", "5"),
        ("**$5.**", "5"),
        ("**5**.", "5"),
        ("5**", "5"),  # of "**#### 5**"
        ("7" * 5000, "7" * 5000 + ".0"),  # beyond the digits that int() takes
        ("Rs.5", "5"),
        ("no-one but 5", "5"),
        ("5-year-old", "5"),
        ("Answer: -5", "-5"),
        ("(-5)", "-5"),
        ("5<|im_end|>", "5"),
        ("a = b = 2 * 2.5 = 5 km", "5"),
        ("\\boxed{\\text{about } 5\\%}", "5"),
        ("-1/8", "-.125"),
        ("2/6", "1/3"),
        ("1,000/20", "50"),
        ("\\frac{-1}{2}", "-0.5"),
        ("\\frac12", "0.5"),
        ("-\\dfrac 34", "-0.75"),
        ("18{,}000", "18000"),
        ("$1{,}234{,}567$", "1234567"),
        ("\\underline{\\textit{5}}", "5"),
        ("5\\,\\text{cm}^{2}", "5"),
        ("5^{\\circ}C", "5"),
        ("seven", " seven "),
        ("1/2", "1/2"),
    ],
)
def test_equal(answer, gold):
    assert is_correct(answer, gold) and is_correct(gold, answer)
    assert reward(f"so\n#### {answer}", gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5", "15"),
        ("15", "5"),
        ("5", "50"),
        ("-5", "5"),
        ("5.1", "5"),
        ("5 or 6", "5"),
        ("5 apples and 1", "5"),
        ("5 thousand", "5"),
        ("5 and a half", "5"),
        ("5\N{VULGAR FRACTION ONE HALF}", "5"),
        ("5\N{CJK UNIFIED IDEOGRAPH-5341}", "5"),  # fifty
        ("5k", "5"),
        ("no more than 5", "5"),
        ("5 - x", "5"),
        ("5-", "5"),
        ("Answer - 5", "-5"),
        ("x-5", "-5"),
        ("5^2", "5"),
        ("\\sqrt{5}", "5"),
        ("5/0", "5"),
        ("5/1/1", "5"),
        ("1 5/5", "11"),
        ("5\\frac{1}{2}", "25.5"),
        ("5\\frac12", "25.5"),
        ("\\frac123", "1/23"),
        ("1{,}5", "15"),
        ("5\\frac{-1}{2}", "5"),
        ("\\boxed{5}^2", "5"),
        ("\\textstyle 5", "5"),
        ("5 <b> 0", "50"),
        ("5<b>.0", "5"),
        ("x >= 5", "5"),
        ("x \\neq 5", "5"),
        ("...5", "5"),
        ("..5", "0.5"),
        ("7 2", "72"),
        ("3, 4", "34"),
        ("3,4", "34"),
        ("1,5", "15"),
        (",500", "500"),
        ("5,", "5,0"),
        ("1.2.3", "1.23"),
        ("--5", "5"),
        ("+-5", "-5"),
        ("-$-5", "5"),
        (".", "0"),
        ("-", "0"),
        ("$", "0"),
        ("**", "0"),
        ("\N{SUPERSCRIPT TWO}", "2"),
        ("\N{FULLWIDTH DIGIT FIVE}", "5"),
        ("1e3", "1000"),
        ("nan", "inf"),
        ("2+3", "5"),
        ("__import__('os')", "5"),
        ("Seven", "seven"),
    ],
)
def test_different(answer, gold):
    assert not is_correct(answer, gold) and not is_correct(gold, answer)
    assert reward(f"#### {answer}", gold) == 0.0


def rows_of_the_table():
    text = TABLE.read_text(encoding="utf-8")
    found = re.findall(
        r"^\| (`.*`) \| `(.*)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE
    )
    return [(answer.strip("`").strip(), *others) for answer, *others in found]


ROWS = rows_of_the_table()


@pytest.mark.parametrize(("answer", "gold", "ours", "strict", "flexible", "math_verify"), ROWS)
def test_the_table_of_the_docs(answer, gold, ours, strict, flexible, math_verify):
    assert is_correct(answer, gold) == is_correct(gold, answer) == (ours == "yes")
    assert reward(f"#### {answer}", gold) == (ours == "yes")
    # What lm-evaluation-harness extracts and leaves out before it compares.
    text = f"#### {answer}"
    first = re.findall(r"#### (-?[0-9.,]+)", text)[:1]
    last = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)[-1:]
    for which, matches in ((strict, first), (flexible, last)):
        same = [re.sub(r"[,$]|\.$", "", match) for match in matches] == [gold]
        assert which == ("yes" if same else "no"), matches


def test_nothing_is_right_that_no_grader_accepts():
    lonely = [answer for answer, _, ours, *others in ROWS if ours == "yes" and "yes" not in others]
    assert lonely == ["\N{MINUS SIGN}18"]


def test_the_table_of_the_docs_is_found():
    assert len(ROWS) > 70 and {row[2] for row in ROWS} == {"yes", "no"}


def test_no_answer_is_wrong_whatever_the_gold_answer_is():
    assert reward("", "none") == reward("####", "none") == reward("5", "5") == 0.0


@pytest.mark.parametrize("gold", [5, 5.0, " 5 "])
def test_gold_answer_may_be_a_number(gold):
    assert reward("#### 5", gold) == 1.0


@pytest.mark.parametrize("extra_info", [{}, {"answer": None}, {"answer": " "}])
def test_missing_gold_answer_is_an_error_and_no_zero(extra_info):
    with pytest.raises(ValueError, match="without a gold answer"):
        asyncio.run(step("", "#### 5", extra_info))


@pytest.mark.parametrize(
    "text",
    [
        "#" * 4_000_000,
        "#### " * 800_000,
        "</think>" * 500_000,
        "#### " + "9" * 4_000_000,
        "#### " + "1," * 2_000_000,
        "#### " + "111," * 1_000_000 + "x",
        "#### " + "-" * 4_000_000,
        "#### " + "$ " * 2_000_000,
        "#### " + "*" * 4_000_000,
        "#### " + " " * 4_000_000 + "5 5",
        "#### " + "0." * 2_000_000,
    ],
    ids=lambda text: text[:8] + text[-4:],
)
def test_megabytes_take_linear_time(text):
    start = time.perf_counter()
    assert reward(text, "5") == 0.0
    assert time.perf_counter() - start < 2.0  # measured: below 0.5 s; quadratic would be hours


def test_normal_form_is_a_fixed_point():
    for text in ("-1,000.50", "$3", "0.0", "12.", "+.5"):
        number = normalize_number(text)
        assert number is not None and normalize_number(number) == number


@pytest.mark.parametrize(
    "action", ["#### 42", "#### 42\nBut wait,", "<think>#### 42", "</think>#### 4"]
)
def test_what_was_cut_off_has_no_answer(action):
    for gold in ("42", "4"):
        cut = asyncio.run(step("", action, {"answer": gold}, finish_reason="length"))
        assert (cut["reward"], cut["score"], cut["done"]) == (0.0, 0.0, True)
        whole = asyncio.run(step("", action, {"answer": gold}, finish_reason="stop"))
        assert whole == asyncio.run(step("", action, {"answer": gold}))
    assert asyncio.run(step("", "#### 42", {"answer": "42"}, finish_reason="stop"))["score"] == 1.0


@pytest.mark.skipif(not REAL.is_dir(), reason="the GSM8K files do not lie beside the checkout")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_gold_answer_grades_itself(split):
    lines = (REAL / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == {"train": 7473, "test": 1319}[split]

    async def grade() -> None:
        for line in lines:
            solution = json.loads(line)["answer"]
            gold = solution.rpartition("####")[2].strip()
            number = int(gold.replace(",", ""))
            for action, expected in [
                (solution, 1.0),
                (f"#### {number}", 1.0),
                (f"#### {number + 1}", 0.0),
                (f"#### {number + 1:,}", 0.0),
                (f"#### 1{gold}", 0.0),
            ]:
                result = await step("", action, {"answer": gold})
                assert result["reward"] == expected, (line, action)

    asyncio.run(grade())
