"""What one file alone may do: open a stream of random numbers."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dist_defend"
FILES = sorted(PACKAGE.rglob("*.py"))
# Their seeds are no run's: numbers of published pictures, part of a trigger's or data set's own definition.
PICTURES = {"attacks/drawn.py", "attacks/warp.py"}


def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def opens_a_stream(node: ast.AST) -> bool:
    """default_rng or SeedSequence of several numbers, of which one can only keep this draw apart from others."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(("default_rng", "SeedSequence")):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return any(isinstance(value, ast.List | ast.Tuple) for value in given)


def test_streams_have_one_file() -> None:
    found = {relative(file) for file in FILES if any(map(opens_a_stream, nodes(file)))}
    assert found - PICTURES == {"ops/streams.py"}, "a draw of a run gets a name in ops/streams.py"
