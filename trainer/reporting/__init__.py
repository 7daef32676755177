"""The output of a run: report, tables, plots, the log and its mirror in wandb."""
