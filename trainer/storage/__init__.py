"""Files written whole or not at all: checkpoints, weights, the lock of a run's folder."""
