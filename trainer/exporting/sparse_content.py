"""What a coder of weights writes into an ONNX file, and what its nodes give back."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Content:
    """The codes of all compressed constants.

    Attributes:
        codes: int64 [n], of the constants with zeros, one after the other: for each non-zero number the index of its value.
        places: int64 [n], ascending: where it lies in all these constants together.
        dense: int64 [m] each, the codes of every constant without zeros.
    """

    codes: np.ndarray
    places: np.ndarray
    dense: list[np.ndarray]


@dataclass
class Found:
    """Names of what the nodes compute.

    Attributes:
        codes: 1 + the codes, or 0 for a zero that is written, of `kind`; '' for no constants with zeros.
        kind: numpy's type of the codes.
        places: int32, where each is, counted from 1.
        dense: int32 each, 1 + the codes of the constants without zeros.
    """

    codes: str
    kind: type
    places: str
    dense: list[str]
