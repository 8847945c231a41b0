"""ZSKT with ABD as illidanlab/ABD runs them.

Every student step generates the images again, lets the teacher answer again and differentiates through the generator
for nothing; the teacher's weights get gradients that nobody reads. Each shuffled copy runs whole. The perturbation is
synthesised anew for each student step, and the clean images pass through the model in every one of its rounds. The
fixed point multiplies a vector of zeros first and asks after every product whether it may stop; two more passes of the
student only serve the log.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.bench.published.ibau import PENALTY, implicit_gradient

MAX_NORM = 5.0


class Layered(Protocol):
    """A network that gives the maps of its groups, too."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]: ...


@dataclass
class Players:
    """The networks and the optimizers of two of them."""

    generator: nn.Module
    student: Layered
    teacher: Layered
    generator_optimizer: torch.optim.Optimizer
    student_optimizer: torch.optim.Optimizer
    shuffled: Sequence[nn.Module] = ()  # the vaccine's members
    suppression: float = 0.1


@dataclass
class Retrospection:
    """Where delta starts, how long it is improved, and for each student step the images that carry it."""

    start: Tensor
    patched: Sequence[Sequence[int]]
    logged: Sequence[Sequence[int]]  # and in the log
    rounds: int = 10
    lr: float = 0.1
    steps: int = 5


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over images and classes; the generator's loss is its negative."""
    return divergences(student, teacher).mean()


def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """Its terms, (B, C)."""
    return functional.kl_div(functional.log_softmax(student, 1), functional.softmax(teacher, 1), reduction="none")


def generator_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """What the generator minimises."""
    return -divergence(student, teacher)


def suppression_loss(images: Tensor, teacher: Layered, shuffled: Sequence[nn.Module]) -> Tensor:
    """Mean divergence of the members' mean from the teacher where both agree."""
    answers = teacher(images)
    mixed = torch.stack([member(images) for member in shuffled]).mean(0)
    agree = answers.argmax(1) == mixed.argmax(1)
    if not agree.any():
        return answers.new_zeros(())
    return divergences(mixed, answers).mean(1)[agree].mean()


def attention(activation: Tensor) -> Tensor:
    """Unit rows."""
    return functional.normalize(activation.pow(2).mean(1).view(activation.size(0), -1))


def student_loss(maps: Sequence[Tensor], logits: Tensor, their_maps: Sequence[Tensor], answers: Tensor) -> Tensor:
    """Divergence and 250 times the attention loss of every group."""
    loss = divergence(logits, answers)
    for mine, theirs in zip(maps, their_maps, strict=True):
        loss = loss + 250 * (attention(mine) - attention(theirs)).pow(2).mean()
    return loss


def generator_step(players: Players, z: Tensor) -> float:
    """One update of the generator; returns its loss."""
    images = players.generator(z)
    logits, answers = players.student(images), players.teacher(images)
    loss = generator_loss(logits, answers)
    if players.shuffled:
        loss = loss - players.suppression * suppression_loss(images, players.teacher, players.shuffled)
    players.generator_optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(players.generator.parameters(), MAX_NORM)
    players.generator_optimizer.step()
    return loss.item()


def student_step(players: Players, z: Tensor) -> float:
    """One update of the student, clipped; returns its loss."""
    images = players.generator(z)
    loss = student_loss(*players.student.layers(images), *players.teacher.layers(images))
    players.student_optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(players.student.parameters(), MAX_NORM)
    players.student_optimizer.step()
    return loss.item()


def perturbation(model: Layered, images: Tensor, plan: Retrospection) -> Tensor:
    """delta that changes the model's predictions most."""
    delta = plan.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=plan.lr)
    for _ in range(plan.rounds):
        loss = generator_loss(model(images + delta), model(images).detach()) + PENALTY * delta.pow(2).sum()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
    return delta.detach().requires_grad_()


def outer_loss(student: Layered, images: Tensor, delta: Tensor, patched: Sequence[int]) -> Tensor:
    """Divergence between clean images and those of which some carry delta."""
    stamp = torch.zeros_like(images)
    stamp[list(patched)] = 1
    clean = student(images)
    return divergence(student(images + stamp * delta), clean.detach())


def add_hypergradient(student: Layered, images: Tensor, delta: Tensor, patched: Sequence[int], steps: int) -> float:
    """Add the implicit gradient of the outer loss to the student's gradients."""
    parameters = list(student.parameters())
    outer = outer_loss(student, images, delta, patched)
    clean = student(images)
    inner = generator_loss(student(images + delta), clean.detach()) + PENALTY * delta.pow(2).sum()
    gradients = implicit_gradient(parameters, delta, outer, inner, steps)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return outer.item()


def retrospective_step(players: Players, z: Tensor, plan: Retrospection, number: int) -> float:
    """One update of the student by the hypergradient and the student's loss, not clipped; returns that loss."""
    student, images = players.student, players.generator(z)
    delta = perturbation(players.teacher, images, plan)
    players.student_optimizer.zero_grad()
    add_hypergradient(student, images.detach(), delta, plan.patched[number], plan.steps)
    loss = student_loss(*student.layers(images), *players.teacher.layers(images))
    loss.backward()
    players.student_optimizer.step()
    with torch.no_grad():
        outer_loss(student, images, delta, plan.logged[number]).item()
    return loss.item()


def pseudo_batch(
    players: Players, z: Tensor, student_steps: int = 10, plan: Retrospection | None = None
) -> tuple[float, list[float]]:
    """The generator's step and the student's on one z; returns the generator's loss and the student's losses."""
    made = generator_step(players, z)
    if plan is None:
        return made, [student_step(players, z) for _ in range(student_steps)]
    return made, [retrospective_step(players, z, plan, number) for number in range(student_steps)]
