"""Triggers and what they are stamped on."""
