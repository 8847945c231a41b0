"""Prepared data sets, their sample order, and three loaders that give the same batches."""
