"""What a method's build() is given by `dist-defend plan`: nothing is started, no weights and no images are read."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dist_defend.batch import Batch
from dist_defend.data.augment import View
from dist_defend.data.loader import DatasetConfig, select_rows
from dist_defend.data.manifest import FORMAT, Manifest
from dist_defend.data.order import rank_slice
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Place
from dist_defend.models.artifact import ModelCard, load_classifier, load_simclr
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR

IMAGES, CLASSES, PIXELS = 1_281_167, 1000, 224  # ImageNet's, of a data set that is not here


class _Agreeable(TorchDispatchMode):
    """Whoever asks for the content of a tensor hears yes, or zero."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_world(count: int, dtype: torch.dtype) -> Iterator[None]:
    """Tensors have no content; there are so many ranks, of which this is rank 0, and their collectives do nothing.

    Weights are made on the device and in the dtype that they are wanted in: moving those of a module is not possible.
    """
    plain_to, plain_dtype = nn.Module.to, torch.get_default_dtype()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    torch.set_default_dtype(dtype)
    nn.Module.to = lambda module, *where, **how: module  # type: ignore[method-assign, assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Agreeable():
            yield
    finally:
        nn.Module.to = plain_to  # type: ignore[method-assign]
        torch.set_default_dtype(plain_dtype)
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class PretendedAccelerator:
    """What Ranks and Replicated read of Accelerate's on rank 0."""

    num_processes: int
    is_half: bool
    process_index: int = 0
    is_main_process: bool = True
    mixed_precision: str = "no"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_half)

    def prepare(self, objective: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        plain: Callable[..., Any] = objective.forward

        def forward(*inputs: Any) -> Any:
            with self.autocast():
                return plain(*inputs)

        objective.forward = forward
        return objective, optimizer


class Unseen(PreparedDataset):
    """Stands for a data set that is not here: as many images as ImageNet."""

    def __init__(self, path: str, num_classes: int, size: int) -> None:
        self.path, self.beton, self.resize, self.size, self.image_shape = Path(path), None, None, size, (size, size, 3)
        self.num_classes, self.classes = num_classes, tuple(map(str, range(num_classes)))
        self.labels = np.arange(IMAGES) % num_classes
        counts = tuple(np.bincount(self.labels).tolist())
        self.manifest = Manifest(
            FORMAT, path, "none", IMAGES, self.classes, counts, self.image_shape, "raw", None, None, {}
        )


class PretendedLoader:
    """This rank's share of one batch, whatever the epoch."""

    def __init__(
        self, shapes: list[tuple[int, int, int]], num_samples: int, batch_size: int, share: int, dtype: Any
    ) -> None:
        self.shapes, self.share, self.dtype = shapes, share, dtype
        self.num_samples, self.batch_size, self.num_batches = num_samples, batch_size, -(-num_samples // batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        views = tuple(torch.rand(self.share, *shape, dtype=self.dtype) for shape in self.shapes)
        yield Batch(views, torch.zeros(self.share, dtype=torch.int64), torch.arange(self.share))


@dataclass
class PretendedContext(Context):
    """Remembers what was asked for."""

    has_content: ClassVar[bool] = False
    models: list[SimCLR | Classifier] = field(default_factory=list)  # loaded
    unseen: dict[str, Unseen] = field(default_factory=dict)  # data sets that are not here, by path
    mapped: int = 0  # bytes on disk

    def dataset(
        self, role: str, config: DatasetConfig, is_labelled: bool = False
    ) -> tuple[PreparedDataset, np.ndarray]:
        if os.path.isfile(Path(config.path) / "manifest.json"):
            return super().dataset(role, config, is_labelled)
        size = config.resize or (self.models[0].image_size if self.models else PIXELS)
        num_classes = getattr(self.models[0], "num_classes", CLASSES) if self.models else CLASSES
        dataset = self.unseen.setdefault(config.path, Unseen(config.path, num_classes, size))
        return dataset, select_rows(dataset, config, self.seed)

    def room(self, shape: Sequence[int], place: Place) -> Tensor:
        room = super().room(shape, "memory")
        self.mapped += room.nbytes if place == "disk" else 0
        return room

    def load_encoder(self, folder: str) -> tuple[SimCLR, ModelCard, str]:
        model, card = load_simclr(folder, has_weights=False)
        self.models.append(model)
        return model, card, ""

    def load_classifier(self, folder: str) -> tuple[Classifier, ModelCard, str]:
        model, card = load_classifier(folder, has_weights=False)
        self.models.append(model)
        return model, replace(card, attack=None), ""  # which only serves to measure

    def _loader(
        self, dataset: PreparedDataset, rows: np.ndarray | None, batch_size: int, views: Sequence[View], **how: Any
    ) -> Any:
        num_samples = len(dataset) if rows is None else len(rows)
        at_once = batch_size if how.get("drop_last") else min(batch_size, num_samples)
        own = rank_slice(at_once, 0, how.get("world_size", self.ranks.world_size))
        shapes = [_view_shape(view, dataset) for view in views]
        return PretendedLoader(shapes, num_samples, batch_size, own.stop - own.start, self.ranks.dtype)


def _view_shape(view: View, dataset: PreparedDataset) -> tuple[int, int, int]:
    """(3, H, W) of a view; of images that differ in size and are not cropped, ImageNet's usual ones."""
    height, width = (dataset.image_shape or (PIXELS, PIXELS))[:2] if view.image is None else view.image.shape[:2]
    return 3, *view.augment.output_shape(height, width)
