"""Random numbers that are functions of numbers, by tensor arithmetic: the same on every device, without a wait."""

from torch import Tensor

_INCREMENT, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(numbers: Tensor) -> Tensor:
    """Any int64 -> int64 of the same shape: SplitMix64's next number (Steele et al. 2014), in two's complement."""
    x = numbers + _INCREMENT
    for right, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ (x >> right & 2 ** (64 - right) - 1)) * factor
    return x ^ (x >> 31 & 2**33 - 1)
