"""One module per method, found by its name: each exports ``Config`` and ``build(experiment, context) -> Plan``."""
