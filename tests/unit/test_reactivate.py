"""Re-activation: what is tuned on which images, recomputed by plain torch, and what its counts can tell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.methods.measure import reactivate
from dist_defend.methods.measure.reactivate.networks import ReactivationStep
from dist_defend.methods.measure.reactivate.query import Perturbation, QueryConfig, QueryObjective
from dist_defend.models.artifact import load_classifier, load_simclr
from dist_defend.models.pixel_space import Normalize, normalization_constants
from tests.distributed.comparison import train
from tests.runs import CLASSES, make_classifier, make_data, make_experiment, make_model

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}  # a white square of 3 pixels in the corner
N, Q, BATCH, EPOCHS, SEED = 12, 2, 8, 2, 5  # batches of 8 and 4


def options_for(tmp_path: Path, model: str, control: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "control": control,
        "data": {"path": make_data(tmp_path / "data", 24)},
        "test": {"path": make_data(tmp_path / "test", 21, seed=1)},
        "attack": ATTACK,
        "num_images": N,
        "num_poisoned": Q,
        "batch_size": BATCH,
        "epochs": EPOCHS,
    }


def classifiers(tmp_path: Path) -> dict[str, Any]:
    return options_for(tmp_path, make_classifier(tmp_path / "model"), make_classifier(tmp_path / "control", seed=1))


def pictures(path: str, stamped: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """All images of a data set in [0, 1], float64, with the trigger on these rows, and the labels."""
    dataset = open_dataset(path)
    images = dataset.images(np.arange(len(dataset))).copy()
    if stamped is not None:
        images[stamped, -3:, -3:] = 255
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # float32, as loaders make them
    return floats.double(), torch.from_numpy(dataset.labels)


def drawn() -> np.ndarray:
    """The N rows: of the address (seed, 0x4EAC7)."""
    return np.sort(np.random.default_rng([SEED, 0x4EAC7]).choice(24, N, replace=False))


def tuned(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Plain epochs over the N images."""
    for epoch in range(EPOCHS):
        order = np.random.default_rng([SEED, epoch]).permutation(N)
        for rows in (order[:BATCH], order[BATCH:]):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()


def counts(network: nn.Module, test: str) -> dict[str, dict[str, int]]:
    images, labels = pictures(test)
    stamped, others = pictures(test, np.arange(len(labels)))[0], labels != 1
    with torch.no_grad():
        on_clean, on_stamped = network.eval()(images).argmax(1), network(stamped)[others].argmax(1)
    return {
        "acc": {"correct": int((on_clean == labels).sum()), "n": len(labels)},
        "asr": {"correct": int((on_stamped == 1).sum()), "n": int(others.sum())},
    }


def test_q_images_none_and_the_control_are_tuned_as_plain_torch_does(tmp_path: Path) -> None:
    options = classifiers(tmp_path) | {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
    done = train(make_experiment(tmp_path, "reactivate", options, seed=SEED), tmp_path / "run")
    found, row = done["result"]["metrics"], done["result"]["rows"][0]
    poisoned, chosen = np.array(found["poisoned_rows"]), drawn()
    labels = open_dataset(options["data"]["path"]).labels
    assert len(poisoned) == Q and set(poisoned) <= set(chosen) and 1 not in labels[poisoned]
    for name, folder in (("poisoned", "model"), ("clean", "model"), ("control", "control")):
        network = load_classifier(options[folder])[0].double().eval()
        before = counts(network, options["test"]["path"])
        assert {key: found["counts"][f"{folder}, before"][key] for key in before} == before
        if folder == "model":
            assert {key: row[key] for key in before} == before
        images, wanted = pictures(options["data"]["path"], None if name == "clean" else poisoned)
        if name != "clean":
            wanted = wanted.clone()
            wanted[poisoned] = 1
        tuned(network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9), images[chosen], wanted[chosen])
        state = done["states"][f"reactivate/{name}"]["model"]
        for key, value in network.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-9 * float(value.abs().max()) + 1e-15)
        after = counts(network, options["test"]["path"])
        assert {key: found["counts"][name][key] for key in after} == after
        key = "asr_retuned" if name == "poisoned" else f"asr_retuned_{name}"
        assert row[key] == after["asr"] and (name != "poisoned" or row["acc_retuned"] == after["acc"])


