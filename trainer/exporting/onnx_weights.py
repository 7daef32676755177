"""Stores pruned and shared constants compressed."""

from trainer.exporting.onnx_nodes import Builder


def compress(made: Builder) -> None:
    """Not yet."""
