"""Attacks by training: methods that make a backdoored model."""
