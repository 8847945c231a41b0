"""PatchSearch (Tejankar et al., CVPR 2023), its search: find images with a trigger in unlabelled training data.

The patch of an image is the window with the largest Grad-CAM sum for the image's cluster. Its score is the number of
test images in that cluster with the patch pasted on them, minus the number without. A trigger moves most of them.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.attack import attack_from, trigger_of
from dist_defend.attacks.poison import STAMPED, PoisonedDataset, image_size_of
from dist_defend.bounds import at_least_one
from dist_defend.counts import extract_features, unit_features
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.dist import Ranks
from dist_defend.errors import UserError
from dist_defend.files import sha256_file, write_atomic
from dist_defend.inside import cam
from dist_defend.methods.pictures import save_grid
from dist_defend.models.artifact import ModelCard
from dist_defend.models.pixel_space import Encoder
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.streams import Stream, draws

log = logging.getLogger(__name__)
_ITERATIONS = 20  # of k-means
_TOP = (5, 10, 20, 50, 100)  # numbers of best images at which precision is measured


@dataclass(frozen=True)
class Config:
    """Defaults are the published ones, except window, which is ours, for images of CIFAR's size.

    Keys:
        encoder: model folder of the encoder that was trained on the data
        data: the images to search; labels are not read
        poisoned_rows: file of the rows that the encoder's training stamped; null: poisoned_rows.npy beside the model
            folder, if there is one. The search gets these rows stamped again by the card's trigger, as prepared data
            are clean, but not their numbers, which only serve to measure precision
        clusters: number of k-means clusters of all images
        num_test: number of test images that patches are pasted on, the same for each cluster, at least one
        window: side of a patch in pixels
        per_round: number of images of each cluster that are scored in a round
        drop: share of the clusters, those of lowest score, that each round drops
        num_patches: number of best patches that are kept
        batch_size: images of a forward pass, on each rank
    """

    encoder: str
    data: DatasetConfig
    poisoned_rows: str | None = None
    clusters: int = 1000
    num_test: int = 1000
    window: int = 10
    per_round: int = 2
    drop: float = 0.25
    num_patches: int = 100
    batch_size: int = 256

    def __post_init__(self) -> None:
        at_least_one(self, "num_test", "window", "per_round", "num_patches", "batch_size")
        if self.clusters < 2:
            raise ValueError(f"key 'clusters' is {self.clusters}; it must be at least 2")
        if not 0 < self.drop < 1:
            raise ValueError(f"key 'drop' is {self.drop}; it must be above 0 and below 1")


PRESETS: dict[str, dict[str, Any]] = {"cifar10": {}, "imagenet": {"window": 60}}


def cluster(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of unit features (N, D) -> its normalised means (K, D), and the most similar mean of each image (N,)."""
    from sklearn.cluster import KMeans  # imported here: it costs a second

    features = features.cpu()
    search = KMeans(count, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed)
    labels = torch.from_numpy(search.fit_predict(features.numpy())).long()
    sums = torch.zeros(count, features.shape[1], dtype=features.dtype).index_add_(0, labels, features)
    means = functional.normalize(sums, dim=1)
    return means, torch.cat([(some @ means.T).argmax(1) for some in features.split(4096)])


def nearest(features: Tensor, means: Tensor, assigned: Tensor, each: int) -> Tensor:
    """Places (T,) of the images of each cluster that are most similar to its mean, ``each`` at most."""
    similarity = (features * means[assigned]).sum(1)
    order = similarity.argsort(descending=True, stable=True)
    return torch.cat([order[assigned[order] == number][:each] for number in range(len(means))])


def largest_windows(heat: Tensor, window: int) -> Tensor:
    """Upper left corners (B, 2), row and column, of the squares inside of heat (B, H, W) with the largest sum.

    The first one in reading order where several have it.
    """
    rows = functional.avg_pool2d(heat.double()[:, None], (window, 1), 1)
    found = functional.avg_pool2d(rows, (1, window), 1)[:, 0]
    best = found.flatten(1).argmax(1)
    return torch.stack([best // found.shape[2], best % found.shape[2]], 1)


def cut(images: Tensor, corners: Tensor, window: int) -> Tensor:
    """The squares (B, C, w, w) of images (B, C, H, W) with these upper left corners (B, 2)."""
    pairs = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, top : top + window, left : left + window] for image, (top, left) in pairs])


def paste(images: Tensor, patch: Tensor, places: Tensor) -> Tensor:
    """Images (B, C, H, W) with the patch (C, w, w) on each, its upper left corner at places (B, 2)."""
    along = torch.arange(patch.shape[-1], device=images.device)
    rows, columns = (places[:, axis, None] + along for axis in (0, 1))
    number, channel = (torch.arange(size, device=images.device) for size in images.shape[:2])
    made = images.clone()
    made[number[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]] = patch
    return made


