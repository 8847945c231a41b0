"""Predictions of a network at every stop of a pruning sweep, in one pass over the data.

Stops only differ in batch norms, so each batch is read and stamped once, and what comes before the first layer in which
a stop differs from the last one is taken from memory. Each stop gets the very operations, on the very batches,
that it would get alone: the counts are those of the sequential sweep.
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
    The model, which is left alone, stands on the ranks' device. adapt: what else is done, in place, to a pruned model.
    """
    pruned = Stops(model, order, stops, with_beta, adapt)

    def each_stop(images: Tensor) -> Tensor:
        with ranks.accelerator.autocast():
            return torch.stack([logits.argmax(1) for logits in pruned(images)], dim=1)

    classes, labels, _ = over_images(pruned.model, loader, ranks, each_stop)
    return classes, labels


class Stops:
    """A copy of a model that answers at every stop, equal stops and equal prefixes computed once."""

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
        self.memory = PrefixMemory(self.model)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> logits (B, C) at each stop."""
        self.memory.forget()
        logits = []
        for changes, changed in zip(self.changes, self.changed, strict=True):
            for parameter, values in changes:
                parameter.copy_(values)
            logits.append(self.memory.run(images, changed))
        return [logits[stop] for stop in self.which.tolist()]


class PrefixMemory:
    """Runs a model again and again on one batch; layers before the first changed one answer from memory.

    Convolutions, batch norms and linear layers are remembered, by the order of their calls; the rest is cheap. An
    output that later operations have written to is made again. Works on any feed-forward network in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: set[nn.Module] = set()
        self.outputs: dict[int, tuple[Tensor, int]] = {}  # call -> output and how often it had been written to
        self.call, self.is_shared = 0, False
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
                module.forward = self._remembering(module, module.forward)  # type: ignore[method-assign]

    def forget(self) -> None:
        """A new batch comes."""
        self.outputs.clear()

    def run(self, images: Tensor, changed: set[nn.Module]) -> Tensor:
        """The model's output; ``changed``: layers whose parameters differ from the last run's."""
        self.changed, self.call, self.is_shared = changed, 0, bool(self.outputs)
        outputs: Tensor = self.model(images)
        return outputs

    def _remembering(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Any:
        def answer(x: Tensor) -> Tensor:
            self.is_shared = self.is_shared and module not in self.changed
            number, self.call = self.call, self.call + 1
            if self.is_shared:
                output, version = self.outputs[number]
                if output._version == version:
                    return output
            output = forward(x)
            self.outputs[number] = output, output._version
            return output

        return answer
