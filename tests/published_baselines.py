"""Published values of the baseline defences; a part of tests/published.py."""

from typing import Any

ANP_DEFAULTS = "defend/anp_cifar10 anp={model: x, data: {path: x}, test: {path: x}}"
CLP_DEFAULTS = "defend/clp_cifar10 clp={model: x, test: {path: x}}"
BB_TUNING = {
    "batch_size": 256, "epochs": 100, "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False, "optimizer.schedule": "cosine_epochs", "optimizer.period": 100,
}  # fmt: skip
TUNING = ("ft", "ft_sam", "nad", "fp", "sau", "nc")
PAD_AND_FLIP = {"augment.crop": "pad", "augment.pad": 4, "augment.flip": 0.5}


def below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same values, their keys in a section."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


def tuning_defaults(name: str, preset: str = "") -> str:
    """A place where only the method's own values, or a preset's, stand."""
    own = f"preset: {preset}, " if preset else ""
    return f"defend/{name}_cifar10 {name}={{{own}model: x, data: {{path: x}}, test: {{path: x}}}}"


BASELINES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
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
    # CLP
    ("rkteddy/channel-Lipschitzness-based-pruning", ("defend/clp_cifar10", CLP_DEFAULTS),
     {"clp.u": 3.0, "clp.prune_beta": True, "clp.pairing": "published", "clp.selection": "u"}),
    ("SCLBD/BackdoorBench, defense/clp.py and config/defense/clp", ("defend/clp_cifar10", CLP_DEFAULTS),
     {"clp.u": 3.0, "clp.u_min": 0.0, "clp.u_max": 10.0, "clp.u_num": 21}),
]  # fmt: skip
