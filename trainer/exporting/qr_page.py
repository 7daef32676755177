"""Writes a student as a page so small that one QR code holds it: script, weights, and a canvas to draw on.

The weights are one large number in mixed radices: where each of a tensor's n weights is one of k values it takes n log2(k) bits, whatever
their frequencies are. An arithmetic decoder would take more bytes of script than it saves here.
"""

import json
import math
import re

import numpy as np

from trainer.exporting.graph import Graph, Node
from trainer.exporting.script import bare
from trainer.exporting.subject import Subject
from trainer.mistakes import Mistake

# The characters of the weights: all that can be seen but those which an address or a script reads as something else.
ALPHABET = "".join(chr(code) for code in range(36, 127) if chr(code) not in "%<\\")
MOST_EXPONENT = 98  # of a power of two by which integers are divided
ADDRESS = "data:text/html,"
MOST_BYTES = 2953  # of the largest code, version 40, at its lowest level of error correction
MOST_LETTERS = 1 << 16  # of weights: one number of more takes minutes to write, and no code holds them


def page_of(subject: Subject) -> str:
    """Returns the page as one line of HTML without the characters # and %, so that it can follow `ADDRESS` as it is.

    Raises Mistake for a network with other layers than the script has: convolutions (square, dense or of each channel by itself), linear
    layers, ReLU, pooling, the mean over positions and sums of two branches, for images of one channel.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    channels, height, width = subject.shape
    if channels != 1:
        raise Mistake(f"to qr: page: a drawing has one channel, the network's images have {channels}")
    classes = list(subject.classes)
    for character in ("#", "%", "</script>"):
        if any(character in name for name in classes):
            raise Mistake(f"to qr: page: the name of a class holds {character!r}, which such a page cannot")
    layers, tensors = layers_of(subject.graph)
    forms = [_Form(subject.graph.weights[name] if name else np.zeros(size)) for name, size in tensors]
    most = max(max(form.range, form.offset, len(form.table)) for form in forms) + 1
    digits = [digit for form in forms for digit in form.digits(most)]
    if sum(math.log2(radix) for _, radix in digits) > MOST_LETTERS * math.log2(len(ALPHABET)):
        raise Mistake(
            f"to qr: the page has more than {MOST_LETTERS:,} bytes; one QR code holds at most {MOST_BYTES:,}"
        )
    numbers = classes in ([], [str(number) for number in range(len(classes))])
    templates = Environment(loader=PackageLoader("trainer.exporting"), undefined=StrictUndefined)
    script = templates.get_template("qr_page.js").render(
        most=most,
        text=_text(digits),
        layers=",".join(layers),
        used={layer[0] for layer in layers},
        size=height * width,
        height=height,
        width=width,
        less_mean=_short(-subject.mean[0] if len(subject.mean) else 0.0, "+"),
        std=_short(subject.std[0] if len(subject.std) else 1.0),
        stroke=round(width / 11, 1),
        # Two slashes of a name would begin a comment, and "<!--<script" a script that does not end.
        names="" if numbers else _names(classes),
        expected=int(subject.test_vector()[1].argmax()),
    )
    board = f'<canvas id=B width={width} height={height} style="width:{width}0px;border:solid;touch-action:none"></canvas>'
    return (
        f"<meta name=viewport content=width={width}5>{board}<h1 id=Z></h1><script>{_packed(script)}</script>"
    )


def address_of(page: str) -> bytes:
    """Returns what the code holds: the page as an address that a browser opens."""
    return (ADDRESS + page).encode()


def script_of(page: str, shape: tuple[int, int, int]) -> str:
    """Returns the page's script as node runs it, where there is no browser; it defines `student` and `student.shape`.

    It ends with an error where the page's own check fails.
    """
    script = page.partition("<script>")[2].partition("</script>")[0]
    return f"""var B = {{getContext: () => ({{}})}}, Z = {{}};
{script};
if (Z.textContent == "broken") throw Error("the page's own check fails");
const student = Object.assign(N, {{shape: {list(shape)}}});
"""


def _names(classes: list[str]) -> str:
    return json.dumps(classes, separators=(",", ":")).replace("/", "\\/").replace("<", "\\u003c")


def _short(number: float, sign: str = "") -> str:
    """Returns a number as the script has it, without a zero before the point. sign: '+' writes that of any number."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{float(number):{sign}.6g}")


def _packed(script: str) -> str:
    """Returns a script without comments, line ends, and spaces where they mean nothing. Texts in quotes stay as they are."""
    parts = re.split(r'("(?:[^"\\]|\\.)*")', bare(script).replace("\n", ""))
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"\s*([^\w\s])\s*", r"\1", parts[number]).replace(";}", "}")
    return "".join(parts).rstrip(";")


def _text(digits: list[tuple[int, int]]) -> str:
    """Returns digits, (digit, radix) each, as one number in the letters of `ALPHABET`, the least significant first."""
    number = 0
    for digit, radix in reversed(digits):
        number = number * radix + digit
    letters = []
    while number:
        number, letter = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[letter])
    return "".join(letters)


