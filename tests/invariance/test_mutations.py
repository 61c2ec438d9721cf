"""The mutations still mean something: they apply, are Python, and name tests that exist."""

import ast

import pytest

from tests.invariance.mutations.mutation import ROOT, apply
from tests.invariance.mutations.spreads import LOGPS, UPDATE
from tests.invariance.mutations.tables import MUTATIONS, TABLES
from tests.invariance.test_invariance import items, spreads


@pytest.mark.parametrize("path", sorted({mutation.path for mutation in MUTATIONS.values()}))
def test_mutations_apply(path):
    source = (ROOT / path).read_text()
    plain = ast.dump(ast.parse(source))
    for name, mutation in MUTATIONS.items():
        if mutation.path == path:
            assert ast.dump(ast.parse(apply(mutation, source))) != plain, name


def test_a_text_that_is_gone_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        apply(MUTATIONS["f-filler-counts"], "")


def test_mutations_have_names_of_their_own_and_tests_that_exist():
    assert len(MUTATIONS) == sum(len(table.MUTATIONS) for table in TABLES)
    known = {f"{UPDATE}[{item.id}]" for item in items()}
    known |= {f"{LOGPS}[{model}-{spread}]" for model, spread in spreads()}
    tests = {mutation.test for mutation in MUTATIONS.values()}
    assert all(test in known or (ROOT / test).is_file() for test in tests)
