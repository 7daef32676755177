"""One training of a network: the loop, the optimizer, checkpoints on the way, evaluation, rows of the report."""
