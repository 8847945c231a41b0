"""What one file alone, or a few, may do: open a stream of random numbers, reach into torch's optimizers."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dist_defend"
FILES = sorted(PACKAGE.rglob("*.py"))
# Their seeds are no run's: numbers of published pictures, part of a trigger's or data set's own definition; and the
# orders of a measurement whose rows are in docs/results/ibau_distribution.csv.
PICTURES = {"attacks/drawn.py", "attacks/warp.py", "bench/ibau_outcomes.py"}


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


# What holds or derives from torch's optimizers: theirs, the update's, and the strategies'.
INSIDE = {f"engine/{name}.py" for name in ("optim", "update", "strategy", "fsdp2", "zero")}
OWN = {"param_groups", "found_inf", "grad_scale", "capturable", "momentum_buffer", "exp_avg", "exp_avg_sq",
       "_warned_capturable_if_run_uncaptured"}  # fmt: skip


def reaches_inside(node: ast.AST) -> bool:
    """A name of an optimizer's own, as attribute, key or argument; or its state, by parameter."""
    if isinstance(node, ast.Attribute):
        is_state = node.attr == "state" and ast.unparse(node.value).endswith(("optimizer", "optim"))
        return node.attr in OWN or is_state
    named = {ast.keyword: "arg", ast.Constant: "value"}.get(type(node))
    return named is not None and getattr(node, named) in OWN


def test_optimizers_have_one_writer() -> None:
    found = {relative(file) for file in FILES if any(map(reaches_inside, nodes(file)))}
    assert "engine/update.py" in found
    assert found <= INSIDE, "rates, state and skipped updates are engine/update.py's"
