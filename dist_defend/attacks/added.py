"""Triggers of plug-ins, and of the user's own modules, as ``name: module:name``."""

import dataclasses
from typing import Any, cast, get_args

import dacite

from dist_defend import plugins
from dist_defend.attacks.patterns import TriggerConfig
from dist_defend.attacks.trigger import TriggerOptions
from dist_defend.errors import UserError

BUILT_IN: dict[str, type[TriggerOptions]] = {
    options.name: options for options in get_args(TriggerConfig) if options is not TriggerOptions
}


def trigger_names() -> list[str]:
    """Names of all triggers, built-in ones and those of plug-ins."""
    return list(trigger_sources())


def trigger_sources() -> dict[str, str]:
    """The installed distribution and version that each trigger comes from, by name."""
    return plugins.sources("triggers", BUILT_IN)


def find_options(name: str) -> type[TriggerOptions] | None:
    """Options of a plug-in's trigger or of the user's own; None for a built-in trigger, and for a name of none.

    UserError for what cannot be imported or is no trigger, and for a name that two packages have.
    """
    plug_in = plugins.find("triggers", name, BUILT_IN)
    if plug_in is None and not plugins.is_object(name):
        return None
    found = plugins.load_object(name) if plug_in is None else plug_in.load()
    is_options = isinstance(found, type) and issubclass(found, TriggerOptions) and dataclasses.is_dataclass(found)
    if not is_options or getattr(found, "name", None) != name:
        whose = "" if plug_in is None else f" of package {plug_in.source}"
        raise UserError(
            f"'{name}'{whose} is no trigger: it needs a frozen dataclass that inherits TriggerOptions and whose key "
            f"'name' is '{name}'"
        )
    return cast(type[TriggerOptions], found)


def with_added(config: dacite.Config) -> dacite.Config:
    """Have dacite build the options of added triggers too, where a union has TriggerOptions."""

    def build(plain: Any) -> Any:
        name = plain.get("name") if isinstance(plain, dict) else None
        options = find_options(name) if isinstance(name, str) else None
        return plain if options is None else dacite.from_dict(options, plain, config)

    config.type_hooks[TriggerOptions] = build
    return config
