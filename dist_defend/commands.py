"""All commands by what they are for, and the page that ``dist-defend`` alone prints."""

GROUPS: dict[str, dict[str, tuple[str, str]]] = {  # title: {name: (module, what it does)}; imported when it is used
    "Start": {
        "init": (
            "dist_defend.templates",
            "copy the package's configs, launch files and sbatch templates, to edit them",
        ),
        "doctor": ("dist_defend.doctor", "print what works on this machine and how to mend the rest"),
    },
    "Data and models": {
        "data": ("dist_defend.data.cli", "prepare data sets and look at them"),
        "import": ("dist_defend.importing", "turn a foreign checkpoint into a model folder, without unpickling it"),
        "export": (
            "dist_defend.publish.export",
            "write a model for others: a Hugging Face folder, a BackdoorBench file",
        ),
        "push": ("dist_defend.publish.push", "send an exported Hugging Face folder to the hub; nothing else sends any"),
    },
    "Train, poison, defend": {
        "run": ("dist_defend.cli", "run one experiment file, or resume it"),
        "launch": ("dist_defend.launch", "run one experiment file on several ranks or machines"),
        "plan": ("dist_defend.plan", "memory and work of each rank, before anything is started"),
        "sweep": ("dist_defend.sweep.cli", "run the points of a grid with Slurm or on this machine, collect them"),
        "reproduce": ("dist_defend.reproduce", "published figures again: from a folder to a table beside them"),
    },
    "See what came out": {
        "runs": ("dist_defend.runs_command", "which runs are running, finished, stopped or failed"),
        "report": ("dist_defend.report", "table, report.md, report.csv and report.html from finished runs"),
        "evaluate": ("dist_defend.evaluate_command", "count ACC, ASR and RA of a classifier, imported or trained here"),
        "zoo": ("dist_defend.zoo.cli", "models with counts and YAML: add, list, count again, make again"),
    },
    "Look things up": {
        "methods": ("dist_defend.methods_command", "list the methods, or the keys of one: type, default, meaning"),
        "models": ("dist_defend.models.cli", "list architectures and normalizations, or tell of one"),
        "attacks": ("dist_defend.attacks.cli", "list the triggers, or the keys of one; draw or make one"),
        "bench": ("dist_defend.bench", "time the package against the published formulations"),
    },
}
COMMANDS = {name: told for commands in GROUPS.values() for name, told in commands.items()}
_FIRST = (  # what to type, in an empty folder, and what it shows; tests/unit/test_cli.py holds the README to it
    ("dist-defend init && dist-defend data prepare digits --out data/digits --image-size 16", ""),
    ("dist-defend run configs/start/poison.yaml", "a classifier learns a backdoor"),
    (
        "dist-defend run configs/start/unlearn.yaml",
        "I-BAU takes it out; last line: before -> after",
    ),
)


def overview(about: str) -> str:
    """Lines: what the program is, the first five minutes, all commands by group."""
    lines = [about.strip(), "", "The first five minutes, in an empty folder:"]
    lines += [f"  {command:<45}# {told}" if told else f"  {command}" for command, told in _FIRST]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10}{told}" for name, (_, told) in commands.items())]
    return "\n".join([*lines, "", "dist-defend COMMAND --help tells the options of one."])
