"""What a run has to show: tables, plots, the report, the log and its mirror."""
