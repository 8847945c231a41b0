"""Frozen batch norms folded into the convolutions before them: less to compute, half of the activations to keep."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_defend.models.pairing import feeding


class FoldedConv2d(nn.Module):
    """norm(conv(x)) with a frozen batch norm, as one convolution: (w s) * x + t, with w as the convolution's own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        before = 0 if conv.bias is None else conv.bias.detach()
        self.weight = conv.weight
        self.register_buffer("scale", scale.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("shift", norm.bias.detach() + (before - norm.running_mean) * scale, persistent=False)
        self._convolve: Callable[..., Tensor] = conv._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight * self.scale, self.shift)


def fold_frozen_norms(model: nn.Module, example: Tensor) -> int:
    """Fold in place every frozen batch norm that a bias-free convolution, or one with a fixed bias, feeds.

    Which feeds which is seen in one forward pass of ``example``. Outputs and the gradients of the weights stay the
    same; the keys of what was folded leave the state dict, except the convolutions' weights. Returns how many were.
    """
    with torch.no_grad():
        expected, fed = feeding(model, example)
        folded = 0
        for norm, conv in fed.items():
            layers = model.get_submodule(conv), model.get_submodule(norm)
            if _is_fixed(*layers):
                model.set_submodule(conv, FoldedConv2d(*layers))  # type: ignore[arg-type]
                model.set_submodule(norm, nn.Identity())
                folded += 1
        torch.testing.assert_close(model(example), expected, rtol=1e-3, atol=1e-3)  # a wrong fold is far off
    return folded


class FoldedNetwork:
    """A network in eval mode, whose norms are frozen but for gamma and beta: the same function in fewer layers.

    Every norm that alone reads a convolution's output is folded into it, with s = gamma / sqrt(var + eps):
    w' = s w, b' = beta + s (b - mean). Each list of tensors is computed by one kernel.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """model: its layers and parameters stay the same objects; example: an input, (B, 3, H, W)."""
        pairs = _read_alone(model, example)
        names = [(conv, norm) for norm, conv in pairs.items() if _can_fold(model, conv, norm)]
        self._pairs: list[tuple[Any, Any]] = [(model.get_submodule(c), model.get_submodule(n)) for c, n in names]
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.network = copy.deepcopy(model, shared) if names else model
        self._convolutions: list[Any] = [self.network.get_submodule(conv) for conv, _ in names]
        for convolution, (_, norm) in zip(self._convolutions, names, strict=True):
            convolution._parameters.clear()
            self.network.set_submodule(norm, nn.Identity())

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The network with the weights that the model has now, in which it is differentiable."""
        convolutions, norms = [conv for conv, _ in self._pairs], [norm for _, norm in self._pairs]
        weights, biases = [conv.weight for conv in convolutions], [conv.bias for conv in convolutions]
        gammas, betas = [norm.weight for norm in norms], [norm.bias for norm in norms]
        folded = _fold(norms, *weights, *gammas, *betas, *biases) if norms else ()
        count = len(norms)
        for convolution, weight, bias in zip(self._convolutions, folded[:count], folded[count:], strict=True):
            convolution.weight, convolution.bias = weight, bias
        try:
            yield self.network
        finally:
            for convolution in self._convolutions:
                del convolution.weight, convolution.bias  # with their graph


def _columns(values: Sequence[Tensor]) -> list[Tensor]:
    """(C,) as they multiply kernels (C, I, h, w)."""
    return [value.view(-1, 1, 1, 1) for value in values]


def _can_fold(model: nn.Module, convolution: str, batch_norm: str) -> bool:
    conv, norm = model.get_submodule(convolution), model.get_submodule(batch_norm)
    is_plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
    return is_plain and not norm.training and bool(norm.affine) and bool(norm.track_running_stats)


class _Fold(Function):
    """Norms; their convolutions' w, their gammas and betas, the convolutions' b or None -> all w', then all b'."""

    @staticmethod
    def forward(context: Any, norms: list[Any], *parts: Tensor | None) -> tuple[Tensor, ...]:
        weights, gammas, betas, biases = _split(parts, 4)
        means = [norm.running_mean for norm in norms]
        rates = torch._foreach_rsqrt(torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms]))
        scales = torch._foreach_mul(gammas, rates)
        offsets = torch._foreach_neg(means)
        has_bias = [bias is not None for bias in biases]
        if any(has_bias):
            torch._foreach_add_(list(compress(offsets, has_bias)), list(compress(biases, has_bias)))
        context.parts = weights, rates, scales, offsets, has_bias  # on the node itself: several backward passes come by
        context.set_materialize_grads(False)
        folded = torch._foreach_mul(weights, _columns(scales)), torch._foreach_addcmul(betas, offsets, scales)
        return *folded[0], *folded[1]

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> Any:
        weights, rates, scales, offsets, has_bias = context.parts
        for_weights, for_shifts = _split(gradients, 2)
        for_shifts = [torch.zeros_like(s) if g is None else g for g, s in zip(for_shifts, scales, strict=True)]
        for_weights = [torch.zeros_like(w) if g is None else g for g, w in zip(for_weights, weights, strict=True)]
        sums = [part.sum((1, 2, 3)) for part in torch._foreach_mul(for_weights, weights)]
        for_scales = torch._foreach_addcmul(sums, for_shifts, offsets)
        for_biases: Iterator[Tensor] = iter(())
        if any(has_bias):
            shifts, factors = list(compress(for_shifts, has_bias)), list(compress(scales, has_bias))
            for_biases = iter(torch._foreach_mul(shifts, factors))
        return (
            None,
            *torch._foreach_mul(for_weights, _columns(scales)),
            *torch._foreach_mul(for_scales, rates),
            *for_shifts,
            *(next(for_biases) if has else None for has in has_bias),
        )


_fold: Callable[..., tuple[Tensor, ...]] = _Fold.apply  # with a type, which `apply` has none of


def _split(values: Sequence[Any], parts: int) -> list[list[Any]]:
    size = len(values) // parts
    return [list(values[k * size : (k + 1) * size]) for k in range(parts)]


class _Readers(TorchDispatchMode):
    """Counts the operators that read the memory of each tensor in ``of``, by name, from when it is there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[str, Tensor] = {}
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments):
            read = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            self.count.update(name for name, t in self.of.items() if t.untyped_storage()._cdata in read)
        return func(*args, **(kwargs or {}))


def _read_alone(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Batch norm -> the convolution, called once, whose output nothing else reads; of layers that share no weight."""
    readers = _Readers()

    def watch(name: str) -> Any:
        return lambda module, inputs, output: readers.of.__setitem__(name, output)

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with readers:
        fed = feeding(model, example)[1]
    for hook in hooks:
        hook.remove()
    named = list(model.named_parameters(remove_duplicate=False))
    times = Counter(id(parameter) for _, parameter in named)
    shared = {name.rpartition(".")[0] for name, parameter in named if times[id(parameter)] > 1}
    return {n: conv for n, conv in fed.items() if readers.count[conv] == 1 and not {n, conv} & shared}


def _is_fixed(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm is frozen and nothing of the convolution but its weight is trained."""
    has_fixed_bias = type(conv) is nn.Conv2d and (conv.bias is None or not conv.bias.requires_grad)
    is_frozen = type(norm) is nn.BatchNorm2d and not norm.training and norm.affine and norm.track_running_stats
    return has_fixed_bias and is_frozen and not norm.weight.requires_grad