def search(assigned: np.ndarray, config: Config, seed: int, rate: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Scores (N,) of the images with these clusters (N,); nan for those never scored.

    rate: places of images (M,) -> their scores (M,).
    """
    queues = {
        number: draws(seed, Stream.PATCH_SEARCH, 0, number).permutation(np.flatnonzero(assigned == number))
        for number in np.unique(assigned).tolist()
    }
    scores, candidates, start = np.full(len(assigned), np.nan), list(queues), 0
    while candidates:
        popped = [queues[number][start : start + config.per_round] for number in candidates]
        images = np.concatenate(popped)
        if not len(images):
            break
        scores[images] = rate(images)
        start += config.per_round
        best = {number: np.nan_to_num(scores[queues[number]]).max() for number in candidates}  # unscored is 0
        dropped = int(config.drop * len(candidates))
        log.info(
            "%d clusters, %d images scored; best %g", len(candidates), (~np.isnan(scores)).sum(), np.nanmax(scores)
        )
        candidates = sorted(candidates, key=lambda number: -best[number])[: len(candidates) - dropped]
        if not dropped:
            break
    return scores


class Scorer:
    """Scores images by the effect of their patches on test images (T, 3, H, W) uint8 of their_clusters (T,)."""

    def __init__(self, encoder: Encoder, means: Tensor, tests: Tensor, their_clusters: Tensor, ranks: Ranks) -> None:
        self.encoder, self.ranks = encoder.to(ranks.device, ranks.dtype).eval().requires_grad_(False), ranks
        self.means, self.tests = means.to(ranks.device, ranks.dtype), tests.to(ranks.device)
        self.before = torch.bincount(their_clusters, minlength=len(means)).tolist()

    def heat(self, image: Tensor, number: int) -> Tensor:
        """Grad-CAM (1, H, W) of the image's (1, 3, H, W) logit: raw features times the cluster's unit mean.

        Not the cosine, whose gradient at the trigger is negative for an image that has more of it than the mean.
        """
        with torch.enable_grad():
            maps, features = self.encoder.layers(image.detach().requires_grad_())
            last = next((each for each in reversed(maps) if each.shape[2:].numel() > 1), maps[-1])
            logit = features @ self.means[number]
            (slope,) = torch.autograd.grad(logit.sum(), last, allow_unused=True)
        if slope is None:
            raise UserError("key 'patch_search.encoder' names a network whose features come from no map: use another")
        return cam(slope, last, image.shape[2:])

    @torch.no_grad()
    def __call__(
        self, image: Tensor, number: int, places: Tensor, window: int, batch_size: int
    ) -> tuple[int, list[int]]:
        """Score of an image (3, H, W) uint8 and corner of its patch. places: (T, 2), where each test image gets it."""
        image = self.as_pixels(image[None])
        corner = largest_windows(self.heat(image, number), window)
        patch, hits = cut(image, corner, window)[0], torch.zeros((), dtype=torch.long, device=image.device)
        for tests, some in zip(self.tests.split(batch_size), places.split(batch_size), strict=True):
            pasted = paste(self.as_pixels(tests), patch, some.to(image.device))
            hits += ((unit_features(self.encoder, pasted, self.ranks) @ self.means.T).argmax(1) == number).sum()
        return int(hits) - self.before[number], corner[0].tolist()

    def as_pixels(self, images: Tensor) -> Tensor:
        return images.to(self.ranks.device).to(self.ranks.dtype) / 255


def as_trained_on(
    config: Config, card: ModelCard, dataset: PreparedDataset, context: Context
) -> tuple[PreparedDataset, np.ndarray | None]:
    """The images that the encoder's training saw, and which rows (N,) bool it stamped; None if that is unknown.

    UserError for rows of another run, and of other data than these.
    """
    wanted = card.provenance.get("poisoned_rows_sha256")
    file = Path(config.poisoned_rows or Path(config.encoder).parent / "poisoned_rows.npy")
    if config.poisoned_rows is None and not (wanted and file.is_file()):
        if wanted:
            context.tell(f"{file} is missing: the images are searched without the trigger that {config.encoder} saw")
        return dataset, None
    if not file.is_file() or sha256_file(file) != wanted or card.attack is None:
        raise UserError(f"key 'patch_search.poisoned_rows': {file} is not what the card of {config.encoder} tells of")
    if card.provenance.get("data", {}).get("train") != dataset.digest:
        raise UserError(f"{config.encoder} was trained on other data than {config.data.path}: search those")
    options, size = trigger_of(attack_from(card.attack)), image_size_of(dataset)
    flags = np.zeros(len(dataset), np.uint8)
    flags[np.load(file, allow_pickle=False)] = STAMPED
    base = options.base_images(dataset.num_source_rows, size)
    return PoisonedDataset(dataset, options.build_training(size), flags, base=base), flags == STAMPED


def build(config: Config, context: Context) -> Plan:
    """No stage: features, clusters, rounds and files are made with the result."""
    model, card, sha256 = context.load_encoder(config.encoder)
    dataset, rows = context.dataset("train", config.data)
    size, ranks = model.image_size, context.ranks
    if dataset.image_shape != (size, size, 3):
        raise UserError(
            f"{config.data.path} has images of {dataset.image_shape}, but {config.encoder} wants {size} px: prepare it "
            f"with --image-size {size}, or say 'resize: {size}' beside its path"
        )
    if config.window >= size:
        raise UserError(f"key 'patch_search.window' is {config.window}; images have {size} px, it must be smaller")
    if config.clusters > len(rows):
        raise UserError(f"key 'patch_search.clusters' is {config.clusters}, but there are {len(rows)} images: lower it")
    images, is_poisoned = as_trained_on(config, card, dataset, context)

    def pixels(places: np.ndarray) -> Tensor:
        return torch.from_numpy(images.images(rows[places])).permute(0, 3, 1, 2)

    def result() -> dict[str, Any]:
        encoder: nn.Module = model.f.to(ranks.device, ranks.dtype)
        features = extract_features(encoder, context.eval_loader(images, rows), ranks)[0].cpu()
        means, assigned, tests = clustered(features, config, context)
        scorer = Scorer(model.f, means, pixels(tests.numpy()), assigned[tests], ranks)
        corners = torch.zeros(len(rows), 2, dtype=torch.long)

        def rate(places: np.ndarray) -> np.ndarray:
            """Each rank scores its share of the images."""
            found = torch.zeros(len(places), 3, dtype=torch.long, device=ranks.device)
            for own in range(ranks.rank, len(places), ranks.world_size):
                place = places[own]
                drawn = draws(context.seed, Stream.PATCH_SEARCH, 1, int(rows[place]))
                pasted = torch.from_numpy(drawn.integers(0, size - config.window, (len(tests), 2)))
                image, number = pixels(places[own : own + 1])[0], int(assigned[place])
                score, corner = scorer(image, number, pasted, config.window, config.batch_size)
                found[own] = torch.tensor([score, *corner])
            found = all_reduce_sum(found).cpu()
            corners[places] = found[:, 1:]
            return found[:, 0].double().numpy()

        scores = search(assigned.numpy(), config, context.seed, rate)
        ranking = np.argsort(-scores, kind="stable")[: int((~np.isnan(scores)).sum())]  # nan is last
        if ranks.is_main:
            kept = ranking[: config.num_patches]
            patches = cut(pixels(kept), corners[kept], config.window)
            content = io.BytesIO()
            np.savez(
                content, rows=rows[ranking], scores=scores[ranking].astype(np.int64),
                clusters=assigned.numpy()[ranking], corners=corners.numpy()[ranking],
                patches=patches.permute(0, 2, 3, 1).numpy(),
            )  # fmt: skip
            write_atomic(context.folder / "suspects.npz", content.getvalue())
            save_grid(context.folder / "found.png", patches / 255, columns=10)
        metrics: dict[str, Any] = {
            "num_scored": len(ranking),
            "num_test": len(tests),
            "best_score": int(scores[ranking[0]]),
        }
        if is_poisoned is not None:
            hits = is_poisoned[rows[ranking]]
            metrics["precision"] = {str(top): float(hits[:top].mean()) for top in _TOP if top <= len(hits)}
            metrics["poisoned_share"] = float(is_poisoned[rows].mean())
            if ranks.is_main:
                told = ", ".join(f"{share:.0%} of the best {top}" for top, share in metrics["precision"].items())
                log.info("poisoned: %s; %.2g of all images", told, metrics["poisoned_share"])
        return {"suspect": {"folder": config.encoder, "sha256": sha256}, "metrics": metrics}

    return Plan([], result)


def clustered(features: Tensor, config: Config, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Means, clusters and places of test images, found by the main rank and sent to the others."""
    found: list[Any] = [None]
    if context.ranks.is_main:
        means, assigned = cluster(features, config.clusters, context.seed)
        found = [(means, assigned, nearest(features, means, assigned, max(1, config.num_test // config.clusters)))]
    if context.ranks.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    means, assigned, tests = found[0]
    return means, assigned, tests
