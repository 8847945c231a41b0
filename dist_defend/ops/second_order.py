"""Layers whose second derivatives exist, and convolutions and batch norms where they cost no more than they must.

torch's double backward of a convolution always computes the weight's part too, as a convolution with a kernel as large
as the image, even where only the images' part is asked for; that of a batch norm, frozen or not, is a dozen passes over
the activations. Here a Hessian product with an input perturbation costs two convolutions per layer, and the mixed
derivative uses the ordinary weight-gradient kernels. Values are the same up to rounding. Hardsigmoid and the fused
kernels of attention, which torch differentiates once only, are computed in other words.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_backward = torch.ops.aten.convolution_backward
_constant = [0]  # how many `constant_parameters` are open; autograd's own threads must see it, so no thread local


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Backward passes inside skip gradients with respect to parameters, which nobody may then ask for.

    Functions written in Python cannot know which gradients a call of torch.autograd.grad wants.
    """
    _constant[0] += 1
    try:
        yield
    finally:
        _constant[0] -= 1


class CheapSecondOrder(TorchFunctionMode):
    """A network that runs inside ``with CheapSecondOrder():`` can be differentiated twice, and cheaply.

    ops.hypergrad.check_twice_differentiable finds networks with yet other layers.
    """

    def __enter__(self) -> None:
        self._kernels = sdpa_kernel(SDPBackend.MATH)  # also where torch's own modules ask for attention
        self._kernels.__enter__()
        TorchFunctionMode.__enter__(self)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)
        self._kernels.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and len(args) == 7 and not isinstance(args[4], str):
            images, weight, bias, *geometry = args
            return _convolve(images, weight, bias, tuple(geometry))
        is_affine = func is F.batch_norm and None not in (kwargs["weight"], kwargs["bias"])
        if is_affine and kwargs["training"] and kwargs["momentum"] is not None:
            images, mean, variance = args
            options = (kwargs["weight"], kwargs["bias"], mean, variance, kwargs["momentum"], kwargs["eps"])
            return _norm(images, *options)
        if is_affine and not kwargs["training"]:
            images, mean, variance = args
            scale = kwargs["weight"] * torch.rsqrt(variance + kwargs["eps"])
            channel = (1, -1) + (1,) * (images.ndim - 2)
            return torch.addcmul((kwargs["bias"] - mean * scale).view(channel), images, scale.view(channel))
        if func is F.hardsigmoid:  # in place or not, as its value is what counts
            return F.relu6(args[0] + 3) / 6
        return func(*args, **kwargs)


def _wants(context: Any, number: int) -> bool:
    return not _constant[0] and bool(context.needs_input_grad[number])


def _gradient(which: int, output: Tensor, images: Tensor, weight: Tensor, geometry: Any) -> Tensor:
    """Gradient of a convolution with respect to its images (0) or its weight (1); the other is read for its shape."""
    stride, padding, dilation, groups = geometry
    mask = [which == 0, which == 1, False]
    options = (stride, padding, dilation, False, [0, 0], groups, mask)
    gradient: Tensor = _backward(output, images, weight, None, *options)[which]
    return gradient


