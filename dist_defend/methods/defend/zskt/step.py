"""One pseudo-batch of zero-shot knowledge transfer: the generator's steps, then the student's, on one draw of z."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.data.order import rank_slice
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate
from dist_defend.engine.optim import lr_factor
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.methods.defend.abd.retrospection import SelfRetrospection
from dist_defend.methods.defend.abd.vaccine import Vaccine, suppression
from dist_defend.methods.defend.zskt.options import Config
from dist_defend.models.batch_statistics import counted_together, repeated_statistics
from dist_defend.models.wide_resnet import WideResNet
from dist_defend.ops.attention import unit_attention
from dist_defend.ops.fused_norm import differentiated_once
from dist_defend.ops.hypergrad import all_reduce_together
from dist_defend.ops.losses import distillation
from dist_defend.ops.transfer import to_device

_GRADIENT = "the gradient"


class TransferStep:
    """Micaelli and Storkey 2019 (algorithm 1), with ABD's vaccine and self-retrospection where they are configured.

    A generator step maximises D(S(x), T(x)) = KL(T || S) / C over x = G(z); a student step minimises it, plus the
    attention loss. All student steps of a pseudo-batch have the same images, so images, the teacher's outputs and a
    delta found on the teacher are computed once. Every loss is this rank's share of the mean over the global batch;
    gradients are summed over ranks before they are clipped.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module, config: Config, ranks: Ranks, seed: int
    ) -> None:
        """teacher: frozen, in eval mode. student and generator: batch norm synchronised over several ranks."""
        self.teacher, self.student, self.generator = teacher, student, generator
        self.config, self.ranks = config, ranks
        for model in (student, generator):
            model.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # several losses compare passes, which must be of one function
        self.own = rank_slice(config.batch_size, ranks.rank, ranks.world_size)
        self.vaccine = Vaccine(teacher, config.vaccine, seed) if config.vaccine else None
        self.retrospection: SelfRetrospection | None = None
        if config.retrospection:
            self.retrospection = SelfRetrospection(
                config.retrospection, student, teacher, self.divergence, seed=seed, batch_size=config.batch_size
            )
        self.weight = torch.tensor(
            config.vaccine.weight if config.vaccine else 0.0, dtype=ranks.dtype, device=ranks.device
        )
        self._make_buffers()
        device, mode = ranks.device, config.graph
        self.make = GraphedUpdate("ZSKT generator step", self.generate, self._changed, device, mode)
        self.perturb = GraphedUpdate("ZSKT perturbation", self.synthesise, self._changed, device, mode)
        self.learn = GraphedUpdate("ZSKT student step", self.imitate, self._changed, device, mode)
        self.players = {
            "generator": Update(generator.parameters(), config.generator_optimizer, self.make.is_graphed),
            "student": Update(student.parameters(), config.student_optimizer, self.make.is_graphed),
        }

    def _make_buffers(self) -> None:
        """Tensors that hold a pseudo-batch's images, the teacher's outputs for them and delta."""
        config, z = self.config, torch.zeros(self.own.stop - self.own.start, self.config.z_dim)
        with torch.no_grad(), repeated_statistics(self.generator, 0):
            self.images = self.generator(z.to(self.ranks.device, self.ranks.dtype))
            maps, self.logits = _layers(self.teacher, self.images)
        self.attention = [unit_attention(map_) for map_ in maps] if config.attention else []
        self.image_size = self.images.shape[-1]
        self.delta = torch.zeros_like(self.images[:1])
        is_kept = self.vaccine is not None and self.vaccine.is_selecting
        self.drafts = [torch.zeros_like(self.images) for _ in range(config.generator_steps if is_kept else 0)]

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """batch.images: this rank's rows of z, (b, z_dim). Raises NonFiniteError on a CPU before a bad update."""
        config, number = self.config, at.epoch  # a pseudo-batch is an epoch
        if self.vaccine is not None and self.vaccine.is_selecting and number == self.vaccine.config.selection_batches:
            self.vaccine.select()  # the drafts stay: a graph that was captured before goes on writing to them
        is_defending = self.retrospection is not None and number >= self.retrospection.config.start
        self._set_rates(number)
        weight = [] if self.vaccine is None or not self.vaccine.is_used else [self.weight]
        rows = [check_finite(self.make(batch.images, *weight), _GRADIENT)]
        self._keep_for_selection(number)
        start: list[Tensor] = []
        if self.retrospection and is_defending:
            start = [self._tensor(self.retrospection.start(self.image_size, number))]
            if self.retrospection.config.perturbs == "teacher":
                self.perturb(*start)
        for step in range(config.student_steps):
            patched: list[Tensor] = []
            if self.retrospection and is_defending:
                if self.retrospection.config.perturbs == "student":
                    self.perturb(*start)
                patched = [self._tensor(self.retrospection.patched(self.own, number, step))]
            rows.append(check_finite(self.learn(*patched), _GRADIENT))
        nonfinite = torch.stack([row.pop("nonfinite") for row in rows]).amax()
        means = {key: torch.stack([row[key] for row in rows[1:]]).mean(0) for key in rows[1]}
        return {**rows[0], **means, "nonfinite": nonfinite}

    def generate(self, z: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The generator's steps; then the images and the teacher's outputs for the student's steps.

        weight: of the suppression loss; None without.
        """
        config, scalars = self.config, dict[str, Tensor]()
        for number in range(config.generator_steps):
            images = self.generator(z)
            if self.drafts and weight is None:  # drafts: for the choice of a vaccine; with a weight it is chosen
                self.drafts[number].copy_(images.detach())
            logits = self.student(images)
            if weight is None or self.vaccine is None:
                loss = -self.divergence(logits, self.teacher(images))
            else:
                answers, shuffled = self.vaccine.ensemble(images)
                suppressed = suppression(answers, shuffled)
                loss = -self.divergence(logits, answers) - weight * suppressed
                scalars["suppression"] = suppressed.detach() * self.ranks.world_size
            player = self.players["generator"]
            gradients = all_reduce_together(list(torch.autograd.grad(loss, player.parameters)))
            norm, nonfinite = player.step(gradients, config.max_grad_norm)
            scalars |= {"generator_loss": loss.detach() * self.ranks.world_size, "generator_grad_norm": norm}
            scalars["nonfinite"] = torch.maximum(nonfinite, scalars.get("nonfinite", nonfinite))
        with torch.no_grad(), repeated_statistics(self.generator, config.student_steps):
            self.images.copy_(self.generator(z))
            maps, logits = _layers(self.teacher, self.images)
            self.logits.copy_(logits)
            for target, map_ in zip(self.attention, maps, strict=False):
                target.copy_(unit_attention(map_))
        return scalars

    def synthesise(self, start: Tensor) -> dict[str, Tensor]:
        """Find delta for the pseudo-batch's images, from ``start`` (1, 3, H, W)."""
        assert self.retrospection is not None
        reference = self.logits
        if self.retrospection.config.perturbs == "student":
            with torch.no_grad(), repeated_statistics(self.student, 0):
                reference = self.student(self.images)
        self.delta.copy_(self.retrospection.synthesise(self.images, reference, start))
        return {}

    def imitate(self, patched: Tensor | None = None) -> dict[str, Tensor]:
        """One student step; patched (b, 1, 1, 1): the images that carry delta, None without self-retrospection."""
        player, config = self.players["student"], self.config
        with differentiated_once(), counted_together(self.student):
            maps, logits = _layers(self.student, self.images)
        divergence = self.divergence(logits, self.logits)
        transfer = logits.new_zeros(())
        for target, map_ in zip(self.attention, maps, strict=False):
            transfer = transfer + (unit_attention(map_) - target).square().sum() / (config.batch_size * target.shape[1])
        loss = divergence + config.attention * transfer
        is_reused = config.retrospection is not None and not config.retrospection.detach_reference
        gradients = all_reduce_together(list(torch.autograd.grad(loss, player.parameters, retain_graph=is_reused)))
        scalars: dict[str, Tensor] = {}
        if patched is not None and self.retrospection:
            result, scalars = self.retrospection.hypergradient(self.images, logits, self.delta, patched)
            torch._foreach_add_(gradients, result.total)
        norm, nonfinite = player.step(gradients, config.max_grad_norm if patched is None else None)
        if patched is not None and self.retrospection:
            self.retrospection.after_update(self.images, self.delta, patched)
        shares = {"student_loss": loss, "divergence": divergence, "attention_loss": transfer}
        told = {key: value.detach() * self.ranks.world_size for key, value in shares.items()}
        return {**told, **scalars, "student_grad_norm": norm, "nonfinite": nonfinite}

    def divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """This rank's share of D(logits, reference)."""
        return distillation(logits, reference, self.config.temperature, batch_size=self.config.batch_size)

    def perturbation(self) -> Tensor | None:
        """delta (1, 3, H, W) of the latest pseudo-batch; None before the first one of this process."""
        return self.delta if bool(self.delta.any()) else None

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizers and the vaccine. A collective call."""
        return {
            "generator": self.generator.state_dict(),
            "student": self.student.state_dict(),
            "optimizers": {name: player.state_dict() for name, player in self.players.items()},
            "vaccine": None if self.vaccine is None else self.vaccine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.student.load_state_dict(state["student"])
        for name, player in self.players.items():
            player.load_state_dict(state["optimizers"][name])
        if self.vaccine is not None:
            self.vaccine.load_state_dict(state["vaccine"])

    def _set_rates(self, number: int) -> None:
        """Set the learning rates. Schedules count pseudo-batches; self-retrospection may restart the student's."""
        total, retrospection = self.config.pseudo_batches, self.config.retrospection
        for player in self.players.values():
            player.follow(number, 1, total)
        if retrospection is None or retrospection.restart_lr is None or number < retrospection.start:
            return
        student, start = self.players["student"], retrospection.start
        if number == start:
            student.forget()
        schedule = student.config
        if schedule.schedule == "multistep":
            schedule = replace(schedule, schedule="cosine", milestones=())
        student.set_rate(retrospection.restart_lr * lr_factor(schedule, number - start, 1, total - start))

    def _keep_for_selection(self, number: int) -> None:
        if self.vaccine is not None and self.vaccine.is_selecting and number >= self.config.first_kept:
            for draft in self.drafts:
                self.vaccine.keep(draft)
            self.vaccine.keep(self.images, self.config.student_steps)

    def _tensor(self, value: Tensor) -> Tensor:
        return to_device(value, self.ranks.device, self.ranks.dtype)

    def _changed(self) -> Iterator[Tensor]:
        for model in (self.generator, self.student):
            yield from model.parameters()
            yield from model.buffers()
        for player in self.players.values():
            yield from player.state()
        yield from (self.images, self.logits, self.delta, *self.attention, *self.drafts)


def _layers(net: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The groups' maps of a WideResNet, [] for another network, and the logits (B, C)."""
    return net.layers(images) if isinstance(net, WideResNet) else ([], net(images))
