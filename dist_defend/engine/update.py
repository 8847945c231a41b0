"""An optimizer whose step a CUDA graph can capture.

Only this file and the strategies touch the inside of torch's optimizers.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.engine.graphed import can_capture
from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.optim import OptimizerConfig, build_optimizer, load_optimizer, lr_factor
from dist_defend.ops.hypergrad import total_norm


class Update:
    """Moves parameters by gradients from anywhere, without a wait for the device; what is not finite moves nothing.

    Where steps can be captured the rate is a tensor, which a captured one reads anew at each replay, and an eager one
    reads too; elsewhere it is a number. With is_graphed, gradients are copied to one place, where a replay finds them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, is_graphed: bool = False) -> None:
        self.parameters, self.config, self.is_graphed = list(parameters), config, is_graphed
        device = self.parameters[0].device
        self.optimizer = build_optimizer(self.parameters, config)
        self._rate = torch.tensor(config.lr, device=device) if can_capture(device) else None
        self._gradients = [torch.zeros_like(p) for p in self.parameters] if is_graphed else []
        self._prepare()

    def step(
        self, gradients: Sequence[Tensor], max_norm: float | None = None, norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One update, clipped to max_norm if that is given -> the norm before, and 1 where it is not finite, else 0.

        gradients: of the parameters, in their order and shapes, already summed over ranks; they may be written to.
        norm: of more gradients than these, where other parameters are to be updated or left out together with them.
        """
        norm = total_norm(gradients) if norm is None else norm
        self._place(gradients)
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
        nonfinite = norm.sub(norm).ne(0).float()  # inf - inf is not a number; half the kernels of isfinite
        self.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # the fused kernels then leave all as it is
        self.optimizer.step()
        return norm, nonfinite

    @property
    def rate(self) -> float:
        """The present one; on a GPU the host waits for it."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_rate(self, rate: float) -> None:
        """For the steps from now on, captured ones too."""
        if self._rate is None:
            self.optimizer.param_groups[0]["lr"] = rate
        else:
            self._rate.fill_(rate)

    def follow(self, step: int, steps_per_epoch: int, total_steps: int) -> None:
        """Set the rate to that of the configured schedule's 0-based step."""
        self.set_rate(self.config.lr * lr_factor(self.config, step, steps_per_epoch, total_steps))

    @torch.no_grad()
    def forget(self) -> None:
        """Begin afresh, in place: zero is what a fresh optimizer starts from."""
        for tensor in self.state():
            tensor.zero_()

    def state(self) -> Iterator[Tensor]:
        """Every tensor that a step writes to beside the parameters and that outlives it."""
        states = self.optimizer.state.values()
        return (value for state in states for value in state.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """In torch's layout."""
        return self.optimizer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. ValueError for another optimizer's. What a captured step writes to stays in place."""
        before = dict(self.optimizer.state)
        load_optimizer(self.optimizer, state)
        for parameter, loaded in self.optimizer.state.items():
            for name, value in loaded.items():
                own = before.get(parameter, {}).get(name)
                loaded[name] = own.copy_(value) if isinstance(own, Tensor) else owned(value, parameter)
        for parameter, own in before.items():  # zero where the state was saved before the first update
            if parameter not in self.optimizer.state:
                self.optimizer.state[parameter] = {k: v.zero_() for k, v in own.items() if isinstance(v, Tensor)}
        self._prepare()

    def _place(self, gradients: Sequence[Tensor]) -> None:
        if self.is_graphed:
            torch._foreach_copy_(self._gradients, list(gradients))
            gradients = self._gradients
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            is_alike = gradient.stride() == parameter.stride()  # fused updates walk both in memory order
            parameter.grad = gradient if is_alike else torch.empty_like(parameter).copy_(gradient)

    def _prepare(self) -> None:
        if self._rate is not None:
            self.optimizer.param_groups[0].update(lr=self._rate, capturable=self.is_graphed)
            self.optimizer._warned_capturable_if_run_uncaptured = True  # as to warm up


def owned(value: Any, parameter: Tensor) -> Any:
    """A copy of a parameter's state, in the parameter's memory layout: fused updates walk both in memory order."""
    if not isinstance(value, Tensor):
        return value
    return (torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)).copy_(value)


def check_finite(scalars: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The scalars. NonFiniteError if "nonfinite" says so on a CPU; on a GPU, which would wait, the trainer asks."""
    nonfinite = scalars["nonfinite"]
    if nonfinite.device.type == "cpu" and nonfinite:
        raise NonFiniteError(f"{what} is not finite")
    return scalars
