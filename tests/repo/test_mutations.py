"""The list of mistakes in tests/mutations fits the code and the tests that there are."""

import re
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation, mutated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.wrong)
def test_a_mutation_can_be_made_and_names_a_test(mutation: Mutation) -> None:
    plain = (ROOT / "dist_defend" / mutation.file).read_text(encoding="utf-8")
    compile(mutated(plain, mutation), mutation.file, "exec")
    file, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_no_mutation_is_there_twice() -> None:
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)
    assert all(re.fullmatch(r"[\w/]+\.py", m.file) for m in MUTATIONS)
