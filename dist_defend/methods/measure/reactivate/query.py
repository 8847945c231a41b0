"""Query-based re-activation (Min et al. 2024): a small change of each image brings the backdoor back; weights stay.

    x' = clip(x + eps a(x), 0, 1),   L = w KL(softmax g(x) || softmax h(x')) + CE(c(x'), y)

a is an MLP that ends in tanh; h the model as it is, g the same after re-tuning, c the control, y the true label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.bounds import positive
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig


@dataclass(frozen=True)
class QueryConfig:
    """Defaults are those of AISafety-HKUST/stable_backdoor_purification.

    Keys:
        eps: largest change of a pixel in [0, 1]
        weight: weight w of the divergence from the re-tuned network
        hidden: widths of the perturbation network's hidden layers
        update: batch size, epochs, optimizer and the like
    """

    eps: float = 16 / 255
    weight: float = 0.2
    hidden: tuple[int, ...] = (1024, 1024, 1024)
    update: UpdateConfig = UpdateConfig(
        batch_size=128, epochs=50, optimizer=OptimizerConfig("sgd", lr=0.1, momentum=0.9)
    )

    def __post_init__(self) -> None:
        positive(self, "eps", "weight")
        if self.update.accumulation != 1:
            raise ValueError(f"key 'update.accumulation' is {self.update.accumulation}; it must be 1")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"key 'hidden' is {list(self.hidden)}; a layer needs at least one unit")


class Perturbation(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> the same, changed by eps at most; the MLP sees them normalised and flat."""

    def __init__(self, normalize: nn.Module, image_size: int, config: QueryConfig) -> None:
        super().__init__()
        pixels = 3 * image_size**2
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((pixels, *config.hidden, pixels)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.normalize, self.eps, self.mlp = normalize, config.eps, nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        change: Tensor = self.mlp(self.normalize(images).flatten(1)).view_as(images)
        return (images + self.eps * change).clamp(0, 1)


class QueryObjective(Objective):
    """The mean of L (see the module) over the global batch; the ranks' shares may differ in size.

    networks: h, g and c, in eval mode, which are not trained. start: called once, before they are first used.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        networks: tuple[nn.Module, nn.Module, nn.Module],
        weight: float,
        ranks: Ranks,
        start: Callable[[], None],
    ) -> None:
        super().__init__()
        self.perturbation = perturbation
        self._networks, self.weight, self.world_size, self.start = networks, weight, ranks.world_size, start
        self.is_ready = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not self.is_ready:
            self.start()
            self.is_ready = True
        model, woken, control = (network.eval().requires_grad_(False) for network in self._networks)
        changed = self.perturbation(batch.images)
        wanted = at_least_float32(woken(batch.images)).softmax(1)
        said = at_least_float32(model(changed)).log_softmax(1)
        divergence = functional.kl_div(said, wanted, reduction="sum")
        truth = functional.cross_entropy(at_least_float32(control(changed)), batch.labels, reduction="sum")
        count = torch.full((), float(len(batch.labels)), device=changed.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(count)
        terms = {"loss": self.weight * divergence + truth, "divergence": divergence, "cross_entropy": truth}
        return {name: term * self.world_size / count for name, term in terms.items()}
