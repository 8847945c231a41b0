"""Mistakes in what is computed by fewer kernels."""

from tests.mutations.mutation import Mutation

FUSED = "numerics/test_fused.py"
FOLDED = "unit/test_models_folding.py"
IN_FUSED: tuple[Mutation, ...] = (
    Mutation(
        "a convolution is folded although a sum reads its output too",
        "models/folding.py",
        "readers.count[conv] == 1",
        "readers.count[conv] >= 1",
        f"{FOLDED}::test_a_folded_network_is_the_same_function_of_the_same_weights",
    ),
    Mutation(
        "a kept pass goes on where the counter stands, wherever the host is",
        "methods/defend/ibau/rounds.py",
        "if number != self._expected:",
        "if False:",
        "capture/test_replays.py::test_replays_equal_eager_calls[ibau, kept]",
    ),
    Mutation(
        "a fused norm gives the other summand the norm's gradient",
        "ops/fused_norm.py",
        "for_sum if needs_more else None",
        "rest[0] if needs_more else None",
        "numerics/test_fused_norm.py::test_the_same_numbers",
    ),
    Mutation(
        "gamma's gradient forgets the shift",
        "models/folding.py",
        "for_scales = torch._foreach_addcmul(sums, for_shifts, offsets)",
        "for_scales = sums",
        f"{FOLDED}::test_a_folded_network_is_the_same_function_of_the_same_weights",
    ),
    Mutation(
        "the second derivative of a max pool takes the other layout's pixels",
        "ops/second_order.py",
        "_laid_out_as(indices, v).flatten(2)",
        "_laid_out_as(indices, v).transpose(2, 3).flatten(2)",
        f"{FUSED}::test_pools_have_torchs_derivatives",
    ),
    Mutation(
        "an ELU with a negative alpha is taken for one whose value tells its slope",
        "ops/second_order.py",
        "if alpha > 0 else None",
        "if alpha else None",
        f"{FUSED}::test_activations_have_torchs_derivatives",
    ),
)
