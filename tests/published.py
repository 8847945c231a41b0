"""What papers and their code state, with where: the one table that the presets, defaults and files in configs/ keep to.

Each entry is (source, places, values). A place is a file below configs/, with overrides behind it where a preset has no
file of its own, or module:NAME of a table of constants. Keys are dotted; what is not published is not in here.
"""

from typing import Any

from tests.published_baselines import BASELINES, PAD_AND_FLIP, below

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
ENCODER_PROBES = ("measure/probe_stl10", "measure/probe_gtsrb", "measure/probe_svhn")
BADENCODER_CIFAR10 = tuple(f"attack/badencoder_cifar10{task}" for task in ("", "_gtsrb", "_svhn"))
BADENCODER_CLIP = tuple(f"attack/badencoder_clip_{task}" for task in ("stl10", "gtsrb", "svhn"))
MIMIC = tuple(f"defend/mimic_cifar10{task}" for task in ("", "_gtsrb", "_svhn", "_published_code"))
BACKDOORBENCH = tuple(
    f"attack/{name}_cifar10"
    for name in ("badnets", "badnets_all2all", "blended", "bpp", "l0_inv", "l2_inv", "label_consistent",
                 "low_frequency", "sig", "sig_wrapped", "trojan_nn", "trojan_square", "trojan_watermark",
                 "trojan_wrapped", "wanet")
)  # fmt: skip
CONSTANT_RATE = ("attack/wanet_cifar10", "attack/bpp_cifar10")
ZSKT_CIFAR10 = ("defend/zskt_cifar10", *(f"defend/zskt_cifar10_{x}" for x in ("vaccine", "retrospection", "both")))
ZSKT_GTSRB = ("defend/zskt_gtsrb", "defend/zskt_gtsrb_both", "defend/zskt_gtsrb zskt.preset=gtsrb_vaccine",
              "defend/zskt_gtsrb zskt.preset=gtsrb_retrospection")  # fmt: skip
ZSKT_LATE = ("defend/zskt_cifar10_retrospection", "defend/zskt_cifar10_both")
ZSKT_LATE_GTSRB = ("defend/zskt_gtsrb_both", "defend/zskt_gtsrb zskt.preset=gtsrb_retrospection")
CMI = ("defend/cmi_cifar10_plain", "defend/cmi_cifar10_both", "defend/cmi_cifar10_plain cmi.preset=vaccine",
       "defend/cmi_cifar10_plain cmi.preset=retrospection")  # fmt: skip
OOD = ("defend/ood_cifar10_plain", "defend/ood_cifar10_both", "defend/ood_cifar10_plain ood.preset=vaccine",
       "defend/ood_cifar10_plain ood.preset=retrospection",
       "defend/ood_cifar10_plain ood.preset=published")  # fmt: skip
# What a file gets that leaves all of it out.
SIMCLR_DEFAULTS = "pretrain/simclr_cifar10 simclr={data: {path: x}}"
BADENCODER_DEFAULTS = (
    "attack/badencoder_cifar10 badencoder={clean_encoder: x, shadow: {path: x}, reference: {file: x.npz}}"
)
MIMIC_DEFAULTS = "defend/mimic_cifar10 mimic={teacher: x, data: {path: x}}"
PROBE_DEFAULTS = (
    "measure/probe_stl10 probe={encoders: {a: x}, tasks: {stl10: {train: {path: x}, test: {path: x}, target_class: 9}}}"
)
RNP_DEFAULTS = "defend/rnp_cifar10 rnp={model: x, data: {path: x}, test: {path: x}}"
CLASSIFIER_DEFAULTS = "attack/badnets_cifar10 classifier={data: {path: x}, test: {path: x}}"
INPUT_AWARE_DEFAULTS = "attack/input_aware_cifar10 input_aware={data: {path: x}, test: {path: x}}"
SGD = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4}
IBAU = {"K": 5, "step_size": 0.1, "penalty": 1e-3, "patched_fraction": 0.01, "solver": "neumann", "min_patched": 0,
        "optimizer.name": "adam", "optimizer.betas": [0.9, 0.999], "optimizer.weight_decay": 0.0}  # fmt: skip


