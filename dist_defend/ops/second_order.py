"""Layers whose second derivatives exist, and cost no more than they must: convolutions, norms, ReLU, ELU, max pools.

torch's double backward of a convolution always computes the weight's part too, as a convolution with a kernel as large
as the image, even where only the images' part is asked for; that of a batch norm or an ELU is a dozen passes over the
activations, that of a ReLU or a max pool makes zeros and adds them. Here a Hessian product with an input perturbation
costs two convolutions per layer and one pass per activation and direction, and the mixed derivative uses the ordinary
weight-gradient kernels. Values are the same up to rounding. Hardsigmoid and the fused kernels of attention, which torch
differentiates once only, are computed by other formulas.
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

from dist_defend.ops.fused import channels, elu_curve, elu_slope, norm_curve

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
        self._zeros: dict[int, Tensor] = {}  # by their number, for norms
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
            if images.shape[1] not in self._zeros:
                self._zeros[images.shape[1]] = torch.zeros_like(kwargs["weight"])
            return _norm(images, *options, self._zeros[images.shape[1]])
        if is_affine and not kwargs["training"]:
            images, mean, variance = args
            scale = kwargs["weight"] * torch.rsqrt(variance + kwargs["eps"])
            return torch.addcmul(channels(kwargs["bias"] - mean * scale, images), images, channels(scale, images))
        if func in _ACTIVATIONS:
            made = _ACTIVATIONS[func](*args, **kwargs)
            return func(*args, **kwargs) if made is None else made
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


class _Relu(Function):
    """Of any shape. Its second derivative is 0."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        return _relu_gradient(grad, context.saved_tensors[0].detach())


class _ReluGradient(Function):
    """Linear in grad, and its own transpose."""

    @staticmethod
    def forward(context: Any, grad: Tensor, y: Tensor) -> Any:
        context.save_for_backward(y)
        return torch.ops.aten.threshold_backward(grad, y, 0)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        return _relu_gradient(v, *context.saved_tensors), None


class _Elu(Function):
    """x of any shape -> y and an alias of y without memory.

    The gradient that comes from the slope arrives at the alias, so that one kernel adds both and multiplies by f'.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        y = F.elu(x, alpha)
        name = y.new_empty(()).expand_as(y)
        context.save_for_backward(y, name)
        context.alpha = alpha
        context.set_materialize_grads(False)
        return y, name

    @staticmethod
    def backward(context: Any, grad: Tensor | None, more: Tensor | None) -> Any:
        y, name = context.saved_tensors
        if grad is None:
            grad, more = more, None
        return None if grad is None else _elu_gradient(grad, more, name, y.detach(), context.alpha), None


class _EluGradient(Function):
    """Linear in grad and in more, which may be None."""

    @staticmethod
    def forward(context: Any, grad: Tensor, more: Tensor | None, name: Tensor, y: Tensor, alpha: float) -> Any:
        context.save_for_backward(grad, y)
        context.alpha, context.is_sum = alpha, more is not None
        if more is not None:
            return elu_slope(grad, more, y, alpha)
        return torch.ops.aten.elu_backward(grad, alpha, 1.0, 1.0, True, y)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        assert not context.is_sum, "a third derivative"
        for_grad, for_y = elu_curve(v, *context.saved_tensors, context.alpha)
        return for_grad, None, for_y, None, None


class _MaxPool(Function):
    """x (B, C, H, W) -> (B, C, H', W'). Its second derivative is 0."""

    @staticmethod
    def forward(context: Any, x: Tensor, options: Any) -> Any:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *options)
        context.save_for_backward(x, indices)
        context.options = options
        return y

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        x, indices = context.saved_tensors
        return _pool_gradient(grad, x.detach(), indices, context.options), None


class _PoolGradient(Function):
    """Linear in grad; x is read for its shape."""

    @staticmethod
    def forward(context: Any, grad: Tensor, x: Tensor, indices: Tensor, options: Any) -> Any:
        context.save_for_backward(indices)
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *options, indices)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        (indices,) = context.saved_tensors
        chosen = _laid_out_as(indices, v).flatten(2).gather(2, indices.flatten(2))
        return chosen.view_as(indices), None, None, None


class _Norm(Function):
    """Batch norm by the batch's own statistics: x (B, C, ...), weight and bias (C,); moves the running ones."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Any,
        variance: Any,
        momentum: float,
        eps: float,
        zeros: Tensor,
    ) -> Tensor:
        y: Tensor
        y, centre, rate = torch.ops.aten.native_batch_norm(x, weight, bias, mean, variance, True, momentum, eps)
        context.save_for_backward(x, weight, centre, rate, zeros)
        return y

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        for_x, for_weight, for_bias = _norm_gradient(grad, *context.saved_tensors)
        return (
            for_x,
            for_weight if _wants(context, 1) else None,
            for_bias if _wants(context, 2) else None,
            *[None] * 5,
        )


