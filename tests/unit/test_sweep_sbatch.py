"""What reaches sbatch, and what its answer is taken for: options, environment, script, banners, old sites."""

import json
from pathlib import Path

import pytest
import yaml

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.sweep import sbatch
from dist_defend.sweep.grid import load_sweep

SBATCH = """#!/bin/sh
[ "$1" != --help ] || { echo "      --site-option=text   of this site's plugin"; exit 0; }
for word in "$@"; do echo "[$word]"; done >>LOG
env | sort >ENV
printf "%b\\n" "$ANSWER"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment, and a Slurm whose commands note how they were called."""
    programs = {
        "sbatch": SBATCH.replace("LOG", str(tmp_path / "sbatch.log")).replace("ENV", str(tmp_path / "sbatch.env")),
        "squeue": f'#!/bin/sh\necho "$@" >>{tmp_path}/squeue.log\n',
        "sacct": "#!/bin/sh\nexit 1\n",
        "scontrol": "#!/bin/sh\necho 'MaxArraySize            = 1001'\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("ANSWER", "101")
    options = {"data": {"path": "d"}, "test": {"path": "t"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"method": "classifier", "output": "x", "classifier": options}))
    return tmp_path


def sweep_file(site: Path, slurm: str, more: str = "") -> str:
    text = f"output: {site}/out\nconfig: {site}/c.yaml\nseeds: [1, 2]\nslurm: {slurm}\n{more}"
    (site / "s.yaml").write_text(text)
    return str(site / "s.yaml")


def words(site: Path) -> list[str]:
    return [line[1:-1] for line in (site / "sbatch.log").read_text().splitlines()]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("{time: 24:00:00}", ["--time=24:00:00"]),
        ("{time: 4:00:00}", ["--time=4:00:00"]),
        ("{time: 30:00}", ["--time=30:00"]),
        ("{time: 1-12:00}", ["--time=1-12:00"]),
        ("{time: 90}", ["--time=90"]),
        ("{account: 0100, constraint: 1.10, nodelist: 007}", ["--account=0100", "--constraint=1.10", "--nodelist=007"]),
        ("{begin: 2026-12-24T18:00:00}", ["--begin=2026-12-24T18:00:00"]),
        ("{exclude: [n1, n2], mail-type: [END, FAIL]}", ["--exclude=n1,n2", "--mail-type=END,FAIL"]),
        ("{exclusive: false, gres: null, mem: 0}", ["--mem=0"]),
        ("{exclusive: true, mail-type: []}", ["--exclusive"]),
        ("{cpus_per_task: 4, gpus-per-task: 1}", ["--cpus-per-task=4", "--gpus-per-task=1"]),
        ("{site_option: abc}", ["--site-option=abc"]),
    ],
)
def test_options_reach_sbatch_as_they_are_meant(written: str, sent: list[str], site: Path) -> None:
    assert main(["sweep", "submit", sweep_file(site, written), "--no-collect"]) == 0
    own = ("--parsable", "--requeue", "--open-mode", "--signal", "--output", "--job-name", "--array")
    assert [word for word in words(site) if word.startswith("--") and not word.startswith(own)] == sent


