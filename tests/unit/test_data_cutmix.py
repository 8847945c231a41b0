"""CutMix: which box, how often, whose pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data import cutmix
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.cutmix import CutMixConfig, CutMixLoader, Mix, draw_mix, mixed
from dist_defend.data.loader import Loader, LoaderConfig, make_loader
from dist_defend.data.store import open_dataset
from tests.runs import make_data

SIZE = 32
ALWAYS = CutMixConfig()


def mixes(count: int = 2000, config: CutMixConfig = ALWAYS) -> list[Mix]:
    return [draw_mix(config, SIZE, 4, 0, 0, number) for number in range(count)]


def share(mix: Mix) -> float:
    return (mix.bottom - mix.top) * (mix.right - mix.left) / SIZE**2


def loader_of(folder: Path, views: tuple[View, ...] = (View(),)) -> Loader:
    data = open_dataset(make_data(folder / "data", 12))
    return make_loader(
        data, config=LoaderConfig("resident", 1), batch_size=4, views=views, shuffle=True, drop_last=True
    )


def test_the_changed_share_is_the_boxs_area() -> None:
    images = torch.rand(4, 3, SIZE, SIZE, dtype=torch.float64)
    for mix in mixes(20):
        result = mixed(images, images[torch.from_numpy(mix.partners)], mix)
        changed = (result != images).any(1).flatten(1).double().mean(1)
        moved = torch.from_numpy(mix.partners != np.arange(4))
        assert torch.equal(changed, torch.where(moved, share(mix), 0.0).double())
        inside = (..., slice(mix.top, mix.bottom), slice(mix.left, mix.right))
        assert torch.equal(result[inside], images[torch.from_numpy(mix.partners)][inside])


def test_boxes_are_squares_of_beta_distributed_area_around_a_uniform_centre() -> None:
    drawn = mixes()
    whole = [m for m in drawn if min(m.top, m.left) > 0 and max(m.bottom, m.right) < SIZE]
    assert len(whole) > 300 and all(m.bottom - m.top == m.right - m.left for m in whole)
    assert all(0 <= m.top <= m.bottom <= SIZE and 0 <= m.left <= m.right <= SIZE for m in drawn)
    # The reference draws the same way, without looking at the code: cut at the border, sides int(sqrt(1 - lambda) W).
    random = np.random.default_rng(9)
    sides = (np.sqrt(1 - random.beta(0.25, 0.25, 100_000)) * SIZE).astype(int) // 2
    centres = random.integers(SIZE, size=(2, len(sides)))
    lengths = np.minimum(centres + sides, SIZE) - np.maximum(centres - sides, 0)
    assert np.mean([share(m) for m in drawn]) == pytest.approx((lengths[0] * lengths[1]).mean() / SIZE**2, abs=0.02)
    # Beta(1/4, 1/4) is bimodal: a fifth of the boxes are almost nothing, Beta(4, 4) has none of these.
    assert np.mean([share(m) < 0.01 for m in drawn]) > 0.15
    assert np.mean([share(m) < 0.01 for m in mixes(500, CutMixConfig(beta=4.0))]) < 0.02


def test_probability_and_seeds() -> None:
    half = mixes(1000, CutMixConfig(probability=0.5))
    assert 0.35 < np.mean([share(m) > 0 for m in half]) / np.mean([share(m) > 0 for m in mixes(1000)]) < 0.65
    assert all(share(m) == 0 for m in mixes(50, CutMixConfig(probability=0.0)))
    first, again = (draw_mix(ALWAYS, SIZE, 64, 1, 2, 3) for _ in range(2))
    assert first.top == again.top and np.array_equal(first.partners, again.partners)
    others = [draw_mix(ALWAYS, SIZE, 64, *place) for place in ((0, 2, 3), (1, 1, 3), (1, 2, 2))]
    assert all(not np.array_equal(first.partners, other.partners) for other in others)
    assert sorted(first.partners) == list(range(64))


@pytest.mark.parametrize(("key", "value"), [("probability", 1.5), ("beta", 0.0)])
def test_values_that_mean_nothing_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"key '{key}'"):
        CutMixConfig(**{key: value})


def test_a_loaders_batches_are_mixed_and_resume(tmp_path: Path) -> None:
    plain = loader_of(tmp_path, (View(AugmentConfig(crop="pad", flip=0.5)),))
    loader = CutMixLoader(plain, ALWAYS, seed=5)
    whole = list(loader.epoch(1))
    for number, (batch, clean) in enumerate(zip(whole, plain.epoch(1), strict=True)):
        mix = draw_mix(ALWAYS, 16, 4, 5, 1, number)
        expected = mixed(clean.images, clean.images[torch.from_numpy(mix.partners)], mix)
        assert torch.equal(batch.images, expected) and torch.equal(batch.index, clean.index)
    assert any(not torch.equal(batch.images, clean.images) for batch, clean in zip(whole, plain.epoch(1), strict=True))
    assert same(list(loader.epoch(1, 2)), whole[2:])


def test_the_comparison_notices_a_mix_that_forgets_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CutMixLoader(loader_of(tmp_path), ALWAYS, seed=5)
    whole = list(loader.epoch(1))
    monkeypatch.setattr(cutmix, "draw_mix", lambda *given: draw_mix(*(*given[:-1], given[-1] - 2)))
    assert not same(list(loader.epoch(1, 2)), whole[2:])


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = [(a.images, b.images) for a, b in zip(left, right, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)
