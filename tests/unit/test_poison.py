"""Which rows are poisoned, their labels, and the data sets that stamp them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.attacks.attack import AttackConfig, attack_from, backdoor_labels
from dist_defend.attacks.patterns import BadNets, Blended, Bpp, LabelConsistent, Sig, WaNet
from dist_defend.attacks.poison import CROSS, STAMPED, PoisonedDataset, drawn_rows, poisoned, triggered
from dist_defend.attacks.stamping import to_images
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError
from tests.runs import make_data

LABELS = np.arange(1000) % 10
ROWS = np.arange(1000)


def choose(labels: np.ndarray = LABELS, rows: np.ndarray = ROWS, seed: int = 1, **options: Any) -> np.ndarray:
    return drawn_rows(labels, rows, AttackConfig(BadNets(), **options), 10, seed)[0]


def dataset_of(folder: Path, count: int = 40, size: int = 8) -> PreparedDataset:
    return open_dataset(make_data(folder / "data", count, size=size))


def test_rate_and_count_say_how_many() -> None:
    assert len(choose()) == 100 and len(choose(rate=0.29)) == 290 and len(choose(rate=0.0)) == 0
    assert len(choose(count=7)) == 7 and len(choose(count=0)) == 0
    assert len(choose(rows=ROWS[::2], rate=0.01)) == 5
    chosen = choose(rate=0.5)
    assert (np.diff(chosen) > 0).all() and chosen.dtype == np.int64


def test_the_draw_is_seeded_and_stays_within_the_rows() -> None:
    assert np.array_equal(choose(), choose()) and not np.array_equal(choose(), choose(seed=2))
    among = ROWS[500:]
    assert set(choose(rows=among)) <= set(among)


def test_which_classes_are_eligible() -> None:
    assert set(LABELS[choose(rate=0.3)]) == set(range(10))
    assert set(LABELS[choose(rate=0.3, avoid_target=True, target_class=4)]) == set(range(10)) - {4}
    assert set(LABELS[clean_label(rate=0.05)]) == {3}
    assert np.array_equal(clean_label(rate=0.1), np.flatnonzero(LABELS == 3))


def test_the_first_eligible_images_can_be_chosen() -> None:
    chosen = choose(rate=0.05, avoid_target=True, target_class=4, choose="first")
    assert np.array_equal(chosen, np.flatnonzero(LABELS != 4)[:50])
    assert np.array_equal(choose(rows=ROWS[::-1][:30], count=2, choose="first"), [998, 999])
    assert np.array_equal(clean_label(count=3, choose="first"), [3, 13, 23])


def clean_label(**options: Any) -> np.ndarray:
    config = AttackConfig(Sig(), labels="clean_label", target_class=3, **options)
    return drawn_rows(LABELS, ROWS, config, 10, 1)[0]


def test_what_cannot_be_chosen_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"key 'rate' is 0.11, so 110 of 1000 images, but only 100 are in the target"):
        clean_label(rate=0.11)
    with pytest.raises(UserError, match=r"key 'count' is 101, so 101 .* only 100 are in the target class; lower it"):
        clean_label(count=101)
    with pytest.raises(UserError, match=r"key 'count' is 901, .* but only 900 are to choose from"):
        choose(count=901, avoid_target=True)
    with pytest.raises(UserError, match=r"key 'rate' is 0.0001, which is no image of 1000"):
        choose(rate=0.0001)
    with pytest.raises(UserError, match="key 'target_class' is 10; the classes are 0 to 9"):
        choose(target_class=10)
    with pytest.raises(UserError, match="key 'shift' is 20, which maps each of the 10 classes to itself"):
        drawn_rows(LABELS, ROWS, AttackConfig(BadNets(), labels="all_to_all", shift=20), 10, 1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rate": 1.1}, "rate"),
        ({"rate": -0.1}, "rate"),
        ({"count": -1}, "count"),
        ({"target_class": -1}, "target_class"),
        ({"avoid_target": True, "labels": "all_to_all"}, "avoid_target"),
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"^key '{key}' is "):
        AttackConfig(BadNets(), **options)


def test_backdoor_labels_of_arrays_and_tensors() -> None:
    one = AttackConfig(BadNets(), target_class=2)
    every = AttackConfig(BadNets(), labels="all_to_all", shift=3)
    clean = AttackConfig(BadNets(), labels="clean_label", target_class=2)
    labels = np.array([0, 2, 9])
    assert backdoor_labels(labels, one, 10).tolist() == backdoor_labels(labels, clean, 10).tolist() == [2, 2, 2]
    assert backdoor_labels(torch.from_numpy(labels), every, 10).tolist() == [3, 5, 2]
    assert backdoor_labels(torch.from_numpy(labels), one, 10).dtype is torch.int64


def test_a_training_set_is_stamped_where_flagged_and_nowhere_else(tmp_path: Path) -> None:
    clean = dataset_of(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    config = AttackConfig(BadNets(), target_class=1, rate=0.5)
    rows = np.arange(4, 40)
    made = poisoned(clean, rows, config, seed=3)
    flagged = np.flatnonzero(made.flags)
    assert np.array_equal(flagged, drawn_rows(clean.labels, rows, config, 3, 3)[0]) and len(flagged) == 18
    images, untouched = made.images(np.arange(40)), clean.images(np.arange(40))
    expected = untouched.copy()
    expected[flagged, -3:, -3:] = 255
    assert (images == expected).all()
    relabelled = clean.labels.copy()
    relabelled[flagged] = 1
    assert (made.labels == relabelled).all() and (made.labels != clean.labels).any()
    backwards = np.arange(39, -1, -1)
    assert (made.images(backwards) == expected[::-1]).all()
    assert all((made.image(int(row)) == expected[row]).all() for row in (flagged[0], 0))
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == files


def test_clean_labels_stay_and_adversarial_images_are_the_base(tmp_path: Path) -> None:
    clean = dataset_of(tmp_path, size=32)
    adversarial = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "adv.npy", adversarial)
    trigger = LabelConsistent(amplitude=0.5, adversarial=str(tmp_path / "adv.npy"))
    config = AttackConfig(trigger, labels="clean_label", count=6)
    made = poisoned(clean, np.arange(40), config, seed=0)
    flagged = np.flatnonzero(made.flags)
    assert (made.labels == clean.labels).all() and (clean.labels[flagged] == 0).all() and len(flagged) == 6
    corner = np.array([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])[None, :, :, None]
    expected = np.clip(adversarial[flagged, :3, :3] + 127.5 * corner, 0, 255).astype(np.uint8)
    assert (made.images(flagged)[:, :3, :3] == expected).all()
    assert (made.images(flagged)[:, 10:20] == adversarial[flagged, 10:20]).all()
    test = triggered(clean, config)
    assert (test.images(flagged)[:, 10:20] == clean.images(flagged)[:, 10:20]).all()


def test_a_test_set_is_stamped_whole_and_keeps_its_labels(tmp_path: Path) -> None:
    clean = dataset_of(tmp_path, count=300)
    made = triggered(clean, AttackConfig(BadNets(), target_class=1))
    images = made.images(np.arange(300))
    assert (images[:, -3:, -3:] == 255).all() and (images[:, :5] == clean.images(np.arange(300))[:, :5]).all()
    assert (made.labels == clean.labels).all() and (made.flags == STAMPED).all()
    assert (made.path, made.digest, len(made), made.num_classes) == (clean.path, clean.digest, 300, 3)


@pytest.mark.parametrize(("trigger", "ratio"), [(WaNet(), 2), (Bpp(), 1), (Bpp(cross_ratio=0.5), 0.5)])
def test_cross_samples_carry_another_trigger_and_their_label(tmp_path: Path, trigger: Any, ratio: float) -> None:
    clean = dataset_of(tmp_path)
    made = poisoned(clean, np.arange(40), AttackConfig(trigger, target_class=1), seed=3)
    crossed, stamped = np.flatnonzero(made.flags == CROSS), np.flatnonzero(made.flags == STAMPED)
    assert len(stamped) == 4 and len(crossed) == 4 * ratio
    assert (made.labels[crossed] == clean.labels[crossed]).all() and (made.labels[stamped] == 1).all()
    images, all_stamped = made.images(np.arange(40)), triggered(clean, AttackConfig(trigger)).images(np.arange(40))
    untouched = clean.images(np.arange(40))
    assert (images[stamped] == all_stamped[stamped]).all()
    for row in crossed:
        assert (images[row] != all_stamped[row]).any() and (images[row] != untouched[row]).any()
    assert (images[made.flags == 0] == untouched[made.flags == 0]).all()
    assert (made.images(crossed[::-1]) == images[crossed][::-1]).all()


def test_too_many_cross_samples_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key 'cross_ratio' is 2.0: 40 images, but 20 are left; lower it"):
        poisoned(dataset_of(tmp_path), np.arange(40), AttackConfig(WaNet(), rate=0.5), seed=0)


@pytest.mark.parametrize("backend", ["resident", "torch", "auto"])
@pytest.mark.parametrize("storage", ["npy", "beton"])
def test_every_back_end_reads_stamped_images(tmp_path: Path, backend: Any, storage: str) -> None:
    clean = open_dataset(make_data(tmp_path / "data", 12, storage=storage, size=8))
    made = poisoned(clean, np.arange(12), AttackConfig(Blended(), rate=0.5), seed=0)
    loader = make_loader(made, config=LoaderConfig(backend=backend, workers=1), batch_size=5)
    batches = list(loader.epoch(0))
    assert loader.backend != "ffcv"
    images = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(images, to_images(made.images(np.arange(12))))
    assert torch.cat([batch.labels for batch in batches]).tolist() == made.labels.tolist()
    loader.close()


def test_data_without_one_square_size_are_a_user_error(tmp_path: Path) -> None:
    oblong = np.zeros((4, 8, 6, 3), np.uint8)
    write_dataset(ArraySource(oblong, np.zeros(4, int), ["a"]), tmp_path / "d", name="d", split="s", storage="npy")
    with pytest.raises(UserError, match=r"a trigger needs square images of one size; prepare it with --image-size"):
        triggered(open_dataset(tmp_path / "d"), AttackConfig(BadNets()))


def test_a_model_card_gives_the_attack_back() -> None:
    for trigger in (BadNets(size=4, margin=1), WaNet(cells=6), LabelConsistent(adversarial="a.npy"), Bpp()):
        config = AttackConfig(trigger, labels="clean_label", count=3)
        assert attack_from(asdict(config)) == config
    for wrong in ({}, {"trigger": {"name": "nashville"}}, {"trigger": {"name": "badnets", "colour": 1}}):
        with pytest.raises(UserError, match="attack is none that this version has") as error:
            attack_from(wrong)
        assert "\n" not in str(error.value)


def test_a_trigger_without_wrong_triggers_has_no_cross_samples(tmp_path: Path) -> None:
    made = poisoned(dataset_of(tmp_path), np.arange(40), AttackConfig(Blended()), seed=0)
    assert isinstance(made, PoisonedDataset) and set(made.flags) == {0, STAMPED}
