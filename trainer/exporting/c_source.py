"""Writes a network as C99: its weights as constants, one call for each operator, and the functions that these need."""

import re

import numpy as np

from trainer.exporting.c_constants import Constants
from trainer.exporting.c_library import needed_of, template
from trainer.exporting.c_memory import plan
from trainer.exporting.c_operators import LINES, At
from trainer.exporting.graph import Graph


class Source:
    """The text of a network in C.

    Attributes:
        memory_bytes: What its maps take, with the scratch of recurrent layers and attention.
        weight_bytes: What its weights take.
        text: student.c.
    """

    def __init__(self, graph: Graph) -> None:
        memory = plan(graph)
        held = Constants(graph, memory)
        lines = []
        for node in graph.nodes:
            at = At(held, node)
            if node.op == "reshape" and at.x() == at.y():
                continue
            layer = re.sub(r"[^\w.\-]", "_", node.layer)
            lines.append(f"    {LINES[node.op](at)}  // {layer or node.op}")
        if held.place(graph.output) != "logits":
            size = int(np.prod(graph.shape(graph.output)))
            lines.append(f"    memcpy(logits, {held.place(graph.output)}, {size} * sizeof(float));")
        self.weight_bytes, self.memory_bytes = held.weight_bytes, 4 * (memory.size + held.scratch)
        self.text = _text(held, lines)


def _text(held: Constants, lines: list[str]) -> str:
    maps = "".join(
        f"static void {name}(const float *x, float *y, int32_t n)\n{{\n    for (; n > 0; n--) {{\n        float v = *x++;\n"
        f"        *y++ = {body};\n    }}\n}}\n\n"
        for body, name in held.maps.items()
    )
    constants = "".join(held.texts.values())
    memory = f"static float memory[{held.memory.size}];\n\n" if held.memory.size else ""
    if held.scratch:
        memory += f"static float scratch[{held.scratch}];\n\n"
    body = "\n".join(lines)
    program = f"""{constants}
{memory}int student_run(const float *image, float *logits)
{{
{body}
    return 0;
}}
"""
    library = needed_of(template("student_kernels.c"), maps + program)
    math = "#include <math.h>\n" if re.search(r"\b(INFINITY|NAN)\b", maps + program) else ""
    return f"""// A student of tiny-student: see student.h.
#include "student.h"

#include <float.h>
{math}#include <stdint.h>
#include <string.h>

{library}{maps}{program}"""
