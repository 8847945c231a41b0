"""Encoders and classifiers from scratch."""
