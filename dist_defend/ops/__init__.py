"""Losses, estimators and collectives: pure functions of tensors."""
