"""All mutations by name."""

from tests.invariance.mutations import advantages, data, losses, spreads, workers
from tests.invariance.mutations.mutation import Mutation

TABLES = (spreads, losses, advantages, workers, data)
MUTATIONS: dict[str, Mutation] = {
    name: one for table in TABLES for name, one in table.MUTATIONS.items()
}