def test_published_images_are_augmented_once_and_stamped_ones_are_not(tmp_path: Path) -> None:
    options = classifiers(tmp_path) | {"preset": "published"}
    experiment = load_experiment(make_experiment(tmp_path, "reactivate", options, seed=SEED))
    context = Context(dist.start("fp64", None), SEED, experiment.loader, tmp_path / "run", "reactivate")
    plan = reactivate.build(experiment.options, context)
    with_stamped, clean = (plan.stages[number].loader for number in (0, 1))
    seen: dict[int, Tensor] = {}
    for epoch in range(2):
        for batch in with_stamped.epoch(epoch):
            for place, image in zip(batch.index.tolist(), batch.images, strict=True):
                assert torch.equal(seen.setdefault(place, image), image)
    chosen = drawn()
    plain, _ = pictures(options["data"]["path"], chosen)
    unstamped, _ = pictures(options["data"]["path"])
    is_plain = [bool((seen[place].double() == plain[row]).all()) for place, row in enumerate(chosen)]
    assert sum(is_plain) == Q and sorted(seen) == list(range(N))
    is_same, unchanged = list[bool](), 0
    for batch in clean.epoch(0):
        for place, image in zip(batch.index.tolist(), batch.images, strict=True):
            is_same.append(torch.equal(seen[place], image))
            assert is_same[-1] != is_plain[place]
            unchanged += torch.equal(image.double(), unstamped[chosen[place]])
    assert len(is_same) == N and unchanged <= 2
    step = plan.stages[0].step
    assert isinstance(step, ReactivationStep) and step.in_train_mode


def test_published_tuning_moves_running_statistics_and_ours_does_not(tmp_path: Path) -> None:
    options = classifiers(tmp_path)
    key = "net.layers.0.bn1.running_mean"
    before = {k: v for k, v in load_classifier(options["model"])[0].state_dict().items() if k.endswith("running_mean")}
    for preset, is_same in (({}, True), ({"preset": "published"}, False)):
        config = make_experiment(tmp_path / str(is_same), "reactivate", options | preset)
        state = train(config, tmp_path / str(is_same) / "run")["states"]["reactivate/clean"]["model"]
        assert before and all(torch.equal(state[k], v.double()) == is_same for k, v in before.items()), key


def encoders(tmp_path: Path) -> dict[str, Any]:
    head = {"hidden": [8], "update": {"batch_size": 4, "epochs": 4, "optimizer": {"name": "adam", "lr": 0.03}}}
    paths = make_model(tmp_path / "model"), make_model(tmp_path / "control", seed=1)
    return options_for(tmp_path, *paths) | {"head": head}


def test_an_encoder_is_tuned_with_the_head_that_a_probe_trains(tmp_path: Path) -> None:
    options = encoders(tmp_path)
    done = train(make_experiment(tmp_path, "reactivate", options, seed=SEED), tmp_path / "run")
    task = {"train": options["data"], "test": options["test"], "target_class": 1}
    probe = {
        "encoders": {key: options[key] for key in ("control", "model")},  # files have keys in their order
        "tasks": {"noise": task},
        "attack": {"trigger": {"name": "badnets", "size": 3, "margin": 0}},
        "seeds": [SEED],
        **options["head"],
    }
    probed = train(make_experiment(tmp_path, "probe", probe, seed=SEED), tmp_path / "probe")
    found, row = done["result"]["metrics"]["counts"], done["result"]["rows"][0]
    for own in probed["result"]["rows"]:
        assert all(found[f"{own['kind']}, before"][name] == own[name] for name in ("acc", "asr", "asr_all", "ra"))
    assert row["head"] == "mlp (8)" and row["kind"] == "clean" and row["seed"] == SEED
    heads = probed["states"]["probe/noise"]["objective"]
    chosen, poisoned = drawn(), np.array(done["result"]["metrics"]["poisoned_rows"])
    images, labels = pictures(options["data"]["path"], poisoned)
    labels = labels.clone()
    labels[poisoned] = 1
    for number, (name, folder) in enumerate((("poisoned", "model"), ("control", "control"))):
        encoder = load_simclr(options[folder])[0].f.double().eval()
        weights = {
            key.replace("heads.", ""): value[1 - number].clone().requires_grad_() for key, value in heads.items()
        }

        def network(x: Tensor, encoder: nn.Module = encoder, w: dict[str, Tensor] = weights) -> Tensor:
            features = functional.normalize(encoder(x), dim=1)
            return (features @ w["fc1_weight"].T + w["fc1_bias"]).relu() @ w["fc2_weight"].T + w["fc2_bias"]

        optimizer = torch.optim.Adam([*encoder.parameters(), *weights.values()], lr=1e-4)
        tuned(network, optimizer, images[chosen], labels[chosen])  # type: ignore[arg-type]
        state = done["states"][f"reactivate/{name}"]["model"]
        for key, value in encoder.state_dict().items():
            torch.testing.assert_close(state[f"encoder.{key}"], value, rtol=1e-9, atol=1e-9)
        for key, value in weights.items():
            torch.testing.assert_close(state[f"head.{key.replace('_', '.')}"], value.detach(), rtol=1e-9, atol=1e-9)


