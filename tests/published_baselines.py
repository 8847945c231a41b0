"""Published values of the baseline defences; a part of tests/published.py."""

from typing import Any

ANP_DEFAULTS = "defend/anp_cifar10 anp={model: x, data: {path: x}, test: {path: x}}"
CLP_DEFAULTS = "defend/clp_cifar10 clp={model: x, test: {path: x}}"
BB_TUNING = {
    "batch_size": 256, "epochs": 100, "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False, "optimizer.schedule": "cosine_epochs", "optimizer.period": 100,
}  # fmt: skip
PATCH_SEARCH = "measure/patch_search_cifar10 patch_search={%sencoder: x, data: {path: x}}"
DECREE_DEFAULTS = "decree={encoder: x, data: {path: x}}"
DECREE = {"lr": 0.5, "later_lrs": [0.1, 0.05], "threshold": 0.99, "cost": 1e-3, "epochs": 1000}
REACTIVATE_PUBLISHED = (
    "measure/reactivate_cifar10 reactivate={preset: published, model: x, data: {path: x}, test: {path: x}}"
)
REACTIVATE_QUERIES = "measure/reactivate_cifar10 reactivate.query={}"
TUNING = ("ft", "ft_sam", "nad", "fp", "sau", "nc")
PAD_AND_FLIP = {"augment.crop": "pad", "augment.pad": 4, "augment.flip": 0.5}


def below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same values, their keys in a section."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


def tuning_defaults(name: str, preset: str = "") -> str:
    """A place where only the method's own values, or a preset's, stand."""
    own = f"preset: {preset}, " if preset else ""
    return f"defend/{name}_cifar10 {name}={{{own}model: x, data: {{path: x}}, test: {{path: x}}}}"


def of_encoder(name: str, own: str = "") -> str:
    """As tuning_defaults, of a defence of encoders."""
    return f"defend/{name}_cifar10 {name}={{{own}model: x, data: {{path: x}}}}"


def of_attack(own: str) -> str:
    """As tuning_defaults, of DRUPE."""
    needed = "clean_encoder: x, shadow: {path: x}, reference: {dataset: y, count: 3}"
    return f"attack/drupe_cifar10 drupe={{{own}{needed}}}"


