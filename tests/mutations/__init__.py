"""Mistakes that a test must notice: each is made in a copy of the tree, where the named test then has to fail."""

from tests.mutations.engine import IN_ENGINE
from tests.mutations.fused import IN_FUSED
from tests.mutations.methods import IN_METHODS
from tests.mutations.mutation import Mutation, mutated
from tests.mutations.program import IN_PROGRAM

MUTATIONS = (*IN_METHODS, *IN_ENGINE, *IN_PROGRAM, *IN_FUSED)

__all__ = ["MUTATIONS", "Mutation", "mutated"]
