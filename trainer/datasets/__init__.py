"""Images to learn from, one file a set.

`dataset: NAME` is the file NAME.py, which defines `NAME(*, settings) -> Source`; keyword-only arguments are recipe keys.
Small sets are held in memory as uint8, large ones read from disk. To add one: write the file.
"""
