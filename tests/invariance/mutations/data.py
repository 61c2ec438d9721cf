"""Mistakes in data sets of pairs and labels."""

from tests.invariance.mutations.mutation import Mutation, mutations_of

PAIRS, LABELS = "tests/datasets/test_pairs.py", "tests/datasets/test_labels.py"

MUTATIONS: dict[str, Mutation] = mutations_of(
    "RL2/datasets/pairs.py",
    PAIRS,
    {
        "sides-swapped": (
            "zip(sequences[::2], sequences[1::2], strict",
            "zip(sequences[1::2], sequences[::2], strict",
        ),
        "equal-kept": ("if chosen != rejected]", "if True]"),
        "shorter-counts": ("lengths = [max(", "lengths = [min("),
        "score-at-the-first-token": (
            "[False] * len(ids) + [True]}",
            "[True] + [False] * len(ids)}",
        ),
        "score-before-the-end": (
            "[False] * len(ids) + [True]}",
            "[False] * (len(ids) - 1) + [True, False]}",
        ),
        "filler-counts": (
            'max(len(sequence["token_ids"]) for',
            'max(len(sequence["token_ids"]) + scored for',
        ),
        "others-kept": (
            "(SIDES, map(form, found[i]), strict=True)) for i in kept",
            "(SIDES, map(form, found[i]), strict=True)) for i in range(len(kept))",
        ),
        "fingerprint-of-all": ("rows.fingerprint(kept)", "rows.fingerprint(range(len(rows)))"),
    },
)
MUTATIONS |= mutations_of(
    "RL2/datasets/labels.py",
    LABELS,
    {
        "bad-is-good": ('"false": -1.0', '"false": 1.0'),
        "label-of-another-row": ("[parsed[full[i]][1]]", "[parsed[i][1]]"),
        "overlong-kept": ("            for i in kept\n", "            for i in range(len(kept))\n"),
        "answer-of-the-item-after": ("[*items[-1:], *items[:-1]]", "[*items[1:], *items[:1]]"),
        "own-answer": ("[*items[-1:], *items[:-1]]", "items"),
        "prompt-of-the-other": (
            'item["token_ids"][:n], *answer',
            'other["token_ids"][:n], *answer',
        ),
        "one-token-too-long": ("max_length - n)]", "max_length - n + 1)]"),
        "mismatched-labels": ('"labels": [0.0] * len(ids)', '"labels": [1.0] * len(ids)'),
        "text-labels": (".strip().lower()", ".strip()"),
        "fingerprint-of-all": ("rows.fingerprint(kept)", "rows.fingerprint(range(len(rows)))"),
    },
)
