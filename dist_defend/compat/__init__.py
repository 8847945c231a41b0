"""Interfaces of other projects, over dist_defend.api."""