class _Form:
    """How a tensor is written: integers times 2^-exponent, one by one or, if that is shorter, as places in a table.

    Attributes: table (of the distinct integers, or empty), exponent, offset (added to the integers), range (of what is written).
    """

    def __init__(self, values: np.ndarray) -> None:
        flat = np.asarray(values, np.float64).reshape(-1)
        self.exponent = next(
            (e for e in range(MOST_EXPONENT + 1) if not (flat * 2.0**e % 1).any()), MOST_EXPONENT
        )
        integers = [int(number) for number in np.rint(flat * 2.0**self.exponent)]
        self.offset = max(0, -min(integers))
        self.range = max(integers) + self.offset + 1
        self._integers = integers
        distinct = sorted(set(integers))
        whole, place = math.log2(self.range), math.log2(len(distinct))
        pays = len(distinct) * whole + len(integers) * place < len(integers) * whole
        self.table = distinct if pays else []

    def digits(self, most: int) -> list[tuple[int, int]]:
        """Returns (digit, radix) of all that is written; most: the radix of the table's length, the range and the offset."""
        head = [
            (len(self.table), most),
            (self.range, most),
            (self.offset, most),
            (self.exponent, MOST_EXPONENT + 1),
        ]
        whole = [(number + self.offset, self.range) for number in self.table or self._integers]
        places = {number: place for place, number in enumerate(self.table)}
        return head + whole + [(places[number], len(places)) for number in self._integers if places]


def layers_of(graph: Graph) -> tuple[list[str], list[tuple[str | None, int]]]:
    """Returns the calls of the script's functions, one for each layer, and the tensors that they read, (name or None for zeros, size)."""
    calls: list[str] = []
    tensors: list[tuple[str | None, int]] = []
    uses = {name: sum(name in node.inputs for node in graph.nodes) for name in _values(graph)}
    current, kept = graph.input, ""
    for number, node in enumerate(graph.nodes):
        if uses[current] > 1 and kept != current:
            if kept:
                raise _foreign(node, "a value that is used later, within another such value")
            calls.append("S")
            kept = current
        if node.op == "relu" and node.inputs == (current,):
            before = graph.nodes[number - 1] if number else node
            if before.op not in ("conv", "linear", "add") or uses[current] > 1:
                raise _foreign(node, "ReLU of anything but a layer")
            calls[-1] = calls[-1].removesuffix("0)") + "1)"  # its last argument
        elif node.op == "add" and len(node.inputs) == 2 and set(node.inputs) == {current, kept} != {current}:
            if graph.shape(current) != graph.shape(kept):
                raise _foreign(node, "a sum of unequal shapes")
            calls.append("A(0)")
            kept = ""
        elif node.inputs == (current,):
            calls.append(_call(graph, node, tensors))
        else:
            raise _foreign(node, f"operator {node.op}")
        current = node.outputs[0]
    if current != graph.output:
        raise _foreign(graph.nodes[-1], "an output before the last layer")
    return calls, tensors


def _values(graph: Graph) -> list[str]:
    return [graph.input, *(name for node in graph.nodes for name in node.outputs)]


def _call(graph: Graph, node: Node, tensors: list[tuple[str | None, int]]) -> str:
    """Returns the script's call of a layer, and adds its tensors."""
    inputs, outputs, a = graph.shape(node.inputs[0]), graph.shape(node.outputs[0]), node.attributes
    if node.op == "linear" and len(inputs) == 2 or node.op == "conv" and len(inputs) == 4:
        weight, each = graph.weights[node.weights["weight"]], False
        kernel, stride, padding = 1, 1, 0
        if node.op == "conv":
            each = a["groups"] > 1
            sides = {*weight.shape[2:]}, {*a["stride"]}, {size for both in a["padding"] for size in both}
            if any(len(side) != 1 for side in sides) or {*a["dilation"]} != {1}:
                raise _foreign(node, "a convolution that is not square")
            if each and not (a["groups"] == inputs[1] == outputs[1]):
                raise _foreign(node, "a convolution in groups")
            kernel, stride, padding = (side.pop() for side in sides)
        tensors += [(node.weights["weight"], weight.size), (node.weights.get("bias"), outputs[1])]
        return f"K({inputs[1]},{outputs[1]},{kernel},{stride},{padding},{int(each)},0)"
    if node.op == "mean" and len(inputs) == 4 and sorted(a["axes"]) == [2, 3]:
        return "M"
    if node.op == "reshape" and len(outputs) == 2:
        return "F"
    if node.op == "max_pool" and len(inputs) == 4 and not a["ceil"]:
        kernels, strides = {*a["kernel"]}, {*a["stride"]}
        if len(kernels) == len(strides) == 1 and {*a["dilation"]} == {1} and not np.any(a["padding"]):
            return f"P({kernels.pop()},{strides.pop()})"
    raise _foreign(node, f"operator {node.op}")


def _foreign(node: Node, what: str) -> Mistake:
    return Mistake(f"to qr: page: layer {node.layer!r}: {what} is not in the small script; to: page has it")
