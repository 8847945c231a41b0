"""A call from a program leaves the process as it was, and does not depend on how it was."""

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState

import dist_defend as dd
from dist_defend.models.classifier import Classifier
from dist_defend.session import session
from tests.runs import CLASSES, SIZE, make_classifier

OPTIONS: dict[str, Any] = {"rounds": 1, "batch_size": 8, "min_patched": 2}


def make_images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, SIZE, SIZE) uint8 and labels (count,)."""
    pixels = torch.randint(
        0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    return pixels.byte(), torch.arange(count, device="cpu") % CLASSES


def run(model: Any) -> str:
    return str(dd.defend("ibau", model, make_images(16), test=make_images(12, 1), **OPTIONS).result["model_sha256"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dd.load(make_classifier(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture
def unusual() -> Iterator[None]:
    """A program that has its own ideas of everything."""
    threads, level = torch.get_num_threads(), logging.getLogger("dist_defend").level
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    logging.getLogger("dist_defend").setLevel(logging.ERROR)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield
    logging.getLogger("dist_defend").setLevel(level)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


def state() -> dict[str, Any]:
    """Of the process, whatever a run could change."""
    logger = logging.getLogger("dist_defend")
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "random": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "log": (logger.level, logger.propagate, list(logger.handlers), logging.getLogger().level),
        "environment": dict(os.environ),
        "accelerate": dict(PartialState._shared_state),
    }


def test_a_plain_process_stays_plain(model: Classifier) -> None:
    """First, so that nothing has changed it yet."""
    before = state()
    run(model)
    assert state() == before and before["log"][1]


@pytest.fixture(scope="module")
def expected(model: Classifier) -> str:
    return run(model)


def test_a_call_changes_nothing_and_does_not_depend_on_the_process(
    unusual: None, model: Classifier, expected: str
) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    before = state()
    assert before["accelerate"] and before["grad"] == (False, False, True)
    assert run(model) == expected
    dd.evaluate(model, make_images(9))
    assert state() == before
    with pytest.raises(dd.UserError):
        dd.defend("ibau", model, make_images(16), test=make_images(12, 1), rounds=0)
    assert state() == before
    assert accelerator.device.type == "cpu" and accelerator.num_processes == 1  # which works on


def test_inference_mode_and_another_default_device_do_not_matter(model: Classifier, expected: str) -> None:
    with torch.inference_mode(), torch.device("meta"):
        assert run(model) == expected
        assert torch.zeros(1).device.type == "meta" and torch.is_inference_mode_enabled()


def test_a_thread_may_call(model: Classifier, expected: str) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(run(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_run_as_python_expects(
    number: int, kind: type[BaseException], model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_defend.methods.defend.ibau.step import UnlearningStep

    plain = UnlearningStep.__call__

    def step(self: Any, *args: Any) -> Any:
        os.kill(os.getpid(), number)
        return plain(self, *args)

    monkeypatch.setattr(UnlearningStep, "__call__", step)
    before = state()
    with pytest.raises(kind) as stop:
        run(model)
    assert kind is KeyboardInterrupt or stop.value.code == 75  # type: ignore[attr-defined]
    assert state() == before


def test_the_log_goes_where_the_program_wants_it(
    model: Classifier, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    again = {"test": make_images(12, 1), **OPTIONS}
    dd.defend("ibau", model, make_images(16), output=tmp_path / "quiet", **again)
    assert {record.levelname for record in caplog.records} == {"WARNING"}  # of noise, most of which is wrong
    with caplog.at_level(logging.INFO, "dist_defend"):
        dd.defend("ibau", model, make_images(16), output=tmp_path / "told", **again)
    assert any(record.getMessage().startswith("finished ") for record in caplog.records)
    for name in ("quiet", "told"):
        assert "finished " in (tmp_path / name / "log.txt").read_text()


@pytest.mark.parametrize(
    ("device", "told"),
    [("gpu", "give cpu, cuda or cuda:N"), ("cuda:99", "torch finds . GPUs"), ("mps", "torch finds . GPUs")],
)
def test_a_device_that_is_not_there_is_one_line(device: str, told: str) -> None:
    with pytest.raises(dd.UserError, match=told), session(device):
        pass


def test_one_of_several_ranks_is_told_to_launch(monkeypatch: pytest.MonkeyPatch, model: Classifier) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(dd.UserError, match=r"one of 2 ranks: .*`dist-defend launch CONFIG --ranks 2"):
        dd.evaluate(model, make_images(9))
