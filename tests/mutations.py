"""Mistakes that a test must notice: each is made in a copy of the tree, where the named test then has to fail.

    python -m tests.mutations             # all, some minutes
    python -m tests.mutations --list      # as a table
    python -m tests.mutations --only 3 7  # some, by number

No part of `make test`; tests/repo holds that every mutation still fits the code and names a test that is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PARTS = ("dist_defend", "tests", "configs", "docs", "examples", "launch", "slurm", "pyproject.toml")
SECONDS = 600  # that a test may take


class Mutation(NamedTuple):
    """What is wrong, and in the file below dist_defend/ the text ``old`` (there once) that becomes ``new``."""

    wrong: str
    file: str
    old: str
    new: str
    test: str  # below tests/, as pytest names it


COUNTS = "unit/test_defence_counts.py"
BEFORE = f"{COUNTS}::test_before_is_the_suspect_and_after_is_what_was_saved"
LINEAGE = "unit/test_sweep_lineage.py"
RANDOM = "unit/test_random_state.py"
RANKS = "distributed/test_over_ranks.py"
INFORMATION = "numerics/test_information.py"
PUBLISHED = "repo/test_published.py::test_published_values"
BUILT = "unit/test_built_stages.py"
AUGMENTED = f"{BUILT}::test_training_images_are_augmented_as_configured"
RNP_STEPS = f"{BUILT}::test_rnps_options_reach_its_steps_and_masks_are_learned_on_the_unlearned_weights"
STARTS = "numerics/test_abd_steps.py::test_self_retrospection_starts_on_time_afresh_and_on_other_images_each_step"
MONITOR = "numerics/test_knn.py::test_the_monitor_votes_with_the_memory_on_the_test_images"
COMPAT = "unit/test_compat_backdoorbench.py"
SCRIPT = f"{COMPAT}::test_the_documented_script_runs_and_gives_the_counts_of_our_rnp_run"
PLUGINS = "unit/test_plugins.py"
REPLAYS = "capture/test_replays.py::test_replays_equal_eager_calls"
SESSION = "unit/test_session.py::test_a_plain_process_stays_plain"
MUTATIONS: tuple[Mutation, ...] = (
    Mutation("a defence called from Python trains the program's own network", "models/in_process.py",
             "copy.deepcopy(net).cpu()", "net.cpu()",
             "unit/test_api.py::test_the_snippet_of_the_readme_on_a_network_never_seen"),
    Mutation("float images of a program are cut to grey levels, not rounded", "data/in_memory.py",
             "np.rint(levels)", "np.floor(levels)",
             "unit/test_data_in_memory.py::test_rounding_is_told"),
    Mutation("a call keeps the program's generator where the run left it", "session.py",
             "with torch.random.fork_rng(devices):", "with contextlib.nullcontext(devices):", SESSION),
    Mutation("a call leaves the log of the program cut off", "terminal.py",
             "logger.propagate = before[1]", "logger.propagate = False", SESSION),
    Mutation("a program's test set that lacks the last class has fewer classes than its training set", "given.py",
             "for where, other in self._data.items() if where", "for where, other in [(key, data)] if where",
             "unit/test_api.py::test_a_classifier_is_trained_from_a_function_and_poisoned"),
    Mutation("RNP chooses a stop by the test images", "methods/defend/pruning/outcome.py",
             "self._predict(order, stops, self.defence)", "self._predict(order, stops, self.test.clean)",
             f"{COUNTS}::test_rnp_chooses_by_the_defenders_images_alone"),
    Mutation("a defence's 'before' is measured after it", "trial.py",
             "before or self.before or self.exam", "before or self.latest or self.exam", f"{BEFORE}[ibau]"),
    Mutation("RNP's 'before' is its chosen stop", "methods/defend/pruning/outcome.py",
             "counts[chosen], counts[0]", "counts[chosen], counts[chosen]", f"{BEFORE}[rnp]"),
    Mutation("a defence's examples are not written", "trial.py",
             "        self.examination.save_examples()\n", "", f"{BEFORE}[cmi]"),
    Mutation("a distillation calls its images otherwise", "methods/defend/kd.py",
             'dataset("defence"', 'dataset("train"', f"{BEFORE}[kd]"),
    Mutation("every defence's rows are called alike", "trial.py",
             "kind = context.method + variant", 'kind = "purified"', f"{BEFORE}[zskt]"),
    Mutation("DER of the report takes |.| of the change of accuracy", "report/tables.py",
             "rating(asr / 100, acc / 100)", "rating(asr / 100, abs(acc) / 100)",
             "unit/test_report.py::test_a_gain_of_accuracy_is_neither_rewarded_nor_punished"),
    Mutation("DER adds the loss of accuracy, as BackdoorBench's code does", "counts.py",
             "max(0.0, gain) - max(0.0, loss)", "max(0.0, gain) + max(0.0, loss)",
             "unit/test_report.py::test_a_gain_of_accuracy_is_neither_rewarded_nor_punished"),
    Mutation("DER of a sweep takes |.| of the change of accuracy", "sweep/collect.py",
             "rating(drops[0] / 100, drops[1] / 100)", "rating(drops[0] / 100, abs(drops[1]) / 100)",
             f"{LINEAGE}::test_a_sweep_rates_no_gain_of_accuracy_and_no_rise_of_asr"),
    Mutation("the leaderboard's groups know nothing of attacks", "sweep/report.py",
             'groupby([*attacks, "task"]', 'groupby(["task"]',
             f"{LINEAGE}::test_the_leaderboard_ranks_defences_attack_by_attack"),
    Mutation("device seconds are those of one rank", "experiment.py",
             "life.wall_seconds * life.world_size for", "life.wall_seconds for",
             f"{RANKS}::test_device_seconds_are_those_of_every_rank"),
    Mutation("the order of epoch 2989 draws the poisoned rows", "ops/streams.py",
             "if epoch < min(Stream) else", "if epoch < max(Stream) else",
             "unit/test_streams.py::test_no_two_draws_of_a_run_are_the_same"),
    Mutation("a module opens a stream of its own", "data/loader.py",
             "draws(seed, Stream.SUBSET)", "np.random.default_rng([seed, 0x5B5E7])",
             "repo/test_one_owner.py::test_streams_have_one_file"),
    Mutation("a strategy needs the one who chooses it", "engine/fsdp2.py",
             "from dist_defend.engine.whole import Whole",
             "import dist_defend.engine.strategy\nfrom dist_defend.engine.whole import Whole",
             "repo/test_imports.py::test_no_module_needs_itself"),
    Mutation("a method skips updates by itself", "methods/defend/cmi/synthesis.py",
             "        self.of_made.step(gradients[: len(self.made)], norm=norm)\n",
             "        self.of_made.optimizer.found_inf = norm.isnan().float()\n"
             "        self.of_made.step(gradients[: len(self.made)], norm=norm)\n",
             "repo/test_one_owner.py::test_optimizers_have_one_writer"),
    Mutation("a method forgets an optimizer by itself", "methods/defend/cmi/synthesis.py",
             "        self.of_made.forget()\n", "        self.of_made.optimizer.state.clear()\n",
             "repo/test_one_owner.py::test_optimizers_have_one_writer"),
    Mutation("an update that is not finite is done", "engine/update.py",
             "nonfinite = norm.sub(norm).ne(0).float()", "nonfinite = torch.zeros_like(norm)",
             "unit/test_update.py::test_what_is_not_finite_moves_nothing"),
    Mutation("a loaded state lies where no captured step writes", "engine/update.py",
             "own.copy_(value) if isinstance(own, Tensor) else owned(value, parameter)", "owned(value, parameter)",
             "unit/test_update.py::test_a_state_is_loaded_to_where_a_captured_step_writes"),
    Mutation("a step is told the next position", "engine/trainer.py",
             "stage.step(self._move(batch), at)", "stage.step(self._move(batch), replace(at, batch=at.batch + 1))",
             "unit/test_engine.py::test_a_step_is_told_where_the_run_stands"),
    Mutation("a capture meets nodes that another stream made", "engine/graphed.py",
             "(tensor, tensor.detach().clone()) for tensor in changed()",
             "(tensor, tensor.clone()) for tensor in changed()", f"{REPLAYS}[rnp recover]"),
    Mutation("a loader's thread ends a capture", "engine/graphed.py",
             ', capture_error_mode="thread_local"', "",
             "capture/test_mutants.py::test_other_threads_do_not_end_a_capture"),
    Mutation("what warms up a graph moves dropout's draws", "engine/graphed.py",
             ", torch.random.fork_rng(range(torch.cuda.device_count())):", ":", f"{REPLAYS}[rnp unlearn, dropout]"),
    Mutation("a graph keeps the rate of its capture", "engine/update.py",
             "torch.tensor(config.lr, device=device) if can_capture(device) else None", "None",
             f"{REPLAYS}[rnp unlearn]"),
    Mutation("a resumed graph keeps the rate of its capture", "engine/update.py",
             "if isinstance(v, Tensor)}\n        self._prepare()\n", "if isinstance(v, Tensor)}\n",
             f"{REPLAYS}[rnp unlearn]"),
    Mutation("an update asks whether its gradient is finite", "engine/update.py",
             "nonfinite = norm.sub(norm).ne(0).float()",
             "nonfinite = norm.new_full((), float(not torch.isfinite(norm)))", f"{REPLAYS}[rnp recover]"),
    Mutation("a state without updates frees what a graph writes to", "engine/update.py",
             "if parameter not in self.optimizer.state:", "if False:",
             "unit/test_update.py::test_the_state_of_no_update_is_loaded_in_place_too[adam]"),
    Mutation("I-BAU's graphs warm up its inner optimizer for good", "methods/defend/ibau/step.py",
             ", *self.update.state(), *self.inner_update.state()]", ", *self.update.state()]",
             f"{REPLAYS}[ibau, adam inside, clamped]"),
    Mutation("a rejected vaccine frees the drafts that a graph writes to", "methods/defend/zskt/step.py",
             "self.vaccine.select()  #", "self.vaccine.select()\n            self.drafts = []  #",
             f"{REPLAYS}[zskt, vaccine rejected]"),
    Mutation("a resume draws a device's dropout anew", "engine/resume.py",
             "torch.cuda.set_rng_state(state.cpu(), device)", "pass",
             f"{RANDOM}::test_a_resume_goes_on_with_the_draws_of_every_device"),
    Mutation("a checkpoint forgets the devices' generators", "engine/trainer.py",
             '{"device_random": devices} if any(devices) else {}', "{}",
             f"{RANDOM}::test_a_resume_goes_on_with_the_draws_of_every_device"),
    Mutation("a resume draws dropout anew", "engine/resume.py",
             "torch.set_rng_state(self.random[rank].cpu())", "pass",
             f"{RANDOM}::test_a_resume_goes_on_with_the_draws_of_dropout"),
    Mutation("a resume gives every rank the first one's random state", "engine/resume.py",
             "self.random[rank].cpu()", "self.random[0].cpu()",
             f"{RANKS}::test_each_rank_goes_on_with_its_own_draws"),
    Mutation("ZeRO-3's padding comes before the numbers", "engine/zero.py",
             "[0, len(own) * self.ranks.world_size - value.numel()]",
             "[len(own) * self.ranks.world_size - value.numel(), 0]",
             "distributed/test_strategies.py::test_a_state_that_ranks_cannot_share_evenly_comes_back_in_its_place[zero3]"),
    Mutation("a probe's dropout is the same in every epoch", "methods/measure/probe.py",
             "key=[seed, epoch * self.num_batches + number]", "key=[seed, number]",
             f"{RANDOM}::test_a_probes_dropout_differs_between_epochs_batches_and_seeds"),
    Mutation("MIMIC estimates on the images that its critics were trained on", "methods/defend/mimic/information.py",
             "self.test_start = len(rows) - self.test_rows", "self.test_start = 0",
             f"{INFORMATION}::test_estimates_are_of_images_that_no_critic_was_trained_on"),
    Mutation("MIMIC's critics are trained on the held-out images too", "methods/defend/mimic/information.py",
             "self.train_rows, self.test_rows = len(rows) - held, held or len(rows)",
             "self.train_rows, self.test_rows = len(rows), held or len(rows)",
             f"{INFORMATION}::test_estimates_are_of_images_that_no_critic_was_trained_on"),
    Mutation("the monitor's memory and test images are swapped", "methods/pretrain/simclr.py",
             "(bank, bank_labels, _), (queries, labels, _) =", "(queries, labels, _), (bank, bank_labels, _) =",
             MONITOR),
    Mutation("the monitor takes another k", "methods/pretrain/simclr.py",
             "bank_labels, monitor.k, monitor.temperature", "bank_labels, monitor.k + 1, monitor.temperature",
             MONITOR),
    Mutation("the monitor's features are not normalised", "counts.py",
             "return functional.normalize(features.to(ranks.dtype), dim=1)", "return features.to(ranks.dtype)",
             MONITOR),
    Mutation("amsgrad is Adam", "engine/optim.py",
             " amsgrad=config.amsgrad,", "", "numerics/test_optimizers.py::test_updates_are_the_papers"),
    Mutation("a sweep's point cannot read its grandparent", "sweep/grid.py",
             "            parent = parent.parent\n", "            parent = None\n",
             f"{LINEAGE}::test_a_point_reads_its_grandparent_too"),
    Mutation("dropout does not follow the run's seed", "experiment.py",
             "torch.manual_seed(experiment.seed)", "torch.manual_seed(0)",
             f"{RANDOM}::test_a_networks_own_draws_follow_the_runs_seed"),
    Mutation("a vaccine's selection begins a batch late", "methods/defend/zskt/step.py",
             "number >= self.config.first_kept", "number > self.config.first_kept",
             "numerics/test_abd_steps.py::test_a_vaccine_is_selected_by_the_batches_from_the_generators_plus_the_students_steps_on"),
    Mutation("unlearning goes on at an accuracy of just the threshold", "methods/defend/rnp/__init__.py",
             "return self.accuracy <= self.config.clean_threshold",
             "return self.accuracy < self.config.clean_threshold",
             f"{COUNTS}::test_unlearning_stops_at_an_accuracy_of_just_the_threshold"),
    Mutation("unlearning that ends at just the threshold has failed", "methods/defend/rnp/__init__.py",
             "if self.accuracy <= self.config.clean_threshold:", "if self.accuracy < self.config.clean_threshold:",
             f"{COUNTS}::test_unlearning_that_reaches_the_threshold_in_its_last_epoch_has_not_failed"),
    Mutation("GTSRB's mean is another", "models/pixel_space.py",
             "(0.3403, 0.3121, 0.3214)", "(0.3337, 0.3064, 0.3171)", PUBLISHED),
    Mutation("RNP's clean_threshold is another", "methods/defend/rnp/options.py",
             "clean_threshold: float = 0.20", "clean_threshold: float = 0.25", PUBLISHED),
    Mutation("ABD's temperature for GTSRB is another", "methods/defend/zskt/options.py",
             '"temperature": 0.5,', '"temperature": 1.0,', PUBLISHED),
    Mutation("BadEncoder's augmentation flips less", "data/augment.py",
             "REFERENCE = AugmentConfig(flip=0.5", "REFERENCE = AugmentConfig(flip=0.4", PUBLISHED),
    Mutation("a child gets all signals again at each look", "launch.py",
             "received[told.get(child.pid, 0) :]", "received",
             "unit/test_launch.py::test_a_child_gets_each_signal_once_whatever_the_clock_says"),
    Mutation("ffcv is asked for images that no file holds", "data/loader.py",
             'config.backend == "ffcv" and dataset.is_made', 'config.backend == "ffcv" and False',
             "unit/test_data_loader.py::test_ffcv_speaks_of_files_not_of_images_with_a_trigger"),
    Mutation("RNP's masks are learned on the suspect's own weights", "methods/defend/rnp/__init__.py",
             "            masked.load_state_dict(unlearned.state_dict())\n", "", RNP_STEPS),
    Mutation("RNP's alpha is its rate", "methods/defend/rnp/__init__.py",
             "alpha=config.alpha", "alpha=config.recovering_lr", RNP_STEPS),
    Mutation("MIMIC measures the teacher whatever it is told", "methods/defend/mimic/__init__.py",
             'measured = teacher if config.information.source == "teacher" else student', "measured = teacher",
             f"{BUILT}::test_mimic_measures_the_network_that_it_is_told_to"),
    Mutation("BadEncoder takes no other constants for its shadow images", "methods/attack/badencoder.py",
             'if config.shadow_normalization != "match_encoder":', "if False:",
             f"{BUILT}::test_badencoders_shadow_images_are_normalised_as_told"),
    Mutation("BadEncoder's reference is not augmented", "methods/attack/badencoder.py",
             "View(config.augment, image=reference)", "View(image=reference)", f"{AUGMENTED}[badencoder]"),
    Mutation("RNP unlearns plain images", "methods/defend/pruning/plan.py",
             "(View(config.augment),)", "(View(),)", f"{AUGMENTED}[rnp]"),
    Mutation("one of SimCLR's views is plain", "methods/pretrain/simclr.py",
             "(View(config.augment), View(config.augment))", "(View(config.augment), View())", f"{AUGMENTED}[simclr]"),
    Mutation("OOD distils on plain images", "methods/defend/ood.py",
             "(View(config.augment),)", "(View(),)", f"{AUGMENTED}[ood]"),
    Mutation("a second stamping, as BadEncoder's objective had one", "methods/attack/badencoder.py",
             "[stamp_images(x, trigger) for", "[trigger.to(x.device, x.dtype)(x) for",
             "repo/test_stamping.py::test_images_are_stamped_in_one_place"),
    Mutation("the contact sheet rounds by its own rule", "data/sheet.py",
             "stamp_pixels(image[None], trigger)[0] for",
             "(trigger(torch.from_numpy(image) / 255) * 255).round().to(torch.uint8).numpy() for",
             "repo/test_stamping.py::test_images_are_stamped_in_one_place"),
    Mutation("stamped pixels are rounded, not truncated", "attacks/trigger.py",
             "(images * 255 + ROUNDING).floor()", "(images * 255).round()",
             "unit/test_stamping.py::test_pixels_are_truncated_as_published"),
    Mutation("a probe of another trigger than the card's", "methods/measure/probe.py",
             "measure(config.encoders, config.attack,", "measure(config.encoders, AttackConfig(BadNets()),",
             "unit/test_any_attack.py::test_a_probe_measures_the_attack_that_the_card_names"),
    Mutation("BadEncoder's card forgets the class of its reference", "methods/attack/badencoder.py",
             "replace(config.attack, target_class=int(classes[0]), rate=1.0)", "replace(config.attack, rate=1.0)",
             "unit/test_any_attack.py::test_badencoder_takes_any_trigger"),
    Mutation("a poisoned classifier is trained on clean images", "methods/pretrain/classifier.py",
             "        train, rows, config.update.batch_size", "        clean_train, rows, config.update.batch_size",
             f"{AUGMENTED}[classifier]"),
    Mutation("the norm of an update's gradient is not limited", "engine/context.py",
             "            max_grad_norm=update.max_grad_norm,\n", "",
             f"{BUILT}::test_an_updates_options_reach_the_step"),
    Mutation("a cosine ends an epoch late", "engine/step.py",
             "steps_per_epoch * epochs\n", "steps_per_epoch * (epochs + 1)\n",
             f"{BUILT}::test_an_updates_options_reach_the_step"),
    Mutation("the order of batches ignores the run's seed", "engine/context.py",
             '"seed": self.seed,', '"seed": 0,',
             f"{BUILT}::test_order_and_subsets_follow_the_runs_seed"),
    Mutation("a random subset ignores the run's seed", "engine/context.py",
             "select_rows(dataset, config, self.seed)", "select_rows(dataset, config, 0)",
             f"{BUILT}::test_order_and_subsets_follow_the_runs_seed"),
    Mutation("self-retrospection starts a batch late", "methods/defend/zskt/step.py",
             "number >= self.retrospection.config.start", "number > self.retrospection.config.start", STARTS),
    Mutation("self-retrospection goes on with the old Adam", "methods/defend/zskt/step.py",
             "            student.forget()\n", "            pass\n", STARTS),
    Mutation("self-retrospection's cosine counts from the first batch", "methods/defend/zskt/step.py",
             "number - start, 1, total - start", "number, 1, total", STARTS),
    Mutation("the same images carry delta in every batch", "methods/defend/zskt/step.py",
             "patched(self.own, number, step)", "patched(self.own, 0, 0)", STARTS),
    Mutation("late epochs repeat the first ones", "methods/defend/abd/epochs.py",
             "self.first + epoch, start_batch", "epoch, start_batch",
             "numerics/test_abd_steps.py::test_later_epochs_are_those_of_the_source"),
    Mutation("a vaccine of OOD and CMI is selected from another batch on", "methods/defend/abd/epochs.py",
             "FIRST_KEPT = 11", "FIRST_KEPT = 10", PUBLISHED),
    Mutation("the input-aware attack's rates never fall", "methods/attack/input_aware.py",
             "update.follow(at.done(self.steps_per_epoch), ", "update.follow(0, ",
             "unit/test_input_aware.py::test_the_joint_stages_rates_follow_their_schedules"),
    Mutation("a probe shuffles", "methods/measure/probe.py",
             "epoch, self.config.shuffle)", "epoch, True)",
             f"{RANDOM}::test_a_probe_reads_in_order_unless_it_is_told_to_shuffle"),
    Mutation("negative estimates of MIMIC count", "methods/defend/mimic/information.py",
             ".nan_to_num(0.0).clamp(min=0)", ".nan_to_num(0.0)",
             f"{INFORMATION}::test_an_estimate_is_the_mean_of_its_batches_negative_and_undefined_ones_as_zero"),
    Mutation("RNP stops at just the allowed loss", "methods/defend/pruning/outcome.py",
             "if count < right[0]", "if count <= right[0]",
             "numerics/test_rnp_pruning.py::test_the_defender_stops_before_accuracy_falls"),
    Mutation("a model may be the last to hold its process group, and its rank hangs", "engine/dist.py",
             "        _groups.append(group)", "        pass",
             "distributed/test_ranks.py::test_a_rank_whose_model_outlives_its_group_ends"),
    Mutation("ANP's perturbations go downhill", "methods/defend/anp.py",
             "+ rate * slope.sign()", "- rate * slope.sign()",
             "numerics/test_anp.py::test_updates_are_the_published_ones[preact_resnet18]"),
    Mutation("ANP's masks leave [0, 1]", "methods/defend/anp.py",
             "                mask.clamp_(0, 1)\n", "                pass\n",
             "numerics/test_anp.py::test_updates_are_the_published_ones[preact_resnet18]"),
    Mutation("CLP prunes a channel of exactly u deviations", "methods/defend/clp.py",
             "score < -u for", "score <= -u for",
             "numerics/test_clp.py::test_the_sweep_begins_with_the_fewest_and_prunes_strictly_above_u"),
    Mutation("CLP's deviation is over all channels, not all but one", "methods/defend/clp.py",
             "max(len(off) - 1, 1)", "len(off)",
             "numerics/test_clp.py::test_each_u_prunes_the_published_channels[resnet18]"),
    Mutation("a pruned channel of CLP passes its beta", "methods/defend/clp.py",
             "prune_beta: bool = True", "prune_beta: bool = False", PUBLISHED),
    Mutation("a pruning method's rows are RNP's", "methods/defend/pruning/outcome.py",
             "context.method + ORACLE", '"rnp" + ORACLE', "numerics/test_clp.py::test_a_run_without_data"),
    Mutation("the oracle's budget holds its bound", "methods/defend/pruning/outcome.py",
             "< acc_ratio * base", "<= acc_ratio * base",
             "numerics/test_rnp_pruning.py::test_the_oracle_takes_the_lowest_asr_within_its_budget"),
    Mutation("overrides behind the first option are lost", "arguments.py",
             "[args.config, *args.overrides, *rest]", "[args.config, *args.overrides]",
             "unit/test_cli.py::test_overrides_stand_anywhere_and_keep_their_order"),
    Mutation("importing the package imports torch", "tv_compat.py",
             "import sys\nfrom importlib", "import sys\n\nimport torch  # noqa: F401\nfrom importlib",
             "unit/test_cli.py::test_the_package_imports_next_to_nothing"),
    Mutation("BackdoorBench's interface has its yaml file's ratio for the documented one", "compat/backdoorbench.py",
             '"ratio": 0.1,', '"ratio": 0.01,', f"{COMPAT}::test_defaults_are_the_documented_ones[rnp]"),
    Mutation("BackdoorBench's RC is the ASR", "compat/backdoorbench.py", '"RC": counts.ra', '"RC": counts.asr', SCRIPT),
    Mutation("BackdoorBench's yaml file wins over the command line", "compat/parameters.py",
             "{**read, **given}.items()", "{**given, **read}.items()",
             f"{COMPAT}::test_a_yaml_file_stands_between_flags_and_documentation"),
    Mutation("index.txt has the rows of the prepared data, not the source's", "compat/backdoorbench.py",
             "train.source_rows[self._chosen(train)]", "self._chosen(train)",
             f"{COMPAT}::test_i_bau_takes_the_images_of_an_index"),
    Mutation("an attack result is not read again when its pictures have come", "compat/backdoorbench.py",
             '.is_file() or not triggered.is_file():', '.is_file():',
             f"{COMPAT}::test_pictures_that_are_missing_may_come_later"),
    Mutation("BackdoorBench's table by number has what is pruned for what it says", "compat/backdoorbench.py",
             'stop["pruned"] - math.ceil(self.args.pruning_step)', 'stop["pruned"]',
             f"{COMPAT}::test_the_table_by_number_is_counted_as_there"),
    Mutation("an evaluation is written into the progress bar", "terminal.py",
             "bars.tqdm.external_write_mode(unguarded(sys.stderr))", "contextlib.nullcontext()",
             "unit/test_progress.py::test_a_terminal_shows_scalars_evaluations_and_the_outcome"),
    Mutation("a resume measures what is half done as the suspect", "engine/trainer.py",
             "if self.position == Position():", "if at_start:",
             "unit/test_progress.py::test_a_resume_does_not_take_what_is_half_done_for_the_suspect"),
    Mutation("trackers get shares for percent", "engine/tracking.py",
             "100 * row[name]", "row[name]", "unit/test_progress.py::test_trackers_get_the_final_metrics"),
    Mutation("a model folder of others has a module imported", "plugins.py",
             "if text not in (_named_by_user | installed) and not {text, module} & named:",
             "if False and not {text, module} & named:",
             f"{PLUGINS}::test_a_model_folder_cannot_have_a_module_imported"),
    Mutation("all that an allowed module's name begins with is allowed", "plugins.py",
             "not {text, module} & named:", "not any(module.startswith(word) for word in named):",
             f"{PLUGINS}::test_another_module_that_is_allowed_opens_nothing"),
    Mutation("of two plug-ins of one name the first wins", "plugins.py",
             "if len(found) + (name in built_in) > 1:", "if found and name in built_in:",
             f"{PLUGINS}::test_two_packages_with_one_name"),
    Mutation("a plug-in silently replaces a method of ours", "plugins.py",
             "if len(found) + (name in built_in) > 1:", "if len(found) > 1:",
             f"{PLUGINS}::test_a_name_of_ours[methods-ibau-<lambda>]"),
    Mutation("--help, --version and lists need a package", "keys.py",
             "import typing\nfrom collections", "import typing\n\nimport yaml\nfrom collections",
             "e2e/test_pythons.py::test_help_version_lists_and_init_need_no_package"),
    Mutation("init writes over what its user changed", "templates/__init__.py",
             "if place.exists() or place.is_symlink():", "if place.is_symlink():",
             "unit/test_templates.py::test_init_is_for_this_folder_and_leaves_alone_what_is_there"),
    Mutation("an installed package takes what lies beside it for its own files", "templates/__init__.py",
             "(_HERE / part, _HERE.parents[1] / part)", "(_HERE.parents[1] / part, _HERE / part)",
             "unit/test_templates.py::test_the_package_prefers_its_own_copy"),
)  # fmt: skip


def mutated(text: str, mutation: Mutation) -> str:
    """The file with the mistake. ValueError unless ``old`` is there exactly once and ``new`` is another text."""
    if text.count(mutation.old) != 1 or mutation.old == mutation.new:
        raise ValueError(f"{mutation.file}: {mutation.old!r} is there {text.count(mutation.old)} times")
    return text.replace(mutation.old, mutation.new)


def outcome(tree: Path, mutation: Mutation) -> str:
    """Make the mistake in a copy of the tree, run its test, take the mistake back: "noticed" or what else came."""
    file = tree / "dist_defend" / mutation.file
    plain = file.read_text(encoding="utf-8")
    file.write_text(mutated(plain, mutation), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    own = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end in {SECONDS} s"
    finally:
        file.write_text(plain, encoding="utf-8")
    if done.returncode == 0:
        return "SURVIVED"
    has_failed = any(line.startswith("FAILED") for line in done.stdout.splitlines())  # not just could not start
    return "noticed" if has_failed else f"pytest ended with {done.returncode}: {done.stdout[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the mutations to make, counted from 0")
    options = parser.parse_args()
    numbers = options.only or range(len(MUTATIONS))
    if options.list:
        print("| | wrong | file | test |\n|---|---|---|---|")
        for number in numbers:
            wrong, file, _, _, test = MUTATIONS[number]
            print(f"| {number} | {wrong} | {file} | {test} |")
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            source, copy = ROOT / part, Path(folder) / part
            shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        for number in numbers:
            found = outcome(Path(folder), MUTATIONS[number])
            survived += found != "noticed"
            print(f"{number} {MUTATIONS[number].wrong}: {found}", flush=True)
    print(f"{survived} not noticed of {len(numbers)}")
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
