"""Masks, codebooks, folding and their tools: plain functions on anybody's nn.Module."""
