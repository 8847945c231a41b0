"""docs/coming-from.md: every flag of the published programs, keys that exist, equal defaults where no remark stands."""

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dist_defend.config import Experiment, load_experiment
from dist_defend.methods import find_method, method_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
SIMCLR = "lr batch_size epochs pretraining_dataset results_dir seed gpu knn-t knn-k"
BADENCODER = (
    "batch_size lr lambda1 lambda2 epochs reference_file trigger_file shadow_dataset pretrained_encoder "
    "encoder_usage_info results_dir seed gpu"
)
TRIGGER = "target_label trigger_type target_type trig_w trig_h"
COMMON = "cuda save-every log_root output_weight arch schedule dataset batch_size momentum weight_decay num_class"
# Read off the argument parsers, at the commits that the page names.
FLAGS = {
    "pretraining_encoder.py": SIMCLR,
    "badencoder.py": BADENCODER,
    "training_downstream_classifier.py": "dataset reference_label trigger_file encoder_usage_info encoder gpu lr seed "
    "nn_epochs hidden_size_1 hidden_size_2 batch_size reference_file",
    "zero_shot.py": "seed dataset reference_label shadow_dataset reference_file trigger_file encoder_usage_info "
    "encoder gpu batch_size",
    "MIMIC.py": "lr batch_size epochs pretraining_dataset results_dir opt1 opt2 opt3 opt4 opt5 seed gpu knn-t knn-k "
    "teacher student ratio",
    "train_clean_encoder.py": f"{SIMCLR} suffix_encoder",
    "train_badencoder.py": f"{BADENCODER} pretraining_dataset downstreamTask",
    "defense.py": "dataset poi_path log_path device batch_size unl_set optim lr n_rounds K",
    "main.py": f"{COMMON} backdoor_model_path unlearned_model_path ratio {TRIGGER} alpha clean_threshold unlearning_lr "
    "recovering_lr unlearning_epochs recovering_epochs mask_file pruning-by pruning-max pruning-step",
    "train_backdoor.py": f"{COMMON} lr epochs interval {TRIGGER} inject_portion",
    "zskt/main.py": "dataset total_n_pseudo_batches log_times n_generator_iter n_student_iter batch_size z_dim "
    "student_learning_rate generator_learning_rate teacher_architecture student_architecture KL_temperature AT_beta "
    "pretrained_models_path sel_model save_final_model save_n_checkpoints save_model_path seed workers resume no_log "
    "trigger_pattern poi_target sup_backdoor use_hg hg_start_round inner_round hg_out_portion sup_resume sup_resume_lr "
    "sup_pert_model pert_lr shuf_teacher n_shuf_ens n_shuf_layer neg_drop_loss no_shuf_grad pseudo_test_batches",
    "zskt/kd_distill.py": "seed dataset teacher teacher_path student epochs lr batch_size percent no_log alpha temp "
    "trigger_pattern poi_target sel_model",
    "cmi/datafree_kd.py": "method adv bn oh act balance save_dir cr cr_T cmi_init data_root teacher student dataset lr "
    "lr_decay_milestones lr_g T epochs g_steps kd_steps ep_steps resume evaluate_only batch_size synthesis_batch_size "
    "gpu world_size rank dist_url dist_backend multiprocessing_distributed fp16 seed save_n_last_epoch log_tag workers "
    "start_epoch momentum weight_decay print_freq pretrained trigger poi_target pt_path shufl_coef pseudo_test_batches "
    "unlearn inner_round unlearn_resume ul_resume_lr",
    "cmi/vanilla_kd_ood.py": "seed dataset teacher pt_path student initialize_student start_epoch epochs lr opt "
    "scheduler batch_size percent no_log visualize save_n_last_epoch resume temp beta cutmix_prob trigger poi_target "
    "shufl_coef pseudo_test_batches unlearn inner_round unlearn_resume ul_resume_lr",
    "cmi/vanilla_kd.py": "data_root teacher student dataset transfer_set lr lr_decay_milestones alpha beta T epochs "
    "resume evaluate_only batch_size world_size rank dist_url dist_backend multiprocessing_distributed gpu fp16 seed "
    "log_tag workers start_epoch momentum weight_decay print_freq pretrained",
    "defense/rnp.py": "alpha clean_threshold unlearning_lr recovering_lr unlearning_epochs recovering_epochs mask_file "
    "pruning_by pruning_max pruning_step pruning_number acc_ratio ratio index schedule batch_size random_seed",
    "defense/i-bau.py": "ratio index optim n_rounds K batch_size lr wd random_seed",
    "Flags of both programs": "device pin_memory non_blocking prefetch amp checkpoint_load checkpoint_save log "
    "dataset_path dataset result_file epochs num_workers lr lr_scheduler steplr_stepsize steplr_gamma "
    "steplr_milestones model client_optimizer sgd_momentum wd frequency_save yaml_path",
}


