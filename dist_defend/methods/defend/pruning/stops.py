"""Predictions of a network at every stop of a pruning sweep, in one pass over the data.

Stops differ in a few layers only. So each batch is read and stamped once, and outputs before the first layer in which a
stop differs from the previous one are reused. Each stop has the same operations on the same batches as alone: the
counts are those of the sequential sweep.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_defend.counts import over_images
from dist_defend.data.loader import Loader
from dist_defend.engine.dist import Ranks
from dist_defend.methods.defend.pruning.masks import Neuron, prune
from dist_defend.models.classifier import Classifier


def predict_pruned(
    model: Classifier,
    order: Sequence[Neuron],
    stops: Sequence[int],
    loader: Loader,
    ranks: Ranks,
    with_beta: bool = False,
    adapt: Callable[[nn.Module], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Classes (N, S) int64 that the model predicts with the first stops[s] neurons pruned, and labels (N,).

    stops: numbers of neurons, ascending. The ranks share the images; results are in the loader's order on every rank.
    The model is on the ranks' device and is not changed. adapt: a further change, in place, of each pruned model.
    """
    pruned = Stops(model, order, stops, with_beta, adapt)

    def each_stop(images: Tensor) -> Tensor:
        with ranks.accelerator.autocast():
            return torch.stack([logits.argmax(1) for logits in pruned(images)], dim=1)

    classes, labels, _ = over_images(pruned.model, loader, ranks, each_stop)
    pruned.memory.close()
    return classes, labels


class Stops:
    """A copy of a model that gives logits at every stop; equal stops and equal first layers are computed once."""

    def __init__(
        self,
        model: Classifier,
        order: Sequence[Neuron],
        stops: Sequence[int],
        with_beta: bool,
        adapt: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        names = list(dict.fromkeys(neuron.layer for neuron in order))
        layers = {name: self.model.net.get_submodule(name) for name in names}
        self.distinct, self.which = torch.unique(torch.tensor(stops), sorted=True, return_inverse=True)
        self.changes: list[list[tuple[Tensor, Tensor]]] = []  # per distinct stop: tensor and its new values
        self.changed: list[set[nn.Module]] = []
        start = 0
        for stop in self.distinct.tolist():
            prune(self.model.net, order[start:stop], with_beta)
            touched = names if start == 0 else list(dict.fromkeys(neuron.layer for neuron in order[start:stop]))
            changed = {layers[name] for name in touched}
            tensors = [p.detach() for layer in changed for p in layer.parameters(recurse=False)]
            if adapt is not None:
                adapt(self.model)
                changed |= {module for module in self.model.modules() if isinstance(module, _BatchNorm)}
                tensors += [b for module in changed for b in module.buffers(recurse=False)]
            self.changes.append([(tensor, tensor.clone()) for tensor in tensors])
            self.changed.append(changed)
            start = stop
        self.memory = PrefixMemory(self.model, next(model.parameters()).new_zeros(1, 3, *2 * (model.image_size,)))

    def __call__(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> logits (B, C) at each stop."""
        logits = []
        for number, changes in enumerate(self.changes):
            for parameter, values in changes:
                parameter.copy_(values)
            logits.append(self.memory.run(images, self.changed[number], self.changed[number + 1 :]))
        self.memory.forget()
        return [logits[stop] for stop in self.which.tolist()]


class PrefixMemory:
    """Runs a model repeatedly on one batch; outputs of layers before the first changed one are reused.

    Outputs of convolutions, batch norms and linear layers are kept, by the order of calls; the rest is cheap. An output
    that a later operation changed in place is computed again. Works on any feed-forward network in eval mode.
    example: an image (1, 3, H, W), by which the order of the calls is found.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.order: list[nn.Module] = []  # by call
        self.changed: set[nn.Module] = set()
        self.outputs: dict[int, tuple[Tensor, int]] = {}  # call -> output and its version, which counts writes
        self.call, self.kept, self.is_shared, self.is_known = 0, 0, False, False
        self.wrapped = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | _BatchNorm)]
        for module in self.wrapped:
            module.forward = self._remembering(module, module.forward)  # type: ignore[method-assign]
        with torch.no_grad():
            model(example)
        self.is_known = True

    def forget(self) -> None:
        """Free the batch's outputs, which are as large as the activations of a training step."""
        self.outputs.clear()

    def close(self) -> None:
        """Restore the model's layers. Wrapped ones are reference cycles, which would keep it in memory."""
        for module in self.wrapped:
            del module.forward

    def run(self, images: Tensor, changed: set[nn.Module], later: Sequence[set[nn.Module]]) -> Tensor:
        """The model's output; ``changed``: layers whose parameters differ from the last run's.

        later: the same for the runs that follow on these images. Outputs that none of them can use are not kept.
        """
        self.changed, self.call, self.is_shared = changed, 0, bool(self.outputs)
        self.kept = max(map(self._first, later), default=0)
        outputs: Tensor = self.model(images)
        return outputs

    def _first(self, changed: set[nn.Module]) -> int:
        """Number of the first call of a changed layer."""
        return next((call for call, module in enumerate(self.order) if module in changed), len(self.order))

    def _remembering(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Any:
        def answer(x: Tensor) -> Tensor:
            if not self.is_known:
                self.order.append(module)
                return forward(x)
            self.is_shared = self.is_shared and module not in self.changed
            number, self.call = self.call, self.call + 1
            if self.is_shared:
                output, version = self.outputs[number]
                if output._version == version:
                    return output
            output = forward(x)
            self.outputs.pop(number, None)
            if number < self.kept:
                self.outputs[number] = output, output._version
            return output

        return answer
