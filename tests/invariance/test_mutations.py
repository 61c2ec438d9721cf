"""The mutations still mean something: they apply, are Python, and name tests that exist."""

import ast

import pytest

from tests.invariance.mutations import LOGPS, MUTATIONS, ROOT, UPDATE, apply
from tests.invariance.test_invariance import items, spreads


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_applies(name):
    mutation = MUTATIONS[name]
    source = (ROOT / mutation.path).read_text()
    mutated = apply(mutation, source)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))


def test_a_text_that_is_gone_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        apply(MUTATIONS["f-filler-counts"], "")


def test_mutations_name_tests_that_exist():
    known = {f"{UPDATE}[{item.id}]" for item in items()}
    known |= {f"{LOGPS}[{model}-{spread}]" for model, spread in spreads()}
    assert {mutation.test for mutation in MUTATIONS.values()} <= known
