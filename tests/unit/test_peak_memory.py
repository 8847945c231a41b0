"""What is let go while a defence runs, and the bench that measures the peak of whole processes."""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_defend.bench import memory
from dist_defend.bench.published import process
from dist_defend.bench.runner import Case
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.counts import predict
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.update import Update
from dist_defend.methods.defend.pruning import stops as stops_module
from dist_defend.methods.defend.pruning.masks import Neuron
from dist_defend.methods.defend.pruning.stops import Stops, predict_pruned
from dist_defend.models.classifier import Classifier, build_classifier
from tests.runs import make_data


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier("small_resnet", 10, "cifar10", 32).eval()


@pytest.mark.parametrize(("layer", "most"), [("bn1", 1), ("layer4.0.bn2", 100)])
def test_the_sweep_keeps_what_a_later_stop_reads(layer: str, most: int) -> None:
    """Stops that differ in the first norm only share the convolution before it."""
    sweep = Stops(classifier(), [Neuron(layer, c, 0.0) for c in range(4)], [0, 1, 2, 4], with_beta=False)
    kept: list[int] = []
    run = sweep.memory.run

    def counted(*arguments: Any) -> Tensor:
        logits = run(*arguments)
        kept.append(len(sweep.memory.outputs))
        return logits

    sweep.memory.run = counted  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        sweep(torch.rand(2, 3, 32, 32))
    changed = next(call for call, module in enumerate(sweep.memory.order) if module in sweep.changed[-1])
    assert kept == [changed] * 4 and changed <= most
    assert not sweep.memory.outputs


def test_the_sweeps_copy_is_freed_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "test", 12, size=32)
    loader = make_loader(open_dataset(tmp_path / "test"), config=LoaderConfig("resident"), batch_size=5)
    made: list[weakref.ref[nn.Module]] = []

    class Watched(Stops):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self.model))

    monkeypatch.setattr(stops_module, "Stops", Watched)
    ranks, order = dist.start("fp32", world_size=1), [Neuron("bn1", c, 0.0) for c in range(4)]
    gc.collect()
    gc.disable()
    try:
        predict_pruned(classifier(), order, [0, 2], loader, ranks)
        assert [copy() for copy in made] == [None]
    finally:
        gc.enable()


def test_a_cpu_classifies_few_images_at_once(tmp_path: Path) -> None:
    make_data(tmp_path / "test", 300, size=32)
    loader = make_loader(open_dataset(tmp_path / "test"), config=LoaderConfig("resident"), batch_size=290)
    model, sizes = classifier(), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    ranks = dist.start("fp32", world_size=1)
    classes, _, rows = predict(model, loader, ranks)
    assert sizes == [128, 128, 34, 10] and rows.tolist() == list(range(300))
    with torch.no_grad():
        whole = torch.cat([model(batch.images).argmax(1) for batch in loader.epoch(0)])
    assert classes.equal(whole)


@pytest.mark.parametrize("is_graphed", [False, True])
def test_gradients_are_let_go(is_graphed: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    update = Update([weight], OptimizerConfig("sgd", lr=0.1, momentum=0.9), is_graphed)
    update.step([torch.ones(2)])
    update.let_go()
    assert (weight.grad is not None) == is_graphed  # a replay finds it there


def test_peaks_are_of_the_process_alone() -> None:
    """A child would begin with its parent's peak; this one's holds 300 MiB and more."""
    block = torch.zeros(300 << 18)
    small, large = (memory.peak_mib([sys.executable, "-c", f"b'x' * ({size} << 20)"]) for size in (1, 100))
    assert small < 100 < large < 300 and block.numel()
    with pytest.raises(RuntimeError, match="no such thing"):
        memory.peak_mib([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.parametrize("name", ["ibau", "rnp"])
def test_both_sides_of_the_bench_run(name: str, tmp_path: Path) -> None:
    config = memory._prepare(Case(name, "small_resnet", 4, 8), tmp_path)
    assert load_experiment(config, [f"output={tmp_path / 'run'}"]).method == name
    assert main(["run", str(config), f"output={tmp_path / 'run'}"]) == 0
    process.main(name, tmp_path, 4)
    assert (tmp_path / "mask_values.txt").exists() == (name == "rnp")


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def peak(command: list[str]) -> float:
        side = "ours" if "dist_defend" in command else "published" if "-m" in command else "imports"
        seen.append(side)
        return {"ours": 100.0, "published": 130.0, "imports": 50.0}[side]

    monkeypatch.setattr(memory, "peak_mib", peak)
    arguments = ["--encoder", "small_resnet", "--batch-size", "4", "--num-images", "8", "--repeats", "2"]
    assert main(["bench", "memory", *arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["memory-ibau", "memory-rnp"]
    assert seen == ["imports", "imports", "published", "ours", "published", "ours"] * 2
    for row in rows:
        assert (row["ratio"], row["ours_mib"], row["baseline_mib"]) == (1.3, 100.0, 130.0)
    assert "memory-rnp: 1.30x (1.30 to 1.30), ours 100 MiB, baseline 130 MiB, batch 4" in capsys.readouterr().out