class Row(NamedTuple):
    program: str
    flag: str
    default: str
    keys: tuple[str, ...]
    remark: str
    file: str  # the experiment file that the table's rows are compared with
    preset: str | None  # as an override


def tables() -> Iterator[tuple[str, list[Row]]]:
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        program = section.splitlines()[0]
        found = re.search(r"^Here: `(configs/\S+\.yaml)`(?: with `(\S+)`\.)?", section, re.MULTILINE)
        assert found, f"{program} does not say which file is compared with"
        rows = []
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("| ") and cells[0] != "flag":
                assert len(cells) == 4, f"{program}: {line}"
                keys = tuple(re.findall(r"`([^`]+)`", cells[2]))
                rows.append(Row(program, cells[0].strip("`"), cells[1], keys, cells[3], found[1], found[2]))
        yield program, rows


TABLES = dict(tables())
ROWS = [row for rows in TABLES.values() for row in rows]


@pytest.mark.parametrize("program", FLAGS)
def test_all_flags_of_a_program_are_told(program: str) -> None:
    assert [row.flag for row in TABLES[program]] and all(row.default for row in TABLES[program])
    assert sorted(row.flag for row in TABLES[program]) == sorted(f"--{name}" for name in FLAGS[program].split())


def test_every_table_is_compared() -> None:
    assert {name for name in TABLES if not name.endswith(".ipynb")} == set(FLAGS)
    assert min(len(rows) for rows in TABLES.values()) >= 5


def fields_below(kind: Any) -> Iterator[Any]:
    """The dataclasses that a value of this type may be, or that a mapping to it may hold."""
    if dataclasses.is_dataclass(kind):
        yield kind
    elif typing.get_origin(kind) in (types.UnionType, typing.Union, dict, typing.Annotated):
        for inner in typing.get_args(kind):
            yield from fields_below(inner)


def has_key(kind: Any, path: list[str]) -> bool:
    if not path:
        return True
    if typing.get_origin(kind) is dict:
        return has_key(typing.get_args(kind)[1], path[1:])
    for section in fields_below(kind) if not dataclasses.is_dataclass(kind) else [kind]:
        hints = typing.get_type_hints(section)
        if path[0] in hints and has_key(hints[path[0]], path[1:]):
            return True
    return False


def exists(key: str) -> bool:
    first, *rest = key.split(".")
    if first in method_names():
        return has_key(find_method(first).Config, rest)
    return has_key(Experiment, [first, *rest])


def test_a_key_that_is_not_there_is_found_out() -> None:
    assert exists("rnp.alpha") and exists("probe.tasks.any_name.target_class") and exists("loader.workers")
    wrong = ("rnp.alpga", "rnp.alpha.beta", "loader.threads", "nonsense", "probe.tasks.x.target", "zskt.vaccine.x")
    assert not any(map(exists, wrong))


@pytest.mark.parametrize("program", TABLES)
def test_every_key_exists(program: str) -> None:
    keys = [key for row in TABLES[program] for key in row.keys]
    assert keys and [key for key in keys if not exists(key)] == []
    dotted = {name for row in TABLES[program] for name in re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", row.remark)}
    dotted = {name for name in dotted if name.split(".")[0] in (*method_names(), "trainer", "loader")}
    assert {name for name in dotted if not exists(name)} == set()


@pytest.mark.parametrize("program", TABLES)
def test_what_has_no_key_has_a_reason(program: str) -> None:
    for row in TABLES[program]:
        assert row.keys or row.remark, f"{row.flag}: neither a key nor a reason"


@cache
def resolved(file: str, preset: str | None) -> dict[str, Any]:
    return load_experiment(ROOT / file, [preset] if preset else []).resolved()


@pytest.mark.parametrize("program", TABLES)
def test_rows_without_a_remark_have_equal_defaults(program: str) -> None:
    compared, wrong = 0, []
    for row in TABLES[program]:
        if row.remark or row.keys == ("output",):
            continue
        assert len(row.keys) == 1, f"{row.flag}: several keys need a remark"
        own: Any = resolved(row.file, row.preset)
        for part in row.keys[0].split("."):
            own = own[part]
        theirs = yaml.safe_load(row.default)
        if isinstance(own, float | int) and not isinstance(own, bool):
            theirs = float(theirs)  # YAML reads 5e-4 as text
        compared += 1
        wrong += [] if own == theirs else [(row.flag, theirs, own)]
    assert wrong == []
    assert compared or program == "Flags of both programs"


def examples() -> list[str]:
    return re.findall(r"^    (?:CUDA_VISIBLE_DEVICES=\S+ )?dist-defend run (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("example", examples())
def test_our_commands_are_configurations(example: str) -> None:
    file, *overrides = shlex.split(example)
    assert load_experiment(ROOT / file, overrides).method in method_names()


def test_each_program_has_both_commands() -> None:
    assert len(examples()) >= len(TABLES) - 1
