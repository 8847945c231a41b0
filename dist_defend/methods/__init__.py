"""One module per method, found by its name: each exports ``Config`` and ``build(experiment, context) -> Plan``."""

SHARED = ("abd",)  # packages that methods are made from; not methods themselves