class _Convolve(Function):
    """images (B, I, H, W), weight (O, I / groups, h, w), bias (O,) or None -> (B, O, H', W')."""

    @staticmethod
    def forward(context: Any, images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        context.save_for_backward(images, weight)
        context.geometry = geometry
        return F.conv2d(images, weight, bias, *geometry)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        images, weight = context.saved_tensors
        geometry, needs_images = context.geometry, context.needs_input_grad[0]
        for_images = _image_gradient(grad, weight, images, geometry) if needs_images else None
        for_weight = _weight_gradient(grad, images, weight, geometry) if _wants(context, 1) else None
        for_bias = grad.sum((0, 2, 3)) if _wants(context, 2) else None
        return for_images, for_weight, for_bias, None


class _ImageGradient(Function):
    """Linear in grad and in weight."""

    @staticmethod
    def forward(context: Any, grad: Tensor, weight: Tensor, images: Tensor, geometry: Any) -> Tensor:
        context.save_for_backward(grad, weight)
        context.geometry = geometry
        return _gradient(0, grad, images, weight, geometry)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        grad, weight = context.saved_tensors
        for_grad = _convolve(v, weight, None, context.geometry) if context.needs_input_grad[0] else None
        for_weight = _weight_gradient(grad, v, weight, context.geometry) if _wants(context, 1) else None
        return for_grad, for_weight, None, None


class _WeightGradient(Function):
    """Linear in grad and in images."""

    @staticmethod
    def forward(context: Any, grad: Tensor, images: Tensor, weight: Tensor, geometry: Any) -> Tensor:
        context.save_for_backward(grad, images)
        context.geometry = geometry
        return _gradient(1, grad, images, weight, geometry)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        grad, images = context.saved_tensors
        for_grad = _convolve(images, v, None, context.geometry) if context.needs_input_grad[0] else None
        for_images = _image_gradient(grad, v, images, context.geometry) if context.needs_input_grad[1] else None
        return for_grad, for_images, None, None


class _Norm(Function):
    """Batch norm by the batch's own statistics: x (B, C, ...), weight and bias (C,); moves the running ones."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Any, variance: Any, momentum: float, eps: float
    ) -> Tensor:
        y: Tensor
        y, centre, rate = torch.ops.aten.native_batch_norm(x, weight, bias, mean, variance, True, momentum, eps)
        context.save_for_backward(x, weight, centre, rate)
        return y

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        for_x, for_weight, for_bias = _norm_gradient(grad, *context.saved_tensors)
        return (
            for_x,
            for_weight if _wants(context, 1) else None,
            for_bias if _wants(context, 2) else None,
            *[None] * 4,
        )


class _NormGradient(Function):
    """Linear in grad and in weight. The gradients of weight and bias cannot be differentiated again.

    With normalised x^, rate r and means <.> over all but the channels, the gradient for x is w r (g - <g> - <g x^> x^).
    """

    @staticmethod
    def forward(context: Any, grad: Tensor, x: Tensor, weight: Tensor, centre: Tensor, rate: Tensor) -> Any:
        grad = _laid_out_as(x, grad)
        for_x, for_weight, for_bias = _norm_backward(grad, x, weight, centre, rate)
        context.save_for_backward(grad, x, weight, centre, rate, for_weight, for_bias)
        context.mark_non_differentiable(for_weight, for_bias)
        return for_x, for_weight, for_bias

    @staticmethod
    def backward(context: Any, v: Tensor, *_: Any) -> Any:
        grad, x, weight, centre, rate, grad_x, grad_1 = context.saved_tensors
        v, count = _laid_out_as(x, v), x.numel() // x.shape[1]
        for_grad, v_x, v_1 = _norm_backward(v, x, weight, centre, rate)  # the map is symmetric; sums of v x^ and of v
        grad_x, grad_1, v_x, v_1 = (total / count for total in (grad_x, grad_1, v_x, v_1))
        both = (v * grad).sum([d for d in range(x.ndim) if d != 1]) / count - grad_1 * v_1 - grad_x * v_x
        of_x = (both - 2 * grad_x * v_x) * rate
        rest = -(grad_1 * v_x + grad_x * v_1) - of_x * centre
        channel = (1, -1) + (1,) * (x.ndim - 2)
        scale = -weight * rate.square()
        rest, of_grad, of_v, of_x = ((scale * part).view(channel) for part in (rest, v_x, grad_x, of_x))
        for_x = torch.addcmul(rest, grad, of_grad).addcmul_(v, of_v).addcmul_(x, of_x)
        return for_grad, for_x, count * rate * both, None, None


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, centre: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    """Gradients for x, weight and bias."""
    options = (None, None, centre, rate, True, 0.0, [True, True, True])
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(grad, x, weight, *options)
    return gradients


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return other.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


# With types, which torch's `apply` has none of.
_convolve: Callable[..., Tensor] = _Convolve.apply
_image_gradient: Callable[..., Tensor] = _ImageGradient.apply
_weight_gradient: Callable[..., Tensor] = _WeightGradient.apply
_norm: Callable[..., Tensor] = _Norm.apply
_norm_gradient: Callable[..., tuple[Tensor, ...]] = _NormGradient.apply
