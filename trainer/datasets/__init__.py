"""The datasets, one file for each.

`dataset: NAME` in a recipe is the file NAME.py, which defines `NAME(*, settings) -> Source`. Its keyword-only
arguments are recipe keys. Small datasets are kept in memory as uint8, large ones are read from disk. To add
one, write its file.
"""
