"""Answers on a terminal: readable, short, harmless and without secrets."""

import pytest

from RL2.rollout.samples import Sample, Turn
from RL2.rollout.shown import shown
from RL2.runtime.secrets import readable


def sample(position, response=0, state="2+2=", action="4", score=1.0, error=None, turns=1):
    turn = Turn(state, action, 7, "stop", score, score)
    return Sample(position, response, turns=[turn] * turns, error=error)


def test_first_answers_to_the_first_prompts():
    samples = [sample(p, r, action=f"{p}{r}") for p in (2, 1, 0) for r in (1, 0)]
    samples.append(sample(0, 0, action="failed", error="no"))
    texts = shown(samples, 2)
    assert [text.partition(":")[0] for text in texts] == [
        "answer to prompt 0",
        "answer to prompt 1",
    ]
    assert texts[0] == (
        "answer to prompt 0: score 1, 7 tokens (stop)\n  prompt | 2+2=\n  answer | 00"
    )
    assert shown(samples, 0) == [] and len(shown(samples, 99)) == 6


def test_lines_stay_lines_and_what_a_terminal_obeys_does_not_reach_it():
    (text,) = shown([sample(0, action="a\nb\x1b[2J\r\u202e\tc\ud800ä猫")], 1)
    assert text.endswith("\n  answer | a\n         | b\\x1b[2J\\r\\u202e\\tc\\ud800ä猫")
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()
    assert readable("plain text") == "plain text"


def test_long_texts_are_cut():
    (text,) = shown([sample(0, state="x" * 9999 + "end", action="b" * 600 + "e" * 9400)], 1)
    assert len(text) < 1400
    assert "end\n" in text and "… 9200 characters …" in text
    (text,) = shown([sample(0, action="\n" * 600)], 1)
    assert text.count("\n") < 20 and "lines …" in text


def test_several_turns_show_the_last():
    (text,) = shown([sample(0, turns=3, score=0.5)], 1)
    assert "score 1.5, 21 tokens in 3 turns, of which this is the last (stop)" in text


@pytest.mark.parametrize("where", ["state", "action"])
@pytest.mark.parametrize("before", [0, 495, 9000])  # where the text is cut, too
def test_secrets_are_not_shown(monkeypatch, where, before):
    monkeypatch.setenv("JUDGE_API_KEY", "canary-0123456789")
    texts = {where: "x" * before + "canary-0123456789" + "y" * 9000}
    (said,) = shown([sample(0, **texts)], 1)
    assert "canary" not in said and "0123456789" not in said
