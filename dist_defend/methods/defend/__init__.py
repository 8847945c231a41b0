"""Defences: what takes a backdoor out of a model, or leaves it behind."""
