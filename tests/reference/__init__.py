"""Formulations as published that only tests compare with; the other ones are dist_defend/bench/published."""
