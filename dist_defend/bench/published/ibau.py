"""I-BAU's unlearning as YiZeng623/I-BAU does it, and its rounds with their evaluations.

Images stay on the host and are copied for every loss. Each outer step differentiates the outer loss twice, multiplies a
vector of zeros by the Hessian, and asks after every product whether it may stop; an inner step records the graph of the
clean images and takes the gradients of all weights along. Each round is evaluated twice.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), labels (B,), both on the host

PENALTY, STEP_SIZE, INNER_LR, TOLERANCE = 1e-3, 0.1, 10.0, 1e-10


def inner_step(model: nn.Module, delta: Tensor, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    """One ascent of delta (1, 3, H, W) on the model's own predictions for clean images."""
    device = delta.device
    images = images.to(device)
    predicted = model(images).argmax(dim=1)
    loss = -functional.cross_entropy(model(images + delta), predicted) + PENALTY * torch.pow(torch.norm(delta), 2)
    optimizer.zero_grad()
    loss.backward(retain_graph=True)
    optimizer.step()
    return loss.item()


def inner_pass(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """delta from zero by one pass over the batches."""
    delta = torch.zeros_like(batches[0][0][:1], device=device).requires_grad_()
    optimizer = torch.optim.SGD([delta], lr=INNER_LR)
    for images, _ in batches:
        inner_step(model, delta, optimizer, images)
    return delta.detach()


def outer_loss(model: nn.Module, delta: Tensor, batch: Batch, patched: Sequence[int]) -> Tensor:
    """Cross-entropy of a batch of which some images carry delta."""
    images, labels = batch[0].to(delta.device), batch[1].to(delta.device)
    stamp = torch.zeros_like(images)
    stamp[list(patched)] = 1
    return functional.cross_entropy(model(images + stamp * delta), labels)


def inner_loss(model: nn.Module, delta: Tensor, batch: Batch) -> Tensor:
    """The loss whose gradient step is the fixed-point map."""
    images, labels = batch[0].to(delta.device), batch[1].to(delta.device)
    return -functional.cross_entropy(model(images + delta), labels) + PENALTY * torch.pow(torch.norm(delta), 2)


def implicit_gradient(
    parameters: Sequence[Tensor], delta: Tensor, outer: Tensor, inner: Tensor, steps: int
) -> list[Tensor]:
    """The outer loss's gradient, with what it has by delta, the fixed point of a gradient step on the inner loss."""
    (for_delta,) = torch.autograd.grad(outer, delta, retain_graph=True)
    direct = torch.autograd.grad(outer, parameters, retain_graph=True)
    (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    mapped = delta - STEP_SIZE * slope
    v = torch.zeros_like(delta)
    for _ in range(steps):
        before = v
        (pulled,) = torch.autograd.grad(mapped, delta, grad_outputs=v, retain_graph=True)
        v = pulled + for_delta
        if torch.norm(v - before).item() < TOLERANCE:
            break
    implicit = torch.autograd.grad(mapped, parameters, grad_outputs=v)
    return [first + second for first, second in zip(direct, implicit, strict=True)]


def outer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    delta: Tensor,
    first: Batch,
    batch: Batch,
    patched: Sequence[int],
    steps: int = 5,
) -> float:
    """One update by the hypergradient; returns the outer loss before it."""
    optimizer.zero_grad()
    parameters = list(model.parameters())
    delta = delta.detach().requires_grad_()
    loss = outer_loss(model, delta, batch, patched)
    hypergradient = implicit_gradient(parameters, delta, loss, inner_loss(model, delta, first), steps)
    for parameter, gradient in zip(parameters, hypergradient, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Share of the images that the model classifies as their label, read from the device batch by batch."""
    hits = count = 0
    for images, labels in batches:
        predicted = model(images.to(device)).argmax(dim=1)
        hits += predicted.eq(labels.to(device)).sum().item()
        count += len(labels)
    return hits / count


def unlearn_round(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clean: Sequence[Batch],
    triggered: Sequence[Batch],
    device: torch.device,
    portion: float = 0.01,
) -> tuple[float, float]:
    """A round and its evaluation; triggered images carry the attacker's class as label. Returns ACC and ASR."""
    model.eval()
    delta = inner_pass(model, batches, device)
    for batch in batches:
        size = len(batch[1])
        patched = random.sample(list(range(size)), int(portion * size))
        outer_step(model, optimizer, delta, batches[0], batch, patched)
    result = accuracy(model, clean, device), accuracy(model, triggered, device)
    accuracy(model, clean, device), accuracy(model, triggered, device)  # once for the list, once for the print
    return result
