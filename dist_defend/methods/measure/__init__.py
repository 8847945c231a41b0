"""Methods that measure a model without changing it."""
