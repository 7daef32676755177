"""Whole runs: opening, checking, resuming, scans and ladders."""
