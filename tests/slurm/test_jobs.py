"""The templates below slurm/ on a real Slurm, and what they do when a job is cut short."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import SIZE, make_data, make_experiment, options_of
from tests.slurm.cluster import Cluster
from tests.slurm.points import await_, classifier, outcome, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
RUN = ("python", "-m", "dist_defend", "run")


def sbatch(cluster: Cluster, log: Path, template: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """Submit a template from the root of the repository, as its head says; the job's number."""
    command = ["sbatch", "--parsable", f"--output={log}", *options, f"slurm/{template}.sbatch", *arguments]
    return cluster.run(*command, cwd=ROOT).strip()


def test_a_job_told_to_stop_and_one_preempted_end_where_an_undisturbed_one_ends(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = classifier(tmp_path, epochs=100, checkpoint_every=1)
    undisturbed, run, log = tmp_path / "undisturbed" / "run", tmp_path / "run", tmp_path / "job.log"
    cluster.run("srun", "--time=5", *RUN, str(config), f"output={undisturbed}", cwd=ROOT, timeout=480)
    job = sbatch(cluster, log, "single", str(config))
    await_(lambda: steps(run) >= 3, "the run trains")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does near the limit
    await_(lambda: "resumed at step" in log.read_text(), "the job is requeued and goes on")
    before = steps(run)
    await_(lambda: steps(run) > before, "it trains again")
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true"
    ).strip()
    assert cluster.wait(job, timeout=480) == {"N/A": ("COMPLETED", 0, 2)}, log.read_text()
    assert cluster.wait(urgent) == {"N/A": ("COMPLETED", 0, 0)}
    told = log.read_text()
    assert told.count("signal received: saved step") == 2 and told.count("resumed at step") == 2
    assert outcome(run) == outcome(undisturbed)


def test_two_ranks_save_when_their_job_is_told_to_stop(cluster: Cluster, tmp_path: Path) -> None:
    """The launcher passes the signal on, and says by its status that they have saved."""
    config = str(classifier(tmp_path, epochs=40, checkpoint_every=1))
    undisturbed, run, log = tmp_path / "undisturbed" / "run", tmp_path / "run", tmp_path / "job.log"
    ranks = ("--gpus-per-node=0", "--export=ALL,RANKS=2")
    job = sbatch(cluster, tmp_path / "undisturbed.log", "node", config, f"output={undisturbed}", options=ranks)
    assert cluster.wait(job, timeout=480) == {"N/A": ("COMPLETED", 0, 0)}, (tmp_path / "undisturbed.log").read_text()
    job = sbatch(cluster, log, "node", config, options=ranks)
    await_(lambda: steps(run) >= 3, "the ranks train")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, timeout=480) == {"N/A": ("COMPLETED", 0, 1)}, log.read_text()
    told = log.read_text()
    assert told.count("signal received: saved step") == 1 and told.count("resumed at step") == 1
    assert "cut short with exit 75: requeued" in told and "Traceback" not in told
    assert outcome(run) == outcome(undisturbed)


def test_restarts_are_counted(cluster: Cluster, tmp_path: Path) -> None:
    config = classifier(tmp_path, epochs=5000)
    log = tmp_path / "job.log"
    job = sbatch(cluster, log, "single", str(config), options=("--export=ALL,RESTARTS=0",))
    await_(lambda: steps(tmp_path / "run") >= 1, "the run trains")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == {"N/A": ("FAILED", 75, 0)}
    assert "not requeued" in log.read_text()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    config = classifier(tmp_path, epochs=5000)
    log = tmp_path / "job.log"
    job = sbatch(cluster, log, "single", str(config))
    await_(lambda: steps(tmp_path / "run") >= 1, "the run trains")
    cluster.run("scancel", job)
    assert cluster.wait(job)["N/A"][::2] == ("CANCELLED", 0)
    assert "signal received: saved step" in log.read_text() and "requeued" not in log.read_text()


def test_two_nodes_of_two_ranks_equal_four_ranks_on_one(cluster: Cluster, tmp_path: Path) -> None:
    options = options_of("simclr", tmp_path / "inputs")
    options["data"]["max_samples"] = 24
    options["update"] = {**options["update"], "batch_size": 8}
    config = str(make_experiment(tmp_path, "simclr", options, precision="fp64"))
    across, alone = tmp_path / "across", tmp_path / "alone"
    logs = [tmp_path / "across.log", tmp_path / "alone.log"]
    # Without namespaces all nodes are this machine, and their names mean nothing to it.
    address = "" if cluster.has_hosts else ",MASTER_ADDR=127.0.0.1"
    ranks = ("--gpus-per-node=0", f"--export=ALL,RANKS_PER_NODE=2{address}")
    job = sbatch(cluster, logs[0], "multi_node", config, f"output={across}", options=ranks)
    assert cluster.wait(job, timeout=480) == {"N/A": ("COMPLETED", 0, 0)}, logs[0].read_text()
    ranks = ("--gpus-per-node=0", "--export=ALL,RANKS=4")
    job = sbatch(cluster, logs[1], "node", config, f"output={alone}", options=ranks)
    assert cluster.wait(job, timeout=480) == {"N/A": ("COMPLETED", 0, 0)}, logs[1].read_text()
    assert len(outcome(across)[1]) == 6
    for name, tensor in load_file(across / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            tensor, load_file(alone / "model" / "model.safetensors")[name], rtol=1e-12, atol=1e-12
        )


def test_the_pipeline_of_arrays(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for variable, method in {
        "PRETRAIN": "simclr",
        "POISON": "badencoder",
        "DEFEND": "mimic",
        "EVALUATE": "probe",
    }.items():
        options = options_of(method, tmp_path / method)
        if variable in ("PRETRAIN", "POISON"):  # 32 pixels throughout, as MIMIC wants
            key = "data" if method == "simclr" else "shadow"
            options[key]["path"] = make_data(tmp_path / "data", size=2 * SIZE)
        if method == "probe":
            task = options["tasks"]["noise"]
            task["train"]["path"] = make_data(tmp_path / "data", size=2 * SIZE)
            task["test"]["path"] = make_data(tmp_path / "test", 21, seed=1, size=2 * SIZE)
            options["encoders"] = {}
        if method == "badencoder":
            options["reference"]["dataset"] = make_data(tmp_path / "data", size=2 * SIZE)
        files[variable] = str(make_experiment(tmp_path / method, method, options))
    out = tmp_path / "out"
    (out / "2").mkdir(parents=True)
    (out / "2" / "pretrain").write_text("in the way of seed 2")
    for name, value in {**files, "SEEDS": "1 2", "OUT": str(out)}.items():
        monkeypatch.setitem(cluster.environment, name, value)
    told = cluster.run("bash", "slurm/pipeline.sbatch", cwd=ROOT)
    jobs = {line.split(":")[0]: line.split()[-1] for line in told.splitlines()}
    assert list(jobs) == ["pretrain", "poison", "defend", "evaluate", "collect"]
    assert cluster.wait(jobs["collect"], timeout=480)["N/A"][0] == "COMPLETED"
    logs = "\n".join(file.read_text() for file in out.glob("*.log"))
    assert {state for state, _, _ in cluster.states(jobs["evaluate"]).values()} == {"COMPLETED", "CANCELLED"}, logs
    (collect,) = out.glob("collect_*.log")
    report = collect.read_text()
    assert [line for line in report.splitlines() if line.startswith("missing")] == [
        f"missing: seed 2, stage {stage}" for stage in ("pretrain", "poison", "defend", "evaluate")
    ]
    assert "purified" in report and (out / "report.html").exists()
