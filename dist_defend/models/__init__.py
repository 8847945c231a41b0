"""Encoders, heads, and the files that hold them."""
