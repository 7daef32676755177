"""Masks, codebooks, folding and what they stand on: plain functions on anybody's nn.Module."""
