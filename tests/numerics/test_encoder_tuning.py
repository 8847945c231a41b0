"""FT and NAD on encoders: against published numbers of their parts, and against each other where they are the same."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Trainer
from dist_defend.methods.defend import ft_simclr
from dist_defend.methods.defend.mimic import MimicObjective
from dist_defend.methods.defend.nad_simclr import AttentionObjective
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.artifact import load_simclr
from dist_defend.models.encoder import SimCLR
from tests.numerics.det import det_images, golden
from tests.numerics.test_method_steps import batch_of, make_model, run_steps
from tests.runs import SIZE, make_experiment, options_of
from tests.runs import make_model as make_folder

VIEWS = [det_images((8, 3, 32, 32), seed) for seed in (2, 3)]
SGD = OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)


ADAM = OptimizerConfig("adam", 1e-2, 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_attention_is_the_published_one(stage: int) -> None:
    """MIMIC's attention term is NAD's; its published code gave the loss of each stage alone."""
    betas = [1000.0 * (number == stage) for number in range(1 if stage == 1 else 2, 5)]
    objective = AttentionObjective(make_model(21), make_model(22), 0.5, betas)
    losses, _ = run_steps(objective, ADAM, batch_of(*VIEWS))
    assert losses == pytest.approx([golden("mimic")[f"float64_at{stage}"]["loss"]], rel=1e-9)


def test_gradients_are_mimics_whose_are_published() -> None:
    models = [make_model(21) for _ in range(2)]
    objectives = (
        MimicObjective(models[0], make_model(22), 0.5, (0.0, 500.0, 1000.0, 1000.0), clone_weight=0),
        AttentionObjective(models[1], make_model(22), 0.5, (500.0, 1000.0, 1000.0)),
    )
    wanted, found = (run_steps(objective, ADAM, batch_of(*VIEWS))[1] for objective in objectives)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_without_attention_nad_is_fine_tuning_step_by_step() -> None:
    states: list[dict[str, Tensor]] = []
    for make in (
        lambda model: SimCLRObjective(model, 0.5),
        lambda model: AttentionObjective(model, make_model(22), 0.5, (0.0, 0.0, 0.0)),
    ):
        model = make_model(21)
        losses, _ = run_steps(make(model), SGD, batch_of(*VIEWS), steps=3)
        states.append({**model.state_dict(), "losses": torch.tensor(losses)})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-12, atol=1e-14, msg=key)


def test_a_student_that_is_its_teacher_has_no_attention_loss() -> None:
    student, teacher = make_model(21).eval(), make_model(21)
    found = AttentionObjective(student, teacher, 0.5, (500.0, 1000.0, 1000.0))(batch_of(*VIEWS))
    assert [found[f"attention{stage}"].item() for stage in (2, 3, 4)] == [0, 0, 0]
    assert found["loss"] == found["contrastive"]


def saved(folder: Path) -> dict[str, Tensor]:
    return load_simclr(folder / "run/model")[0].state_dict()


def test_fine_tuning_is_pretraining_that_goes_on(tmp_path: Path) -> None:
    options = options_of("ft_simclr", tmp_path)
    same = {"arch": "small_cifar", "warm_start": options["model"], "data": options["data"]}
    same |= {key: options[key] for key in ("augment", "update")}
    for method, section in (("ft_simclr", options), ("simclr", same)):
        assert main(["run", str(make_experiment(tmp_path / method, method, section))]) == 0
    tuned, before = saved(tmp_path / "ft_simclr"), load_simclr(options["model"])[0].state_dict()
    assert all(value.equal(tuned[key]) for key, value in saved(tmp_path / "simclr").items())
    assert not before["g.0.weight"].equal(tuned["g.0.weight"])


def test_a_fresh_projector_learns_first_while_the_encoder_is_frozen(tmp_path: Path) -> None:
    """Its first gradient is that of SimCLR's loss through an encoder in eval mode."""
    projector = {"batch_size": 4, "epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}}
    bare = make_folder(tmp_path / "bare", projector=False)
    options = options_of("ft_simclr", tmp_path) | {"model": bare, "projector": projector}
    experiment = load_experiment(make_experiment(tmp_path, "ft_simclr", options))
    context = Context(dist.start("fp64", None), 7, experiment.loader, tmp_path, "ft_simclr")
    first, second = ft_simclr.build(experiment.options, context).stages
    tuned: Any = second.step
    model: SimCLR = tuned.objective.model
    frozen = {key: value.clone() for key, value in model.f.state_dict().items()}
    start = {key: value.clone() for key, value in model.g.state_dict().items()}
    assert (first.name, first.epochs, second.name) == ("projector", 1, "ft_simclr")
    for number, batch in enumerate(first.loader.epoch(0)):
        if number == 0:
            model.f.eval()
            loss = SimCLRObjective(model, 0.5)(batch_of(*(view.double() for view in batch.views)))["loss"]
            (wanted,) = torch.autograd.grad(loss, [model.g.get_parameter("3.weight")])
            model.train().g.load_state_dict(start)
        first.step(first_in_double(batch), Position(batch=number))
        if number == 0:
            moved = (start["3.weight"] - projector_of(first)["3.weight"]) / 0.1
            torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12)
    assert all(value.equal(frozen[key]) for key, value in model.f.state_dict().items())
    assert all(value.equal(start[key]) for key, value in model.g.state_dict().items())
    assert first.finish is not None
    first.finish()
    assert all(value.equal(model.g.state_dict()[key]) for key, value in projector_of(first).items())
    assert not start["3.weight"].equal(model.g.state_dict()["3.weight"]) and model.f.training


