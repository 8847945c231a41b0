"""``dist-defend sweep``: the points of a grid, run by Slurm or on this machine, collected into one table."""