class _NormGradient(Function):
    """Linear in grad and in weight. The gradients of weight and bias cannot be differentiated again.

    With normalised x^, rate r and means <.> over all but the channels, the gradient for x is w r (g - <g> - <g x^> x^).
    """

    @staticmethod
    def forward(
        context: Any, grad: Tensor, x: Tensor, weight: Tensor, centre: Tensor, rate: Tensor, zeros: Tensor
    ) -> Any:
        grad = _laid_out_as(x, grad)
        for_x, for_weight, for_bias = _norm_backward(grad, x, weight, centre, rate)
        context.save_for_backward(grad, x, weight, centre, rate, zeros, for_weight, for_bias)
        context.mark_non_differentiable(for_weight, for_bias)
        context.set_materialize_grads(False)
        return for_x, for_weight, for_bias

    @staticmethod
    def backward(context: Any, v: Tensor, *_: Any) -> Any:
        grad, x, weight, centre, rate, zeros, grad_x, grad_1 = context.saved_tensors
        v = _laid_out_as(x, v)
        for_grad, v_x, v_1 = _norm_backward(v, x, weight, centre, rate)  # the map is symmetric; sums of v x^ and of v
        both = _norm_backward(v, grad, weight, zeros, rate, is_sum=True)[1]  # the sums of rate v grad
        for_x, for_weight = norm_curve(v, grad, x, weight, centre, rate, grad_x, grad_1, v_x, v_1, both)
        return for_grad, for_x, for_weight, None, None, None


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, centre: Tensor, rate: Tensor, is_sum: bool = False
) -> tuple[Tensor, ...]:
    """Gradients for x, weight and bias; is_sum: that for the weight alone, the sums of rate (x - centre) grad."""
    options = (None, None, centre, rate, True, 0.0, [not is_sum, True, not is_sum])
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(grad, x, weight, *options)
    return gradients


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return other.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


# With types, which torch's `apply` has none of.
_convolve: Callable[..., Tensor] = _Convolve.apply
_image_gradient: Callable[..., Tensor] = _ImageGradient.apply
_weight_gradient: Callable[..., Tensor] = _WeightGradient.apply
_relu: Callable[..., Tensor] = _Relu.apply
_relu_gradient: Callable[..., Tensor] = _ReluGradient.apply
_elu: Callable[..., tuple[Tensor, Tensor]] = _Elu.apply
_elu_gradient: Callable[..., Tensor] = _EluGradient.apply
_max_pool: Callable[..., Tensor] = _MaxPool.apply
_pool_gradient: Callable[..., Tensor] = _PoolGradient.apply
_norm: Callable[..., Tensor] = _Norm.apply
_norm_gradient: Callable[..., tuple[Tensor, ...]] = _NormGradient.apply


# As torch's functions are called, in place or not, as the value is what counts. None: torch's own must do it.


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    return _relu(x)


def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor | None:
    return _elu(x, alpha)[0] if alpha > 0 else None  # else y does not tell f'


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x + 3) / 6


def max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if return_indices or x.ndim != 4:
        return None
    sizes = [[n, n] if isinstance(n, int) else list(n) for n in (kernel_size, stride or kernel_size, padding, dilation)]
    return _max_pool(x, (*sizes, ceil_mode))


_ACTIVATIONS: dict[Any, Callable[..., Tensor | None]] = {
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.elu: elu,
    F.hardsigmoid: hardsigmoid,
    F.max_pool2d: max_pool2d,
}