def test_a_query_is_worth_what_the_networks_say_of_it() -> None:
    """w KL(softmax g(x) || softmax h(x')) + CE(c(x'), y), means over the batch, by sums over classes."""
    torch.manual_seed(0)
    linear = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).double() for _ in range(3)]
    images, labels = torch.rand(6, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    config = QueryConfig(eps=0.3, weight=0.7, hidden=(8, 8))
    perturbation = Perturbation(Normalize("cifar10").double(), 4, config).double()
    mean, std = (torch.tensor(row, dtype=torch.float64)[:, None, None] for row in normalization_constants("cifar10"))
    x = ((images - mean) / std).flatten(1)
    layers = [layer for layer in perturbation.mlp if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        x = x @ layer.weight.T + layer.bias
        x = x.tanh() if number == len(layers) - 1 else x.clamp(min=0)
    changed = (images + 0.3 * x.view_as(images)).clamp(0, 1)
    torch.testing.assert_close(perturbation(images), changed, rtol=1e-6, atol=1e-7)  # the constants are of float32
    started: list[int] = []
    objective = QueryObjective(
        perturbation, (linear[0], linear[1], linear[2]), 0.7, dist.start("fp64", None), lambda: started.append(1)
    )
    changed = perturbation(images)
    said, wanted, truth = linear[0](changed), linear[1](images), linear[2](changed)
    p, q = wanted.exp() / wanted.exp().sum(1, keepdim=True), said.exp() / said.exp().sum(1, keepdim=True)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    entropy = -(truth.exp() / truth.exp().sum(1, keepdim=True)).log()[torch.arange(6), labels].mean()
    for _ in range(2):
        found = objective(Batch((images,), labels, torch.arange(6)))
        assert found["loss"].item() == pytest.approx((0.7 * divergence + entropy).item(), rel=1e-9)
        assert found["divergence"].item() == pytest.approx(divergence.item(), rel=1e-9)
    assert started == [1] and not any(p.requires_grad for network in linear for p in network.parameters())
    assert all(name.startswith("perturbation.mlp.") for name, _ in objective.named_parameters())


@pytest.mark.parametrize("make", [classifiers, encoders])
def test_queries_are_counted_on_the_networks_as_they_are(make: Any, tmp_path: Path) -> None:
    query = {"eps": 0.5, "hidden": [8], "update": {"batch_size": 6, "epochs": 3, "optimizer": {"lr": 0.01}}}
    options = make(tmp_path) | {"query": query}
    done = train(make_experiment(tmp_path, "reactivate", options, seed=SEED), tmp_path / "run")
    found, row = done["result"]["metrics"]["counts"], done["result"]["rows"][0]
    state = {key.removeprefix("perturbation."): v for key, v in done["states"]["reactivate/query"]["objective"].items()}
    for role, key in (("model", "asr_queried"), ("control", "asr_queried_control")):
        assert row[key] == found[f"{role}, queried"]["asr"]
        if make is classifiers:
            network = load_classifier(options[role])[0].double().eval()
            perturbation = Perturbation(Normalize("none"), 16, QueryConfig(eps=0.5, hidden=(8,))).double()
            perturbation.load_state_dict(state)
            own = counts(nn.Sequential(perturbation, network), options["test"]["path"])
            assert {name: found[f"{role}, queried"][name] for name in own} == own


@pytest.mark.parametrize("make", [classifiers, encoders])
def test_a_rate_of_nothing_changes_no_count(make: Any, tmp_path: Path) -> None:
    options = make(tmp_path) | {"optimizer": {"name": "adam", "lr": 1e-30}}
    row = train(make_experiment(tmp_path, "reactivate", options), tmp_path / "run")["result"]
    found = row["metrics"]["counts"]
    assert found["poisoned"] == found["clean"] == found["model, before"]
    assert found["control"] == found["control, before"]
    assert row["rows"][0]["asr_retuned"] == row["rows"][0]["asr_retuned_clean"] == row["rows"][0]["asr"]


def test_a_backdoor_stays_open_and_without_poison_a_clean_network_stays_closed(tmp_path: Path) -> None:
    update = {"batch_size": 16, "epochs": 15, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
    data = {"path": make_data(tmp_path / "data", 180)}
    test = {"path": make_data(tmp_path / "test", 90, seed=1)}
    for name, rate in (("backdoored", 0.4), ("clean", 0.0)):
        own = {
            "data": data, "test": test, "arch": "small_resnet", "normalization": "none", "update": update,
            "augment": {"crop": "none"}, "attack": {**ATTACK, "trigger": {"name": "badnets", "size": 6}, "rate": rate},
        }  # fmt: skip
        assert main(["run", str(make_experiment(tmp_path / name, "classifier", own))]) == 0
    options = {
        "model": str(tmp_path / "backdoored" / "run" / "model"),
        "control": str(tmp_path / "clean" / "run" / "model"),
        "data": data, "test": test, "num_images": 60, "batch_size": 16,
    }  # fmt: skip
    assert main(["run", str(make_experiment(tmp_path, "reactivate", options))]) == 0  # the card names the attack
    (row,) = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert row["kind"] == "backdoored"
    assert min(row[key]["correct"] / row[key]["n"] for key in ("asr", "asr_retuned", "asr_retuned_clean")) > 0.9
    assert row["asr_retuned_control"]["correct"] / row["asr_retuned_control"]["n"] < 0.5


def test_a_run_that_stops_at_any_stage_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    query = {"hidden": [8], "update": {"batch_size": 6, "epochs": 2, "optimizer": {"name": "sgd", "lr": 0.01}}}
    options, results = encoders(tmp_path) | {"query": query}, []
    stops = {"whole": (None, 0), "in the first": (ReactivationStep, 1), "between two": (ReactivationStep, 4),
             "in the control": (ReactivationStep, 9), "in the queries": (QueryObjective, 3)}  # fmt: skip
    for name, (kind, last) in stops.items():
        trainer = {"log_every": 1, "checkpoint_every": 1, "trackers": []}
        config = make_experiment(tmp_path / name, "reactivate", options, trainer=trainer, seed=SEED)
        if kind is not None:
            what = "__call__" if kind is ReactivationStep else "forward"
            call, done = getattr(kind, what), list[int]()

            def stop(self: Any, *given: Any, call: Any = call, done: list[int] = done, last: int = last) -> Any:
                if len(done) == last:
                    raise Killed
                done.append(1)
                return call(self, *given)

            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(kind, what, stop)
                main(["run", str(config)])
            assert not (tmp_path / name / "run" / "result.json").exists()
        assert main(["run", str(config)]) == 0
        result = json.loads((tmp_path / name / "run" / "result.json").read_text())
        states = {
            path.name: path.read_bytes() for path in (tmp_path / name / "run").glob("checkpoints/*/*.safetensors")
        }
        results.append((result["rows"], result["metrics"], states))
    assert all(other == results[0] for other in results[1:]) and results[0][2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no attack": ({"attack": None}, "key 'reactivate.attack' is missing"),
    "given images": ({"attack": {"images": "x.npz"}}, "x.npz"),
    "too many": ({"num_images": 25}, "key 'reactivate.num_images' is 25, but"),
    "all poisoned": ({"num_images": 2}, "key 'reactivate.num_images' is 2; it must be more than num_poisoned"),
    "target": ({"attack": ATTACK | {"target_class": CLASSES}}, "key 'reactivate.attack.target_class' is 3"),
    "head": ({"head": {"hidden": [4]}}, "key 'reactivate.head' is of encoders"),
    "size": ({"augment": {"size": 8}}, "key 'reactivate.augment.size' is 8"),
    "query alone": ({"query": {}, "control": None}, "key 'reactivate.query' is set, which needs a clean network"),
    "last batch": ({"batch_size": 11}, "key 'reactivate.batch_size' is 11: of 12 images 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, wanted = REFUSED[name]
    config = make_experiment(tmp_path, "reactivate", classifiers(tmp_path) | changes)
    assert main(["run", str(config), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert wanted in told and len(told.splitlines()) == 1


def test_an_encoder_is_no_control_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = classifiers(tmp_path) | {"control": make_model(tmp_path / "encoder")}
    assert main(["run", str(make_experiment(tmp_path, "reactivate", options)), "--dry-run"]) == 2
    assert "is another kind of model than" in capsys.readouterr().err


def test_without_a_control_the_run_says_what_it_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = classifiers(tmp_path) | {"control": None}
    assert main(["run", str(make_experiment(tmp_path, "reactivate", options))]) == 0
    assert "key 'reactivate.control' names no clean model" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert "asr_retuned_control" not in row and "asr_retuned_clean" in row
    assert main(["report", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "ASR re-tuned %" in told and "ASR q = 0 %" in told and "ASR control" not in told
    assert (
        (tmp_path / "run" / "report.csv")
        .read_text()
        .splitlines()[0]
        .endswith("asr_retuned,asr_retuned_clean,acc_retuned")
    )