BASELINES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    # Re-activation
    ("AISafety-HKUST/stable_backdoor_purification", ("measure/reactivate_cifar10",), {"seed": 42}),
    ("AISafety-HKUST/stable_backdoor_purification", ("measure/reactivate_cifar10", REACTIVATE_PUBLISHED),
     below("reactivate", {
        "num_images": 1000, "num_poisoned": 5, "train_mode": True, "batch_size": 128, "epochs": 5, **PAD_AND_FLIP,
        "optimizer.name": "sgd", "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant",
    })),
    ("AISafety-HKUST/stable_backdoor_purification: queries", (REACTIVATE_QUERIES,), below("reactivate.query", {
        "eps": 16 / 255, "weight": 0.2, "hidden": [1024, 1024, 1024], "update.batch_size": 128, "update.epochs": 50,
        "update.optimizer.name": "sgd", "update.optimizer.lr": 0.1, "update.optimizer.momentum": 0.9,
        "update.optimizer.schedule": "constant",
    })),
    ("jinyuan-jia/BadEncoder, evaluation, reference labels and its trigger file", ("measure/reactivate_stl10",), {
        "reactivate.attack.target_class": 9, "reactivate.attack.trigger.size": 10,
        "reactivate.attack.trigger.margin": 1,
    }),
    # ANP
    ("csdongxian/ANP_backdoor", ("defend/anp_cifar10",), {"anp.ratio": 0.01}),
    ("csdongxian/ANP_backdoor", ("defend/anp_cifar10", ANP_DEFAULTS), below("anp", {
        "eps": 0.4, "steps": 1, "alpha": 0.2, "lr": 0.2, "iterations": 2000, "batch_size": 128, "project": False,
        "pruning_by": "threshold", "pruning_max": 0.90, "pruning_step": 0.05, "prune_beta": False, **PAD_AND_FLIP,
    })),
    ("SCLBD/BackdoorBench, defense/anp.py and config/defense/anp", ("defend/anp_cifar10 anp={preset: backdoorbench, "
     "model: x, data: {path: x}, test: {path: x}}",), below("anp", {
        "lr": 0.01, "ratio": 0.05, "batch_size": 256, "eps": 0.4, "steps": 1, "alpha": 0.2, "acc_ratio": 0.1,
    })),
    # FT, FT-SAM, NAD, FP
    *(("SCLBD/BackdoorBench, config/defense: 5 % of the images", (f"defend/{name}_cifar10",),
       {"seed": 0, f"{name}.ratio": 0.05}) for name in TUNING),
    ("SCLBD/BackdoorBench, defense/ft.py and config/defense/ft", (tuning_defaults("ft"),), below("ft", BB_TUNING)),
    ("SCLBD/BackdoorBench, defense/fp.py", (tuning_defaults("fp", "backdoorbench"),), below("fp", {
        **BB_TUNING, "once_prune_ratio": 0.01, "max_accuracy_drop": 0.1, "rank_by": "signed",
        "selection": "test_data", "include_failing_stop": True, "off_by_one": True,
    })),
    ("SCLBD/BackdoorBench, defense/ft-sam.py", (tuning_defaults("ft_sam", "backdoorbench"),), below("ft_sam", {
        **BB_TUNING, "optimizer.schedule": "cosine_steps", "rho": 2.0, "adaptive": True, "smoothing": 0.1,
    })),
    ("bboylyg/NAD, main.py and config.py", ("defend/nad_cifar10", tuning_defaults("nad")), below("nad", {
        "batch_size": 64, "epochs": 20, "optimizer.lr": 0.1, "optimizer.nesterov": True, "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4, "optimizer.milestones": [2, 20, 20], "betas": [500, 1000, 1000],
    })),
    ("bboylyg/NAD: its loop without attention", (tuning_defaults("ft", "nad"),), below("ft", {
        "batch_size": 64, "epochs": 20, "optimizer.lr": 0.1, "optimizer.nesterov": True, "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4, "optimizer.milestones": [2, 20, 20],
    })),
    ("SCLBD/BackdoorBench, defense/nad.py", (tuning_defaults("nad", "backdoorbench"),), below("nad", {
        "batch_size": 256, "epochs": 10, "teacher_epochs": 10, "optimizer.lr": 0.01, "optimizer.nesterov": False,
        "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4, "optimizer.schedule": "constant",
        "teacher_optimizer.lr": 0.01, "teacher_optimizer.schedule": "cosine_epochs", "teacher_optimizer.period": 100,
        "betas": [500, 1000], "layers": ["layer3", "layer4"], "repeat_statistics": True,
    })),
    ("SCLBD/BackdoorBench, defense/sau.py", ("defend/sau_cifar10", tuning_defaults("sau")), below("sau", {
        "batch_size": 256, "epochs": 100, "bound": 0.2, "step_size": 0.2, "attack_steps": 5, "beta_adv": 0.01,
        "beta_js": 1.0, "weight_clean": 1.0, "weight_adversarial": 0.0, "weight_shared": 1.0, "augment.crop": "none",
        "optimizer.name": "adam", "optimizer.lr": 1e-4, "optimizer.amsgrad": True, "optimizer.schedule": "constant",
    })),
    ("SCLBD/BackdoorBench, defense/nc.py", ("defend/nc_cifar10", tuning_defaults("nc")), below("nc", {
        **BB_TUNING, "search.epochs": 80, "search.lr": 0.1, "search.cost": 1e-3, "search.threshold": 98.0,
        "search.patience": 5, "search.multiplier": 2.0, "search.early_patience": 25, "anomaly_threshold": 2.0,
        "stamped_share": 0.2,
    })),
    ("SCLBD/BackdoorBench, defense/nc.py", (tuning_defaults("nc", "backdoorbench"),),
     {"nc.search.normalise_first_rows": True}),
    ("meet-cjli/CTRL, its readme's command", ("attack/ctrl_cifar10",), {
        "simclr.attack.rate": 0.01, "simclr.attack.target_class": 0, "simclr.attack.trigger.magnitude": 100,
        "simclr.attack.trigger.positions": [15, 31], "simclr.attack.trigger.window": 32,
        "simclr.attack.trigger.channels": ["u", "v"],
    }),
    *(("UMBCvision/SSL-Backdoor, its generator", (f"dist_defend.attacks.random_patch:RandomPatch.{key}",), {"": value})
      for key, value in (("size", 50), ("opacity", 1.0), ("train", [0.25, 0.75]), ("test", [0.1, 0.9]))),
    ("jsrdcht/SSL-Backdoor, CIFAR-10 (third party)", ("attack/sslbkd_cifar10",), {
        "simclr.attack.count": 2500, "simclr.attack.target_class": 0, "simclr.attack.trigger.size": 8,
        "simclr.attack.trigger.train": [0.25, 0.75], "simclr.attack.trigger.test": [0.25, 0.75],
    }),
    ("UMBCvision/SSL-Backdoor, eval_linear.py", ("measure/linear_sslbkd_cifar10",), {
        "probe.hidden": [], "probe.standardise": True, **below("probe.update", {
            "batch_size": 256, "epochs": 40, "optimizer.lr": 0.01, "optimizer.momentum": 0.9,
            "optimizer.weight_decay": 1e-4, "optimizer.milestones": [15, 30, 40],
        }), "probe.tasks.cifar10.train.fraction": 0.1, "probe.tasks.cifar10.target_class": 0,
    }),
    # DECREE
    ("GiantSeaweed/DECREE: 10 % of the test images", ("measure/decree_cifar10",), {"decree.data.fraction": 0.1}),
    ("GiantSeaweed/DECREE: 20 % of ImageNet's validation images", ("measure/decree_imagenet",),
     {"decree.data.fraction": 0.2}),
    ("GiantSeaweed/DECREE, its shipped script: images of CIFAR's size",
     ("measure/decree_cifar10", f"measure/decree_cifar10 {DECREE_DEFAULTS}"), below("decree", {
         **DECREE, "batch_size": 128, "milestones": [30, 50], "least_cost": 1e-5, "patience": 10,
     })),
    ("GiantSeaweed/DECREE, its shipped script: images of 224 px", ("measure/decree_imagenet",), below("decree", {
        **DECREE, "batch_size": 32, "milestones": [200, 500], "least_cost": 1e-7, "patience": 35,
    })),
    # PatchSearch
    ("UCDvision/PatchSearch", ("measure/patch_search_cifar10", PATCH_SEARCH % "", PATCH_SEARCH % "preset: imagenet, "),
     below("patch_search", {"clusters": 1000, "num_test": 1000, "per_round": 2, "drop": 0.25, "num_patches": 100})),
    ("UCDvision/PatchSearch: images of 224 px", (PATCH_SEARCH % "preset: imagenet, ",), {"patch_search.window": 60}),
    # FT and NAD of encoders
    *(("wssun/MIMIC, MIMIC.py: its images and views", (f"defend/{name}_cifar10",), {"seed": 100, **below(name, {
        "data.fraction": 0.04, "data.subset": "first", "augment.size": 32, "augment.flip": 0.5, "augment.jitter": 0.8,
        "augment.grayscale": 0.2,
    })}) for name in ("ft_simclr", "nad_simclr")),
    ("JiePeng104/TSC, fine-tuning of SimCLR encoders", ("defend/ft_simclr_cifar10", of_encoder("ft_simclr")),
     below("ft_simclr", {
        "temperature": 0.5, "update.epochs": 10, "update.optimizer.name": "adam", "update.optimizer.lr": 5e-5,
        "update.optimizer.weight_decay": 1e-6, "update.optimizer.schedule": "cosine",
    })),
    ("jinyuan-jia/BadEncoder, pretraining_encoder.py", (of_encoder("ft_simclr", "preset: pretrain, "),),
     below("ft_simclr", {
        "temperature": 0.5, "update.batch_size": 256, "update.optimizer.name": "adam", "update.optimizer.lr": 1e-3,
        "update.optimizer.weight_decay": 1e-6, "update.optimizer.schedule": "constant",
    })),
    ("bboylyg/NAD, main.py and config.py", ("defend/nad_simclr_cifar10", of_encoder("nad_simclr", "teacher: y, ")),
     below("nad_simclr", {
        "betas": [500, 1000, 1000], "update.batch_size": 64, "update.epochs": 20, "update.optimizer.name": "sgd",
        "update.optimizer.momentum": 0.9, "update.optimizer.nesterov": True, "update.optimizer.weight_decay": 1e-4,
    })),
    # DRUPE
    ("Gwinhen/DRUPE, its readme's command and main.py", ("attack/drupe_cifar10", of_attack("")), below("drupe", {
        "lambda1": 1.0, "lambda2": 1.0, "cost": 0.1, "distance_cost": 0.001, "projections": 50, "warm_up_epochs": 1,
        "spread_after": 4, "adapt_after": 20, "effective_below": -0.96, "spread_below": 0.6, "pause_below": 0.5,
        "attack.trigger.size": 10, "attack.trigger.margin": 1, "update.batch_size": 256, "update.epochs": 120,
        "update.optimizer.name": "sgd", "update.optimizer.lr": 0.05, "update.optimizer.momentum": 0.9,
        "update.optimizer.weight_decay": 5e-4, "update.optimizer.schedule": "constant",
    })),
    ("Gwinhen/DRUPE, its readme's command", ("attack/drupe_cifar10",), {
        "seed": 100, "drupe.shadow.max_samples": 10000, "drupe.reference.target_class": 9, "drupe.reference.count": 3,
    }),
    ("Gwinhen/DRUPE, for ImageNet's encoder", (of_attack("preset: imagenet, "),), below("drupe", {
        "warm_up_epochs": 1, "spread_after": 2, "effective_below": -0.91, "spread_below": 0.6, "pause_below": 0.5,
    })),
    ("Gwinhen/DRUPE, for CLIP", (of_attack("preset: clip, "),), below("drupe", {
        "warm_up_epochs": 0, "spread_after": 4, "effective_below": -0.96, "spread_below": 0.8, "pause_below": 0.7,
    })),
    ("Gwinhen/DRUPE, mode wb for CLIP", (of_attack("preset: wasserstein_clip, "),),
     {"drupe.terms": "wasserstein", "drupe.adapt_after": 5}),
    # CLP
    ("rkteddy/channel-Lipschitzness-based-pruning", ("defend/clp_cifar10", CLP_DEFAULTS),
     {"clp.u": 3.0, "clp.prune_beta": True, "clp.pairing": "published", "clp.selection": "u"}),
    ("SCLBD/BackdoorBench, defense/clp.py and config/defense/clp", ("defend/clp_cifar10", CLP_DEFAULTS),
     {"clp.u": 3.0, "clp.u_min": 0.0, "clp.u_max": 10.0, "clp.u_num": 21}),
]  # fmt: skip