def test_an_override_keeps_times_as_text(site: Path) -> None:
    sweep = load_sweep(sweep_file(site, "{}", "set: {output: x}\n".replace("output", "classifier.data.path")))
    assert sweep.points[0].experiment.options.data.path == "x"
    file = sweep_file(site, "{}", "set: {classifier.data.path: 24:00:00}\n")
    assert load_sweep(file).points[0].experiment.options.data.path == "24:00:00"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{partitoin: gpu}", "key 'slurm.partitoin' is no option of sbatch; did you mean 'partition'?"),
        ("{p: gpu}", "key 'slurm.p' is no option of sbatch; did you mean 'partition'?"),
        ("{zzz: 1}", "key 'slurm.zzz' is no option of sbatch; the keys are sbatch's long options"),
        ("{comment: {a: 1}}", "key 'slurm.comment' is {'a': 1}; expected one line of text"),
        ('{comment: "a\\nb"}', "key 'slurm.comment' is 'a\\nb'; expected one line of text"),
        ("{mail-type: [END, true]}", "key 'slurm.mail-type' is ['END', True]; expected"),
        ("{kill_on_invalid_dep: true}", "key 'slurm.kill_on_invalid_dep' is the sweep's own"),
    ],
)
@pytest.mark.parametrize("place", ["sweep", "stage"])
def test_what_sbatch_would_not_take_is_told_before_anything_is_written(
    written: str, told: str, place: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(site, written)
    if place == "stage":
        Path(file).write_text(
            f"output: {site}/out\nstages: {{one: {{config: {site}/c.yaml, seeds: [1], slurm: {written}}}}}\n"
        )
    for action in ("plan", "submit"):
        assert main(["sweep", action, file]) == 2
        assert told in capsys.readouterr().err
    assert not (site / "out").exists() and not (site / "sbatch.log").exists()


def test_setup_lines_come_before_the_points(site: Path) -> None:
    stages = f"{{one: {{config: {site}/c.yaml, seeds: [1], setup: [conda activate x]}}}}"
    (site / "s.yaml").write_text(f"output: {site}/out\nsetup: [module load cuda]\nstages: {stages}\n")
    assert main(["sweep", "submit", str(site / "s.yaml")]) == 0
    points, collect = (
        (site / "out" / "submissions" / name).read_text().splitlines() for name in ("0000.sbatch", "0001.sbatch")
    )
    assert points[:3] == ["#!/bin/bash -l", "module load cuda", "conda activate x"] and points[4].startswith("exec ")
    assert collect[:2] == ["#!/bin/bash -l", "module load cuda"] and "conda activate x" not in collect
    assert points[3] == "export PYTHONSAFEPATH=1"


def test_a_scale_has_its_own_folder_options_and_report(site: Path) -> None:
    stage = f"{{config: {site}/c.yaml, seeds: [1, 2]}}"
    scales = "{small: {one: {seeds: [3], slurm: {time: 0:30:00}}}}"
    (site / "s.yaml").write_text(f"output: {site}/out\nstages: {{one: {stage}}}\nscales: {scales}\n")
    assert main(["sweep", "submit", str(site / "s.yaml"), "--scale", "small"]) == 0
    assert not (site / "out").exists()
    folder = site / "out_small" / "submissions"
    assert len(json.loads((folder / "0000.json").read_text())["points"]) == 1
    assert (folder / "0001.sbatch").read_text().rstrip().endswith("s.yaml --scale=small")
    assert "--time=0:30:00" in (site / "sbatch.log").read_text()


def test_a_setup_of_one_text(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "s.yaml").write_text(f"output: {site}/out\nsetup: |\n  module load a\n  b\nconfig: {site}/c.yaml\n")
    assert load_sweep(site / "s.yaml").config.setup == ("module load a\nb\n",)
    (site / "bin" / "sbatch").unlink()
    assert main(["sweep", "submit", str(site / "s.yaml"), "--local"]) == 1  # there are no data
    assert "the lines of 'setup' are for Slurm's jobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer",
    [
        "101",
        "101;cluster",
        "Welcome to Example3\\n101",
        "Submitted batch job 101",
        "Node 7 of 9 is up\\n 101 \\nBye",
        "x 5\\n101;a-b",
    ],
)
def test_the_jobs_number_among_other_words(answer: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSWER", answer)
    assert main(["sweep", "submit", sweep_file(site, "{}"), "--no-collect"]) == 0
    assert json.loads((site / "out" / "submissions" / "0000.json").read_text())["job"] == "101"


@pytest.mark.parametrize("answer", ["", "Submitted batch job", "-5", "10 1", "1e3", "Welcome; 5"])
def test_an_answer_without_a_number_is_not_taken_for_one(
    answer: str, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANSWER", answer)
    assert main(["sweep", "submit", sweep_file(site, "{}")]) == 2
    assert "sbatch succeeded but printed no job number" in capsys.readouterr().err
    assert json.loads((site / "out" / "submissions" / "0000.json").read_text())["job"] is None


def test_a_job_around_it_does_not_reach_sbatch(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = (
        "SLURM_NTASKS",
        "SLURM_JOB_ID",
        "SLURM_MEM_PER_CPU",
        "SRUN_CPUS_PER_TASK",
        "PMI_RANK",
        "RANK",
        "WORLD_SIZE",
    )
    for name in (*outer, "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "4")
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "OMP_NUM_THREADS": "2", "WORLD_CUP": "2"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert main(["sweep", "submit", sweep_file(site, "{}"), "--no-collect"]) == 0
    seen = dict(line.split("=", 1) for line in (site / "sbatch.env").read_text().splitlines() if "=" in line)
    assert not {*outer, "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"} & set(seen)
    assert {name: seen.get(name) for name in kept} == kept


def test_old_slurm_and_one_that_shows_no_configuration(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "bin" / "scontrol").write_text("#!/bin/sh\necho nothing\n")
    (site / "bin" / "squeue").write_text(
        '#!/bin/sh\ncase "$*" in *--me*) echo "unrecognized option \'--me\'" >&2; exit 1;; esac\n'
    )
    file = sweep_file(site, "{}")
    assert main(["sweep", "submit", file, "--no-collect"]) == 0
    assert "MaxArraySize: taken to be 1001" in capsys.readouterr().out
    assert main(["sweep", "status", file]) == 0


def test_a_stages_spelling_replaces_the_sweeps(site: Path) -> None:
    stages = f"{{one: {{config: {site}/c.yaml, seeds: [1], slurm: {{cpus_per_task: 8}}}}}}"
    (site / "s.yaml").write_text(f"output: {site}/out\nslurm: {{cpus-per-task: 2}}\nstages: {stages}\n")
    assert main(["sweep", "submit", str(site / "s.yaml"), "--no-collect"]) == 0
    assert [word for word in words(site) if "cpus" in word] == ["--cpus-per-task=8"]


def test_a_label_of_two_lines_makes_no_second_line_of_yaml(site: Path) -> None:
    file = sweep_file(site, "{}", 'product: {classifier.arch: {"two\\nmethod: lines": small_resnet}}\n')
    assert main(["sweep", "submit", file, "--no-collect"]) == 0
    sweep = load_sweep(file)
    for point in sweep.points:
        content = yaml.safe_load((site / "out" / "points" / f"{point.key}.yaml").read_text())
        assert content["method"] == "classifier"


def test_without_sbatch_only_its_own_options_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sbatch.options(tmp_path, {"partition": "a"}) == ["--partition=a"]
    with pytest.raises(UserError, match="no option of sbatch"):
        sbatch.options(tmp_path, {"site-option": "a"})
