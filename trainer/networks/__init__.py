"""Builds any network, and reads its logits, embeddings and feature maps."""
