"""Triggers, attacks and poisoned data sets."""
