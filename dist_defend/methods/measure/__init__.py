"""What measures a model and changes nothing in it."""
