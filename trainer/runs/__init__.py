"""Whole runs: opening, checking, resuming, scans, ladders."""
