"""Batch norm with a mask per channel, y = m gamma x_hat + beta (RNP, Li et al. 2023, after ANP, Wu and Wang 2021)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dist_defend.errors import UserError


class MaskedNorm(nn.Module):
    """Mixed into the class of a batch norm, whose forward then reads m gamma (C,) wherever it reads its weight.

    The parameters keep their names, ``neuron_mask`` (C,) joins them. A state dict without masks loads and leaves the
    masks alone. With m = 1 the output is bitwise that of the plain norm; with m_c = 0 it is that of gamma_c = 0.
    """

    neuron_mask: nn.Parameter
    product: Tensor | None = None  # m gamma, where it is known already

    @property
    def weight(self) -> Tensor:
        """m gamma, (C,)."""
        gamma = self._parameters["weight"]
        assert gamma is not None
        return gamma * self.neuron_mask if self.product is None else self.product

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}neuron_mask", self.neuron_mask.detach())
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Products(Function):
    """All gammas, then all masks -> all m gamma."""

    @staticmethod
    def forward(context: Any, *factors: Tensor) -> tuple[Tensor, ...]:
        context.save_for_backward(*factors)
        count = len(factors) // 2
        return tuple(torch._foreach_mul(factors[:count], factors[count:]))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        factors, count = context.saved_tensors, len(gradients)
        for_gammas = torch._foreach_mul(gradients, factors[count:]) if context.needs_input_grad[0] else [None] * count
        return *for_gammas, *torch._foreach_mul(gradients, factors[:count])


_products: Callable[..., tuple[Tensor, ...]] = _Products.apply  # with a type, which `apply` has none of


@contextmanager
def masked_together(net: nn.Module) -> Iterator[None]:
    """In passes inside one kernel computes m gamma of all masked norms, and one computes their gradients."""
    norms: list[Any] = [module for module in net.modules() if isinstance(module, MaskedNorm)]
    factors = [norm._parameters["weight"] for norm in norms] + [norm.neuron_mask for norm in norms]
    for norm, product in zip(norms, _products(*factors), strict=True):
        norm.product = product
    try:
        yield
    finally:
        for norm in norms:
            norm.product = None


def norm_names(net: nn.Module) -> list[str]:
    """Names of the layers that a mask fits: BatchNorm2d, its subclasses (timm's BatchNormAct2d) included, with a gamma.

    In the order of the state dict. UserError for a network without any.
    """
    names = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    if not names:
        raise UserError(
            f"{type(net).__name__} has no BatchNorm2d layer with a scale, so no neuron to prune: use a network with "
            "batch norm or another defence"
        )
    return names


class PerturbedNorm(MaskedNorm):
    """A masked norm that may be perturbed, y = (m + n) gamma x_hat + (1 + b) beta (ANP), n and b (C,) or None."""

    scale_noise: Tensor | None = None
    shift_noise: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(m + n) gamma, (C,)."""
        gamma = self._parameters["weight"]
        assert gamma is not None
        return gamma * (self.neuron_mask if self.scale_noise is None else self.neuron_mask + self.scale_noise)

    @property
    def bias(self) -> Tensor:
        """(1 + b) beta, (C,)."""
        beta = self._parameters["bias"]
        assert beta is not None
        return beta if self.shift_noise is None else (1 + self.shift_noise) * beta


def mask_norms(net: nn.Module, names: list[str], kind: type[MaskedNorm] = MaskedNorm) -> dict[str, nn.Parameter]:
    """Give the named batch norms masks of ones, in place; returns the masks by layer name. kind: what they become.

    Synchronise batch norm before this, not after. Names as norm_names gave them for the plain network.
    """
    masks = {}
    for name in names:
        norm = net.get_submodule(name)
        assert isinstance(norm.weight, Tensor)
        mask = nn.Parameter(torch.ones_like(norm.weight))
        norm.register_parameter("neuron_mask", mask)
        norm.__class__ = type(f"Masked{type(norm).__name__}", (kind, type(norm)), {})
        masks[name] = mask
    return masks
