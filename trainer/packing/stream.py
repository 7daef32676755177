"""The state of one direction of coding: the coder, its statistics so far, and the bits of each part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.coder import Coder, Meter
from trainer.packing.integers import MOST_TOGETHER, MixedBits
from trainer.packing.predictors import TYPICAL, Scalars, Text

# Typical headers: text that a header has in common with them costs next to nothing. A change needs a new version.
_PRIMER_2 = (
    "layer4.1.bn2.running_mean\0running_var\0num_batches_tracked\0layer1.0.conv1.weight\0"
    "block2.pointwise.weight\0depthwise.bias\0fc1.weight\0fc1.bias\0"
    '{"net":{"model":"cifar_resnet","depth":20},"shape":[3,32,32],"mean":[0.4914,0.4822,0.4465],'
    '"std":[0.247,0.2435,0.2616],"classes":["airplane","automobile","bird","cat","deer","dog","frog",'
    '"horse","ship","truck"]}\0'
    '{"net":{"model":"timm/resnet18"},"shape":[3,224,224],"mean":[0.485,0.456,0.406],"std":[0.229,0.224,'
    '0.225],"classes":100}\0'
    '{"net":{"model":"lenet5","width":8},"shape":[1,28,28],"mean":[0.286041],"std":[0.353024],'
    '"classes":["T-shirt/top","Trouser","Pullover","Dress","Coat","Sandal","Shirt","Sneaker","Bag",'
    '"Ankle boot"]}\0'
    '{"net":{"model":"lenet5_caffe"},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"lstm","hidden":128,"batch_norm":false},"shape":[1,28,28],"mean":[0.13066],'
    '"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"lenet300"},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"separable","widths":[8,12,16,16],"strides":[2,1,2,1],"first_kernel":5,'
    '"batch_norm":false},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}'
)
PRIMER = (
    _PRIMER_2
    + '\0{"net":{"model":"separable","widths":[12,16,20,24,32],"strides":[2,2,1,1],"first_kernel":3,'
    '"kernel":5,"residual":true,"repeat":2,"batch_norm":false},"shape":[1,28,28],"mean":[0.13066],'
    '"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"separable","widths":[8,10,12,16],"strides":[2,1,2,1],"first_kernel":3,"residual":true,'
    '"repeat":3,"batch_norm":false},"shape":[1,28,28],"mean":[0.286041],"std":[0.353024],"classes":10}\0'
    '{"net":{"model":"lenet300","resized":{"fc1":[123,784],"fc2":[67,123],"fc3":[10,67]}},"shape":[1,28,28],'
    '"mean":[0.13066],"std":[0.308108],"classes":10}'
)


@dataclass
class Stream:
    """The state of one direction of coding: the coder, its statistics so far, and the bits of each part."""

    coder: Coder
    literal: bytearray  # of an Encoder: written so far, last first; of a Decoder: not yet read
    version: int  # of the format
    scalars: Scalars = field(init=False)
    integers: MixedBits = field(init=False)
    one_by_one: int = MOST_TOGETHER  # integers that may still be coded by `integers`
    parts: list[tuple[str, str, float, float]] = field(default_factory=list)  # tensor, part, bits, literal
    spent: np.ndarray = field(default_factory=lambda: np.zeros(1))  # bits of tensors that are coded together
    capacity: float = math.inf  # the most decisions that a Decoder's bytes can hold
    num_bytes: float = math.inf  # of the file that a Decoder reads
    live: np.ndarray | None = None  # non-zero weights of each row of the last weight tensor
    density: tuple[int, int] = (3, 10)  # non-zeros and positions of the last masked tensor
    ranks: dict[int, np.ndarray] = field(default_factory=dict)  # counts of the last ranks, by number of bits

    def __post_init__(self) -> None:
        self.scalars = Scalars(self.coder)
        self.scalars.expect("exponent", 8, TYPICAL)
        self.integers = MixedBits(self.coder)
        if self.version <= 2:
            self.one_by_one = 0

    @cached_property
    def text(self) -> Text:
        """The coder of texts; training it on the typical headers takes a while."""
        return Text(self.coder, PRIMER if self.version > 2 else _PRIMER_2)

    def code(
        self,
        probabilities: np.ndarray,
        bits: np.ndarray,
        owner: np.ndarray,
        some: np.ndarray | slice = slice(None),
    ) -> np.ndarray:
        """Codes bits [n] of the tensors with the numbers owner[some] [n], whose bits `spent` counts; see `Encoder.code`."""
        coded = self.coder.code(probabilities, bits)
        if isinstance(self.coder, Meter):
            self.spent += np.bincount(owner[some], self.coder.costs, len(self.spent))
        return coded

    def here(self) -> tuple[float, int]:
        """Returns the bits and literal bytes so far, for `part`."""
        return self.coder.bits, len(self.literal)

    def part(self, tensor: str, name: str, start: tuple[float, int]) -> None:
        """Records the bits and literal bytes that were coded since `start`, an earlier `here()`."""
        bits, literal = self.here()
        self.parts.append((tensor, name, bits - start[0], abs(literal - start[1])))

    def literally(self, num_bytes: int, data: bytes = b"") -> bytes:
        """Writes or reads literal bytes."""
        if self.coder.writes:
            self.literal[:0] = data
            return data
        if num_bytes > len(self.literal):
            raise Mistake("the literal bytes end too early")
        data = bytes(self.literal[len(self.literal) - num_bytes :])
        del self.literal[len(self.literal) - num_bytes :]
        return data
