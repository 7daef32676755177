"""The shelf of each key of a recipe. The command line's help needs no more, so nothing else is imported here."""

SHELVES = {
    "loss": "losses",
    "stage": "stages",
    "dataset": "datasets",
    "model": "models",
    "method": "criteria",
    "to": "exports",
}
