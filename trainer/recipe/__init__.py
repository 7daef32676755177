"""Recipes: YAML to a checked recipe, every fault at once. Importing this imports nothing heavy."""
