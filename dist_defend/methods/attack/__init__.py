"""Attacks that train: what makes a clean model a backdoored one."""