def first_in_double(batch: Any) -> Any:
    return batch_of(*(view.double() for view in batch.views))


def projector_of(stage: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = stage.step.objective.projector.state_dict()
    return state


@pytest.mark.parametrize("stops", [1, 3])  # of two updates of a fresh projector and four of the whole
def test_a_stopped_run_goes_on(stops: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of("ft_simclr", tmp_path) | {"model": make_folder(tmp_path / "bare", projector=False)}
    options["projector"] = {"batch_size": 4, "epochs": 1}
    configs = [make_experiment(tmp_path / name, "ft_simclr", options) for name in ("whole", "stopped")]
    assert main(["run", str(configs[0])]) == 0
    move, moved = Trainer._move, [0]

    def signalled(self: Trainer, batch: Batch) -> Batch:
        moved[0] += 1
        if moved[0] == stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return move(self, batch)

    monkeypatch.setattr(Trainer, "_move", signalled)
    assert main(["run", str(configs[1])]) == 75
    assert main(["run", str(configs[1])]) == 0 and moved[0] == 6
    whole = saved(tmp_path / "whole")
    assert all(value.equal(whole[key]) for key, value in saved(tmp_path / "stopped").items())


def test_a_model_without_a_projector_is_tuned_and_gets_one(tmp_path: Path) -> None:
    bare = make_folder(tmp_path / "bare", projector=False)
    config = make_experiment(tmp_path, "ft_simclr", options_of("ft_simclr", tmp_path) | {
        "model": bare, "projector": {"batch_size": 8, "epochs": 1},
    })  # fmt: skip
    assert main(["run", str(config)]) == 0
    model, card = load_simclr(tmp_path / "run/model")
    assert card.kind == "simclr" and model.g(torch.zeros(2, model.f.feature_dim)).shape == (2, 128)


def test_a_teacher_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"teacher": make_folder(tmp_path / "other", size=2 * SIZE, arch="resnet18_cifar")}
    options = options_of("nad_simclr", tmp_path) | other
    assert main(["run", str(make_experiment(tmp_path, "nad_simclr", options))]) == 2
    told = "key 'nad_simclr.teacher' names a resnet18_cifar of 32 px, but"
    assert told in capsys.readouterr().err.splitlines()[-1]
    options["betas"] = [1.0, -1.0]
    assert main(["run", str(make_experiment(tmp_path, "nad_simclr", options))]) == 2
    assert "key 'nad_simclr.betas' is [1.0, -1.0]" in capsys.readouterr().err.splitlines()[-1]