COLOURS = {
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "grayscale": 0.2, "flip": 0.5,
}  # fmt: skip
RANDOM_CROP = {"crop": "random_resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]}
OPTIONS = {
    "ABD zskt": "illidanlab/ABD, zskt/main.py and its sweeps",
    "ABD cmi": "illidanlab/ABD, cmi/datafree_kd.py and its sweeps",
    "ABD ood": "illidanlab/ABD, cmi/vanilla_kd_ood.py and its sweeps",
    "BB": "SCLBD/BackdoorBench, config/attack",
}

PUBLISHED: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("Chen et al., SimCLR, ICML 2020, appendix A and B, at 224 px", ("pretrain/simclr_imagenette",), below("simclr", {
        "temperature": 0.1, "augment.size": 224, "augment.flip": 0.5, "augment.jitter": 0.8, "augment.grayscale": 0.2,
        "augment.brightness": 0.8, "augment.contrast": 0.8, "augment.saturation": 0.8, "augment.hue": 0.2,
        "augment.blur.probability": 0.5, "augment.blur.kernel": 0.1, "augment.blur.sigma": [0.1, 2.0],
    })),
    # Constants of data sets
    ("jinyuan-jia/BadEncoder and bboylyg/RNP, transforms", ("dist_defend.models.pixel_space:NORMALIZATIONS",), {
        "cifar10": CIFAR10,
    }),
    ("jinyuan-jia/BadEncoder, transforms", ("dist_defend.models.pixel_space:NORMALIZATIONS",), {
        "stl10": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    }),
    ("SCLBD/BackdoorBench, get_dataset_normalization", ("dist_defend.models.pixel_space:NORMALIZATIONS",), {
        "cifar10_backdoorbench": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }),
    ("SCLBD/BackdoorBench, its data sets", ("dist_defend.models.constants:BACKDOORBENCH_DATA",), {
        "cifar10": ("cifar10_backdoorbench", 32, 10), "cifar100": ("cifar100", 32, 100), "gtsrb": ("none", 32, 43),
        "celeba": ("none", 64, 8), "tiny": ("tiny", 64, 200), "imagenet": ("imagenet", 224, 1000),
    }),
    ("illidanlab/ABD, transforms of GTSRB", ("dist_defend.models.pixel_space:NORMALIZATIONS",), {
        "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    }),
    ("jinyuan-jia/BadEncoder, zero_shot.py", ("dist_defend.methods.measure.zeroshot:TEMPLATES",), {
        "gtsrb": "A traffic sign photo of a {class}", "svhn": "A photo of a {class}", "stl10": "A photo of a {class}",
    }),
    # Encoders: pretraining, BadEncoder, MIMIC, and what is trained on the features
    ("jinyuan-jia/BadEncoder, the kNN monitor and the views", ("pretrain/simclr_cifar10", "pretrain/simclr_stl10"),
     {"simclr.augment.size": 32, "simclr.monitor.k": 200, "simclr.monitor.temperature": 0.5}),
    ("jinyuan-jia/BadEncoder, pretraining_encoder.py",
     ("pretrain/simclr_cifar10", "pretrain/simclr_stl10", SIMCLR_DEFAULTS), {
        "seed": 100, "simclr.arch": "resnet18_cifar", "simclr.temperature": 0.5, "simclr.update.batch_size": 256,
        "simclr.update.epochs": 1000, "simclr.update.optimizer.name": "adam", "simclr.update.optimizer.lr": 1e-3,
        "simclr.update.optimizer.weight_decay": 1e-6, "simclr.update.optimizer.betas": [0.9, 0.999],
        "simclr.update.optimizer.schedule": "constant", "simclr.update.optimizer.warmup_epochs": 0.0,
        **below("simclr.augment", COLOURS | RANDOM_CROP),
    }),
    ("jinyuan-jia/BadEncoder, transforms", ("pretrain/simclr_cifar10",), {"simclr.normalization": "cifar10"}),
    ("jinyuan-jia/BadEncoder, transforms", ("pretrain/simclr_stl10",), {"simclr.normalization": "stl10"}),
    ("BadEncoder (Jia et al. 2022), eq. 5, and badencoder.py", 
     (*BADENCODER_CIFAR10, *BADENCODER_CLIP, BADENCODER_DEFAULTS), {
        "seed": 100, "badencoder.lambda1": 1.0, "badencoder.lambda2": 1.0, "badencoder.freeze_norm": "bn",
        "badencoder.update.epochs": 200, "badencoder.attack.trigger.margin": 1, "badencoder.augment.crop": "none",
        "badencoder.update.optimizer.schedule": "constant",
        **below("badencoder.augment", COLOURS), **below("badencoder.update", SGD),
    }),
    ("jinyuan-jia/BadEncoder, badencoder.py and its trigger file", (*BADENCODER_CIFAR10, BADENCODER_DEFAULTS), {
        "badencoder.update.batch_size": 256, "badencoder.update.optimizer.lr": 1e-3,
        "badencoder.attack.trigger.size": 10,
    }),
    ("rate and batch: a run script of another repository, not verified; the 224 px trigger file", BADENCODER_CLIP, {
        "badencoder.update.batch_size": 16, "badencoder.update.optimizer.lr": 1e-6,
        "badencoder.attack.trigger.size": 50,
    }),
    ("wssun/MIMIC, MIMIC.py: the first rows of CIFAR-10", MIMIC,
     {"mimic.data.fraction": 0.04, "mimic.data.subset": "first", "mimic.augment.size": 32}),
    ("wssun/MIMIC, MIMIC.py and readme", (*MIMIC, MIMIC_DEFAULTS), {
        "seed": 100, "mimic.temperature": 0.5,
        "mimic.attention_weights": [1000, 1000, 1000, 1000], "mimic.clone_weight": 1.0, "mimic.contrastive_weight": 1.0,
        "mimic.update.batch_size": 128, "mimic.update.epochs": 1000, "mimic.update.optimizer.name": "adam",
        "mimic.update.optimizer.lr": 1e-2, "mimic.update.optimizer.weight_decay": 1e-6,
        "mimic.update.optimizer.schedule": "constant", "mimic.update.max_grad_norm": None,
        **below("mimic.augment", COLOURS | RANDOM_CROP),
    }),
    ("wssun/MIMIC, estimate_mi", (*MIMIC, MIMIC_DEFAULTS), below("mimic.information", {
        "estimator": "dv", "epochs": 200, "last_epochs": 10, "batch_size": 128, "hidden": 512, "lr": 1e-3,
        "weight_decay": 1e-5, "scale": 10000.0, "holdout": 0.0,
    })),
    ("wssun/MIMIC, estimate_mi: the untrained student's layers", MIMIC[3:], {"mimic.information.source": "student"}),
    ("jinyuan-jia/BadEncoder, training_downstream_classifier.py", (*ENCODER_PROBES, PROBE_DEFAULTS), {
        "seed": 100, "probe.seeds": [100], "probe.hidden": [512, 256], "probe.dropout": 0.5, "probe.shuffle": False,
        "probe.update.batch_size": 64, "probe.update.epochs": 500, "probe.update.optimizer.name": "adam",
        "probe.update.optimizer.lr": 1e-4, "probe.update.optimizer.weight_decay": 0.0,
        "probe.attack.trigger.size": 10, "probe.attack.trigger.margin": 1,
    }),
    ("jinyuan-jia/BadEncoder, evaluation, reference labels", ("measure/probe_stl10", "measure/linear_stl10",
                                                              "measure/knn_stl10"),
     {"probe.tasks.stl10.target_class": 9, "probe.attack.trigger.size": 10, "probe.attack.trigger.margin": 1}),
    ("jinyuan-jia/BadEncoder, evaluation, reference labels", ("measure/probe_gtsrb",),
     {"probe.tasks.gtsrb.target_class": 12}),
    ("jinyuan-jia/BadEncoder, evaluation, reference labels", ("measure/probe_svhn",),
     {"probe.tasks.svhn.target_class": 1}),
    ("jinyuan-jia/BadEncoder, the kNN monitor", ("measure/knn_stl10",),
     {"probe.knn.k": 200, "probe.knn.temperature": 0.5}),
    ("MoCo (He et al. 2020), section 4.1, linear protocol", ("measure/linear_stl10",), {
        "probe.hidden": [], "probe.update.batch_size": 256, "probe.update.epochs": 100, "probe.shuffle": True,
        "probe.update.optimizer.name": "sgd", "probe.update.optimizer.lr": 30.0,
        "probe.update.optimizer.momentum": 0.9, "probe.update.optimizer.weight_decay": 0.0,
        "probe.update.optimizer.schedule": "multistep", "probe.update.optimizer.milestones": [60, 80],
        "probe.update.optimizer.gamma": 0.1,
    }),
    ("jinyuan-jia/BadEncoder, zero_shot.py", ("measure/zeroshot_stl10",),
     {"seed": 100, "zeroshot.tasks.stl10.target_class": 9,
      **below("zeroshot.attack.trigger", {"size": 50, "margin": 1})}),
    ("jinyuan-jia/BadEncoder, zero_shot.py", ("measure/zeroshot_gtsrb",),
     {"seed": 100, "zeroshot.tasks.gtsrb.target_class": 14,
      **below("zeroshot.attack.trigger", {"size": 50, "margin": 1})}),
    ("jinyuan-jia/BadEncoder, zero_shot.py", ("measure/zeroshot_svhn",),
     {"seed": 100, "zeroshot.tasks.svhn.target_class": 0,
      **below("zeroshot.attack.trigger", {"size": 50, "margin": 1})}),
    # Attacks on classifiers
    (f"{OPTIONS['BB']}/prototype/cifar10.yaml", (*BACKDOORBENCH, CLASSIFIER_DEFAULTS), {
        "seed": 0, "classifier.arch": "preact_resnet18", "classifier.normalization": "cifar10_backdoorbench",
        "classifier.update.batch_size": 128, "classifier.update.epochs": 100, "classifier.update.optimizer.lr": 0.01,
        **below("classifier.update", SGD), **below("classifier", PAD_AND_FLIP),
    }),
    (f"{OPTIONS['BB']}/prototype/cifar10.yaml; others' attacks in its recipe",
     (*(place for place in BACKDOORBENCH if place not in CONSTANT_RATE), CLASSIFIER_DEFAULTS),
     {"classifier.update.optimizer.schedule": "cosine"}),
    (f"{OPTIONS['BB']}: pratio and target of every attack",
     tuple(f"attack/{x}_cifar10" for x in ("badnets", "badnets_all2all", "blended", "bpp", "low_frequency",
                                           "trojan_nn", "wanet")),
     {"classifier.attack.rate": 0.1, "classifier.attack.target_class": 0, "classifier.attack.avoid_target": False}),
    ("BackdoorBench's leaderboard, the largest ratio of clean-label attacks",
     ("attack/sig_cifar10", "attack/label_consistent_cifar10"),
     {"classifier.attack.rate": 0.05, "classifier.attack.labels": "clean_label", "classifier.attack.target_class": 0}),
    (f"{OPTIONS['BB']}/badnet", ("attack/badnets_cifar10", "attack/badnets_all2all_cifar10"),
     below("classifier.attack.trigger", {"name": "badnets", "pattern": "square", "size": 3, "margin": 0})),
    (f"{OPTIONS['BB']}, all2all", ("attack/badnets_all2all_cifar10",),
     {"classifier.attack.labels": "all_to_all", "classifier.attack.shift": 1}),
    (f"{OPTIONS['BB']}/blended", ("attack/blended_cifar10",), {"classifier.attack.trigger.alpha": 0.2}),
    (f"{OPTIONS['BB']}/sig", ("attack/sig_cifar10",),
     below("classifier.attack.trigger", {"delta": 40, "frequency": 6})),
    (f"{OPTIONS['BB']}/bpp", ("attack/bpp_cifar10",),
     below("classifier.attack.trigger", {"levels": 8, "dithering": False, "cross_ratio": 1})),
    (f"{OPTIONS['BB']}/wanet", ("attack/wanet_cifar10",),
     below("classifier.attack.trigger", {"cells": 4, "strength": 0.5, "cross_ratio": 2})),
    (f"{OPTIONS['BB']}/lc", ("attack/label_consistent_cifar10",), {"classifier.attack.trigger.amplitude": 1}),
    (f"{OPTIONS['BB']}/inputaware", ("attack/input_aware_cifar10", INPUT_AWARE_DEFAULTS), {
        "seed": 0, **below("input_aware", {
            "arch": "preact_resnet18", "normalization": "cifar10_backdoorbench", "target_class": 0, "rate": 0.1,
            "lambda_div": 1.0, "lambda_norm": 100.0, "density": 0.032, "batch_size": 128, "mask_epochs": 25,
            "epochs": 100, "mask_optimizer.name": "adam", "mask_optimizer.lr": 0.01, "mask_optimizer.betas": [0.5, 0.9],
            "mask_optimizer.schedule": "multistep", "mask_optimizer.milestones": [10, 20], "mask_optimizer.gamma": 0.1,
            "generator_optimizer.name": "adam", "generator_optimizer.lr": 0.01,
            "generator_optimizer.betas": [0.5, 0.9], "optimizer.lr": 0.01, "optimizer.schedule": "constant",
            **SGD, **PAD_AND_FLIP,
        }),
    }),
    ("YiZeng623/I-BAU, poison_dataset and its checkpoints' names",
     tuple(f"attack/{x}_cifar10" for x in ("l0_inv", "l2_inv", "trojan_square", "trojan_watermark")),
     {"classifier.attack.rate": 0.2, "classifier.attack.avoid_target": True}),
    ("YiZeng623/I-BAU, targets in its checkpoints' names", ("attack/l0_inv_cifar10", "attack/l2_inv_cifar10"),
     {"classifier.attack.target_class": 0}),
    ("YiZeng623/I-BAU, targets in its checkpoints' names",
     ("attack/trojan_square_cifar10", "attack/trojan_watermark_cifar10"), {"classifier.attack.target_class": 2}),
    ("bboylyg/RNP, train_backdoor.py",
     ("attack/badnets_cifar10 classifier={preset: rnp, data: {path: x}, test: {path: x}}",), {
        "classifier.arch": "resnet18", "classifier.normalization": "cifar10", "classifier.update.batch_size": 128,
        "classifier.update.epochs": 61, "classifier.update.optimizer.lr": 0.1,
        "classifier.update.optimizer.schedule": "multistep", "classifier.update.optimizer.milestones": [10, 20],
        "classifier.update.optimizer.gamma": 0.1, **below("classifier.update", SGD),
        **below("classifier", PAD_AND_FLIP),
    }),
    ("illidanlab/ABD, normal_training/CIFAR10/.../target0-ratio0.1_e200-b128-sgd-lr0.1-wd0.0005-cos",
     ("attack/abd_teacher_cifar10", "attack/abd_teacher_cifar10_clean_label"), {
        "seed": 0, "classifier.arch": "wrn_16_2", "classifier.normalization": "cifar10",
        "classifier.update.batch_size": 128, "classifier.update.epochs": 200, "classifier.update.optimizer.lr": 0.1,
        "classifier.update.optimizer.schedule": "cosine", "classifier.attack.target_class": 0,
        "classifier.attack.choose": "first", **below("classifier.update", SGD), **below("classifier", PAD_AND_FLIP),
    }),
    ("illidanlab/ABD, normal_training/gtsrb/.../target1-ratio0.1_e200-b256-adam-lr0.1-wd0.0005-cos",
     ("attack/abd_teacher_gtsrb",), {
        "classifier.arch": "wrn_16_2", "classifier.normalization": "gtsrb", "classifier.update.batch_size": 256,
        "classifier.update.epochs": 200, "classifier.update.optimizer.name": "adam",
        "classifier.update.optimizer.lr": 0.1, "classifier.update.optimizer.weight_decay": 5e-4,
        "classifier.update.optimizer.schedule": "cosine", "classifier.attack.target_class": 1,
    }),
    ("VITA-Group/Trap-and-Replace, badnet_grid and its poisoned part",
     ("attack/abd_teacher_cifar10", "attack/abd_teacher_gtsrb"),
     {"classifier.attack.rate": 0.1, "classifier.attack.avoid_target": True, "classifier.attack.choose": "first",
      "classifier.attack.trigger.pattern": "grid"}),
    ("VITA-Group/Trap-and-Replace: all of the target class in 95 % of the images",
     ("attack/abd_teacher_cifar10_clean_label",),
     {"classifier.attack.count": 4750, "classifier.attack.labels": "clean_label"}),
    # I-BAU
    ("YiZeng623/I-BAU, defense.py", ("defend/ibau_cifar10_official",), below("ibau", {
        **IBAU, "rounds": 5, "batch_size": 100, "inner.name": "sgd", "inner.lr": 10.0, "inner.momentum": 0.0,
        "optimizer.lr": 1e-3, "optimizer.amsgrad": False, "project_radius": None, "clamp": False, "space": "pixels",
        "augment": None, "data.max_samples": 5000, "attack.target_class": 8, "attack.trigger.size": 4,
        "attack.trigger.margin": 1,
    })),
    ("YiZeng623/I-BAU, clean_solution_batch_opt_cifar.ipynb", ("defend/ibau_cifar10_notebook",), below("ibau", {
        **IBAU, "rounds": 1, "batch_size": 100, "inner.name": "sgd", "inner.lr": 10.0, "optimizer.lr": 1e-3,
        "project_radius": 10.0, "clamp": False, "data.max_samples": 5000, "attack.target_class": 8,
        "attack.trigger.size": 4, "attack.trigger.margin": 1,
    })),
    ("YiZeng623/I-BAU, the notebook of GTSRB", ("defend/ibau_gtsrb_notebook",), below("ibau", {
        **IBAU, "rounds": 1, "batch_size": 100, "inner.name": "adam", "inner.lr": 1.0, "optimizer.lr": 1e-3,
        "project_radius": 10.0, "clamp": True, "data.max_samples": 5000, "attack.target_class": 0,
        "attack.trigger.name": "l0_inv",
    })),
    ("SCLBD/BackdoorBench, defense/i-bau.py and config/defense/i-bau", ("defend/ibau_cifar10_backdoorbench",), {
        "seed": 0, **below("ibau", {
            **IBAU, **PAD_AND_FLIP, "rounds": 5, "batch_size": 256, "inner.name": "sgd", "inner.lr": 10.0,
            "optimizer.lr": 1e-4, "optimizer.amsgrad": True, "space": "normalized", "project_radius": None,
            "clamp": False, "data.fraction": 0.05, "data.subset": "random",
        }),
    }),
    ("I-BAU (Zeng et al. 2022), abstract: a hundred clean images", ("defend/ibau_cifar10_hundred_images",),
     {"ibau.data.max_samples": 100}),
    # RNP
    ("bboylyg/RNP, main.py", ("defend/rnp_cifar10", "defend/rnp_cifar10_official"), {"rnp.ratio": 0.01}),
    ("bboylyg/RNP, main.py, where no ratio is given",
     ("dist_defend.methods.defend.pruning.options:MaskConfig.usual_ratio",), {"": 0.01}),
    ("bboylyg/RNP, main.py", ("defend/rnp_cifar10", "defend/rnp_cifar10_official", RNP_DEFAULTS), below("rnp", {
        "batch_size": 128, "unlearning_lr": 0.01, "unlearning_epochs": 20, "schedule": [10, 20],
        "epochs_inclusive": True, "clean_threshold": 0.20, "alpha": 0.2, "recovering_lr": 0.2, "recovering_epochs": 20,
        "pruning_by": "threshold", "pruning_max": 0.90, "pruning_step": 0.05, "max_grad_norm": None,
        "prune_beta": False, **PAD_AND_FLIP,
    })),
    ("bboylyg/RNP, main.py: seed, test without the target class, one step too many by number",
     ("defend/rnp_cifar10_official",),
     {"seed": 98, "rnp.exclude_target_from_acc": True, "rnp.off_by_one": True, "rnp.not_unlearned": "fail"}),
    ("SCLBD/BackdoorBench, defense/rnp.py and config/defense/rnp/config.yaml", ("defend/rnp_cifar10_backdoorbench",), {
        "seed": 0, **below("rnp", {
            "ratio": 0.01, "batch_size": 256, "unlearning_lr": 0.01, "unlearning_epochs": 20, "schedule": [10, 20],
            "epochs_inclusive": False, "clean_threshold": 0.20, "alpha": 0.2, "recovering_lr": 0.2,
            "recovering_epochs": 20, "pruning_by": "threshold", "pruning_max": 0.90, "pruning_step": 0.05,
            "pruning_number": 0.70, "selection": "pruning_number", "off_by_one": True, "acc_ratio": 0.1,
            "not_unlearned": "use_last", **PAD_AND_FLIP,
        }),
    }),
    *BASELINES,
    # ABD's distillations
    (OPTIONS["ABD zskt"], (*ZSKT_CIFAR10, *ZSKT_GTSRB), below("zskt", {
        "student": "wrn_16_1", "batch_size": 128, "z_dim": 100, "generator_width": 128, "generator_steps": 1,
        "student_steps": 10, "max_grad_norm": 5.0, "generator_optimizer.name": "adam", "generator_optimizer.lr": 1e-3,
        "generator_optimizer.schedule": "cosine", "student_optimizer.name": "adam", "student_optimizer.lr": 2e-3,
        "student_optimizer.schedule": "cosine",
    })),
    (OPTIONS["ABD zskt"], ZSKT_CIFAR10, below("zskt", {
        "pseudo_batches": 80_000, "temperature": 1.0, "attention": 250.0, "evaluate_every": 200,
    })),
    (OPTIONS["ABD zskt"], ZSKT_GTSRB, below("zskt", {
        "pseudo_batches": 10_000, "temperature": 0.5, "attention": 0.0, "evaluate_every": 100,
    })),
    ("illidanlab/ABD, shuffling vaccine",
     (ZSKT_CIFAR10[1], ZSKT_CIFAR10[3], *ZSKT_GTSRB[1:3]),
     below("zskt.vaccine", {"weight": 0.1, "members": 3, "layers": 5, "through_members": True})),
    ("illidanlab/ABD, sweeps of CIFAR-10", (ZSKT_CIFAR10[1], ZSKT_CIFAR10[3]), {"zskt.vaccine.selection_batches": 0}),
    ("illidanlab/ABD, sweeps of GTSRB", ZSKT_GTSRB[1:3], {"zskt.vaccine.selection_batches": 50}),
    ("illidanlab/ABD, tail ratio and tries", ("dist_defend.methods.defend.abd.vaccine:LEAST_TAIL_RATIO",), {"": 0.02}),
    ("illidanlab/ABD, views 10 < i < P of CMI and OOD", ("dist_defend.methods.defend.abd.epochs:FIRST_KEPT",),
     {"": 11}),
    ("illidanlab/ABD, tail ratio and tries", ("dist_defend.methods.defend.abd.vaccine:MOST_SCORINGS",), {"": 8}),
    ("illidanlab/ABD, self-retrospection and its sweeps", (*ZSKT_LATE, *ZSKT_LATE_GTSRB), below("zskt.retrospection", {
        "restart_lr": 5e-4, "perturbs": "teacher", "inner_rounds": 10, "inner_lr": 0.1, "synthesis_penalty": 1e-3,
        "penalty": 1e-3, "patched_fraction": 0.02, "K": 5, "step_size": 0.1, "detach_reference": True,
    })),
    ("illidanlab/ABD: from pb79399.pth on", ZSKT_LATE, {"zskt.retrospection.start": 79_400}),
    ("illidanlab/ABD: from pb9799.pth on", ZSKT_LATE_GTSRB, {"zskt.retrospection.start": 9_800}),
    (OPTIONS["ABD cmi"], CMI, below("cmi", {
        "student": "wrn_16_1", "temperature": 20.0, "distillation_steps": 400, "update.batch_size": 128,
        "update.epochs": 200, "update.optimizer.name": "sgd", "update.optimizer.lr": 0.1,
        "update.optimizer.momentum": 0.9, "update.optimizer.weight_decay": 1e-4, "update.optimizer.schedule": "cosine",
        **PAD_AND_FLIP,
        **below("synthesis", {
            "batch_size": 256, "iterations": 200, "lr": 1e-3, "latent_dim": 256, "width": 64, "bn": 1.0, "one_hot": 1.0,
            "adversarial": 0.5, "contrast.weight": 0.8, "contrast.temperature": 0.1, "contrast.negatives": 4096,
            "contrast.bank_size": 40960, "contrast.dim": 256, "contrast.lr": 1e-3, "global_view.crop": "pad",
            "global_view.pad": 4, "global_view.flip": 0.5, "local_view.crop": "random_resized",
            "local_view.scale": [0.25, 1.0], "local_view.ratio": [3 / 4, 4 / 3], "local_view.flip": 0.5,
        }),
    })),
    (OPTIONS["ABD cmi"], (CMI[1], CMI[2]), below("cmi.vaccine", {"weight": 0.1, "members": 3, "layers": 5})),
    (OPTIONS["ABD ood"], OOD, below("ood", {
        "student": "wrn_16_1", "temperature": 8.0, "cutmix.probability": 1.0, "cutmix.beta": 0.25,
        "update.batch_size": 512, "update.epochs": 300, "update.optimizer.name": "adam", "update.optimizer.lr": 1e-3,
        "update.optimizer.schedule": "multistep", "update.optimizer.milestones": [150, 300, 600],
        "update.optimizer.gamma": 0.5, **PAD_AND_FLIP,
    })),
    (OPTIONS["ABD ood"], (OOD[1], OOD[2], OOD[4]), {"ood.vaccine.weight": 0.1, "ood.vaccine.members": 3}),
    *(
        ("illidanlab/ABD, UnlearnOptimizer", places, below(f"{method}.retrospection", {
            "start": start, "restart_lr": 5e-4, "perturbs": "teacher", "inner_rounds": 10, "inner_lr": 0.1,
            "synthesis_penalty": 0.0, "penalty": 1e-3, "patched_fraction": 0.02, "K": 5, "step_size": 0.1,
            "detach_reference": False,
        }))
        for method, places, start in (("cmi", (CMI[1], CMI[3]), 197), ("ood", (OOD[1], OOD[3], OOD[4]), 297))
    ),
    ("illidanlab/ABD, UnlearnOptimizer's KL and start", OOD[4:], {
        "ood.retrospection_convention": "batchmean", "ood.retrospection.delta_init": "zero",
        "ood.retrospection.min_patched": 0, "ood.retrospection.statistics": "published",
    }),
    ("illidanlab/ABD, zskt/kd_distill.py and its sweeps", ("defend/kd_cifar10", "defend/kd_gtsrb"), below("kd", {
        "student": "wrn_16_1", "data.fraction": 0.2, "temperature": 6.0, "alpha": 0.95, "update.batch_size": 128,
        "update.epochs": 170, "update.optimizer.lr": 0.1, "update.optimizer.schedule": "constant",
        **below("update", SGD), **PAD_AND_FLIP,
    })),
    ("illidanlab/ABD, cmi/vanilla_kd.py", ("defend/kd_cifar10 kd.preset=cmi_code",), below("kd", {
        "temperature": 1.0, "alpha": 1.0, "update.epochs": 200, "update.optimizer.name": "sgd",
        "update.optimizer.lr": 0.1, "update.optimizer.schedule": "multistep",
        "update.optimizer.milestones": [120, 150, 180],
    })),
]  # fmt: skip

# Numbers in the files of configs/attack, defend, downstream and pretrain that are nobody's but ours, by end of the key.
OURS = {
    "*": ("trainer.log_every", "trainer.checkpoint_every", "evaluate_every"),
    "*fashion*": ("*",),  # small data for two cores, see docs/results.md
    "*imagenette*": ("*",),  # nobody publishes recipes for so few photographs
    "attack/sig_wrapped_cifar10": ("attack.rate", "attack.target_class"),
    "attack/trojan_wrapped_cifar10": ("attack.rate", "attack.target_class", "trigger.seed"),
    "attack/*": ("trigger.seed",),  # of a pattern that stands for a file which is not shipped
    "defend/ibau*": ("seed",),  # upstream sets none
    "defend/rnp_cifar10": ("seed", "max_accuracy_drop"),
    "defend/[azcok]*": ("seed",),
    "attack/abd_teacher_gtsrb": ("seed",),
    "measure/[lk]*": ("seed", "seeds"),
    "measure/decree_*": ("seeds",),  # published: 80 alone
    "measure/reactivate_stl10": ("seed",),
}

# Where we do something else on purpose: places, key, the published value, ours, and the line that says so.
DEVIATIONS: tuple[tuple[tuple[str, ...], str, Any, Any, str, str], ...] = (
    (CONSTANT_RATE, "classifier.update.optimizer.schedule", "constant", "cosine", "docs/methods/attacks.md",
     "| WaNet, BPP: SGD 0.01, constant in effect |"),
    ((*MIMIC[:3], MIMIC_DEFAULTS), "mimic.information.source", "student", "teacher", "docs/methods/mimic.md",
     "`information.source: teacher` by default, `student` for upstream's"),
    (("pretrain/simclr_cifar10", "pretrain/simclr_stl10"), "simclr.monitor.every", 1, 10, "docs/methods/simclr.md",
     "(`monitor.every: 1` for upstream's)"),
    ((*ZSKT_LATE, *ZSKT_LATE_GTSRB), "zskt.retrospection.delta_init", "zero", "small", "docs/methods/abd.md",
     "| delta starts at 0 | a small draw; `delta_init: zero` |"),
    ((*ZSKT_LATE, *ZSKT_LATE_GTSRB), "zskt.retrospection.min_patched", 0, 1, "docs/methods/abd.md",
     "of the global batch, one at least; `min_patched: 0`"),
    ((*ZSKT_LATE, *ZSKT_LATE_GTSRB), "zskt.retrospection.statistics", "published", "clean", "docs/methods/abd.md",
     "`statistics: published` has all seven"),
    ((OOD[1], OOD[3]), "ood.retrospection_convention", "batchmean", "mean", "docs/methods/distillation.md",
     "`retrospection_convention: batchmean` is the published one"),
    (tuple(f"measure/zeroshot_{task}" for task in ("stl10", "gtsrb", "svhn")), "zeroshot.batch_size", 1, 512,
     "docs/methods/zeroshot.md", "| one image per forward pass | batches of `batch_size` over all ranks |"),
)  # fmt: skip
