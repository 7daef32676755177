"""Writes a quantized network as C99 of integers alone: bytes in, sums of 32 bits, bytes out, one row after the other."""

from typing import Any

import numpy as np
import torch

from trainer.compression.rounding import grid_exponent
from trainer.exporting.c_library import needed_of, template
from trainer.exporting.c_rows import Program, Unit, program_of, reach
from trainer.exporting.c_weights import Stream, bytes_of, stream_of
from trainer.exporting.dead_units import without_dead
from trainer.exporting.graph import Graph
from trainer.exporting.integer_steps import steps_of
from trainer.exporting.shared_values import shared_values
from trainer.mistakes import Mistake

OPS = frozenset("conv linear relu clamp max_pool avg_pool mean add reshape quantize".split())
NONE = 255  # the number of no map
NOWHERE = 0xFFFF  # the offset of a map of the caller's
MOST_POSITIONS = 4096  # of a mean or pooling, so that its division is rounded as torch's
MOST_PARTS = 1 << 14  # of a step that a mean may lie at: with more, some lie between `TIE` and a half
MOST_BYTES = 0xFFFF - 1  # of memory


def half_of(shift: int) -> int:
    """Returns what is added to a sum before it is shifted, so that it is rounded as by `quantizers.rounded`, from `TIE` up."""
    return (1 << shift - 1) + (1 << shift - 15 if shift >= 15 else 0)


class IntegerSource:
    """The text of a quantized network in C.

    Attributes:
        exponent: A logit is its sum times 2^exponent.
        memory_bytes: What its maps take.
        weight_bytes: What its weights and biases take.
        text: student.c.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph = without_dead(graph)
        self.made = program_of(graph, steps_of(graph))
        self.memory_bytes, self.weight_bytes, self.exponent = self.made.size, 0, 0
        if self.memory_bytes > MOST_BYTES:
            raise Mistake(f"to c: its maps take {self.memory_bytes:,} bytes; {MOST_BYTES:,} are the most")
        self._constants: list[str] = []
        self._wide_bias, self._num_biases = False, 0
        steps = [self._step(number, unit) for number, unit in enumerate(self.made.units)]
        self.weight_bytes += self._num_biases * (2 if self._wide_bias else 1)
        self.text = self._text(steps)

    def _text(self, steps: list[str]) -> str:
        made, count = self.made, len(steps)
        rows = [_map(made, number) for number in range(count + 1)]
        used = sorted({unit.op for unit in made.units})
        calls = {
            "conv": f"conv(s, image, &maps[s->x], y, done[u], u == {count - 1} ? logits : 0);",
            "linear": f"linear(s, image, &maps[s->x], y, u == {count - 1} ? logits : 0);",
            "max_pool": "max_pool(s, image, &maps[s->x], y, done[u]);",
            "avg_pool": "avg_pool(s, image, &maps[s->x], y, done[u]);",
            "mean": "mean(s, image, &maps[s->x], y, done[u]);",
        }
        dispatch = "\n            ".join(
            (f"if (s->op == {OPERATORS[op]})\n                " if len(used) > 1 else "") + calls[op]
            for op in used
        )
        tables = f"""static const map maps[] = {{
    {_lines(rows)}}};

"""
        body = f"""{"".join(self._constants)}
static const step steps[] = {{
    {_lines(steps)}}};

int student_run(const uint8_t *image, int32_t *logits)
{{
    uint16_t done[{count}];  // how often each step has run: once for each row that it makes, or takes the mean of
    for (int32_t i = 0; i < {count}; i++)
        done[i] = 0;
    while (done[{count - 1}] < steps[{count - 1}].total) {{
        int32_t u = {count};
        const step *s;
        do {{  // the last one whose rows are there
            s = &steps[--u];
            if (done[u] == s->total)
                continue;
            if (s->x == 0)
                break;
            int32_t due = done[u] * s->stride[0] + s->reach, most = steps[s->x - 1].total;
            if (done[s->x - 1] >= (due < most ? due : most))
                break;
        }} while (u);
        {{
            const map *y = &maps[u + 1];
            {dispatch}
            done[u]++;
        }}
    }}
    return 0;
}}
"""
        library = needed_of(template("integer_kernels.c"), tables + body)
        widest = max(
            (made.maps[n + 1].width for n, unit in enumerate(made.units) if unit.op == "conv"), default=0
        )
        memory = f"static int32_t words[{made.size // 4 or 1}];\n#define memory ((uint8_t *)words)\n\n"
        if widest:
            memory = memory[:-1] + f"#define WIDEST {widest}\n\n"
        types, functions = _split(library)
        text = f"""// A student of tiny-student: see student.h.
#include "student.h"

{types}{memory}{tables}{functions}{body}"""
        return text.replace("bias_number", "int16_t" if self._wide_bias else "int8_t")

    def _step(self, number: int, unit: Unit) -> str:
        made, y = self.made, self.made.maps[number + 1]
        exponent = made.maps[unit.x].exponent
        facts: dict[str, Any] = {
            "of": 0, "bias": 0, "half": 0, "total": unit.total, "reach": reach(made, number), "groups": 1,
        }  # fmt: skip
        for name in ("kernel", "stride", "before", "dilation"):
            facts[name] = "{" + ", ".join(map(str, getattr(unit, name))) + "}"
        facts |= {"op": OPERATORS[unit.op], "x": unit.x, "added": NONE if unit.added is None else unit.added}
        facts |= {"relu": int(unit.relu), "relu_after": int(unit.relu_after)}
        facts |= {"bias_shift": 0, "added_shift": 0, "shift": y.exponent - exponent}
        layer = unit.node.layer
        if unit.op in ("conv", "linear"):
            exponent += self._weigh(number, unit, facts)
            facts["groups"] = unit.node.attributes.get("groups", 1)
            facts["shift"] = shift = y.exponent - exponent
            if unit.added is not None:
                facts["added_shift"] = made.maps[unit.added].exponent - exponent
                if not 0 <= facts["added_shift"] <= 15:
                    raise Mistake(
                        f"to c: layer {layer!r}: what is added to it has a step too far from its own"
                    )
            if number == len(made.units) - 1:
                self.exponent, facts["shift"] = exponent, 0
            elif not -7 <= shift <= 24:
                raise Mistake(f"to c: layer {layer!r}: its map's step is too far from that of its sums")
            elif shift > 0:
                facts["half"] = half_of(shift)
        elif unit.op in ("mean", "avg_pool"):
            x = made.maps[unit.x]
            positions = x.height * x.width if unit.op == "mean" else unit.kernel[0] * unit.kernel[1]
            padded = unit.op == "avg_pool" and (any(unit.before) or unit.node.attributes["ceil"])
            fine = positions << max(facts["shift"], 0) > MOST_PARTS
            if positions > MOST_POSITIONS or not -4 <= facts["shift"] <= 8 or fine or padded:
                raise Mistake(f"to c: layer {layer!r}: such a mean cannot be computed in integers")
        return "{" + ", ".join(str(value) for value in facts.values()) + "}"

    def _weigh(self, number: int, unit: Unit, facts: dict[str, Any]) -> int:
        """Writes a layer's weights and biases; returns the exponent of its weights."""
        node = unit.node
        weight = self.graph.weights[node.weights["weight"]]
        exponent = grid_exponent(torch.from_numpy(weight))
        whole = weight.astype(np.float64) * 2.0**-exponent
        given = self.made.maps[unit.x]
        if unit.op == "linear" and unit.x:  # rows of a map in memory hold all channels
            shape = (len(whole), given.channels, given.height, given.width)
            whole = whole.reshape(shape).transpose(0, 2, 1, 3).reshape(whole.shape)
        if np.abs(whole).max(initial=0) > 127:
            raise Mistake(
                f"to c: layer {node.layer!r}: its weights are not of 8 bits: quantize the student first"
            )
        facts["of"] = f"&{self._weight(f'weight_{number}', whole.astype(np.float32))}"
        bias = self.graph.weights.get(node.weights.get("bias", ""))
        if bias is not None and bias.any():
            sums = bias.astype(np.float64) * 2.0 ** -(exponent + given.exponent)
            if not np.array_equal(sums, np.rint(sums)):
                raise Mistake(
                    f"to c: layer {node.layer!r}: its biases are no whole sums: quantize the student first"
                )
            shift = max(0, grid_exponent(torch.from_numpy(sums.astype(np.float32))))
            short = (sums / 2.0**shift).astype(np.int64)
            if np.abs(short).max() > 32767:
                raise Mistake(f"to c: layer {node.layer!r}: its biases are not of 16 bits")
            self._wide_bias |= bool(np.abs(short).max() > 127)  # those of all layers then take two bytes
            facts |= {"bias": f"bias_{number}", "bias_shift": shift}
            self._constants.append(
                f"static const bias_number bias_{number}[] = {{{', '.join(map(str, short.tolist()))}}};\n"
            )
            self._num_biases += len(short)
        return exponent

    def _weight(self, name: str, values: np.ndarray) -> str:
        """Writes integers as a `weight` of C: the smallest of gaps and codes, codes of all, plain bytes."""
        shared = [shared_values(values, zero_is_a_value=zero) for zero in (False, True)]
        found = [stream_of(one) for one in shared if one is not None and len(one.values)]
        best = min(found, key=_bytes, default=None)
        if best is None or _bytes(best) >= values.size:
            self._constants.append(_signed(f"{name}_values", values))
            facts = ["0", f"{name}_values", "0", "0", "0", values.size]
            self.weight_bytes += values.size
        else:
            self._constants += [bytes_of(f"{name}_bits", best.bits), _signed(f"{name}_values", best.values)]
            facts = [f"{name}_bits", f"{name}_values", "0" if best.gaps is None else f"{name}_gaps"]
            if best.gaps is not None:
                self._constants.append(bytes_of(f"{name}_gaps", best.gaps))
            for kind, words in (("gap_words", best.gap_words), ("code_words", best.code_words)):
                facts.append(f"{name}_{kind}" if words else "0")
                if words:
                    text = ", ".join(map(str, words))
                    self._constants.append(f"static const uint16_t {name}_{kind}[] = {{{text}}};\n")
            facts.append(best.count)
            self.weight_bytes += _bytes(best)
        self._constants.append(f"static const weight {name} = {{{', '.join(map(str, facts))}}};\n")
        return name


OPERATORS = {"linear": 0, "conv": 1, "max_pool": 2, "avg_pool": 3, "mean": 4}


def _bytes(stream: Stream) -> int:
    """What a stream takes where its values are bytes."""
    return stream.num_bytes - 3 * len(stream.values)


def _signed(name: str, values: np.ndarray) -> str:
    return f"static const int8_t {name}[] = {{{','.join(str(int(v)) for v in np.ravel(values))}}};\n"


def _map(made: Program, number: int) -> str:
    rows = made.maps[number]
    offset = NOWHERE if rows.offset is None else rows.offset
    return f"{{{offset}, {rows.channels}, {rows.height}, {rows.width}, {rows.rows}, {rows.zero}}}"


def _lines(entries: list[str]) -> str:
    return ",\n    ".join(entries)


def _split(library: str) -> tuple[str, str]:
    """Returns the types and the functions of a library."""
    blocks = library.strip("\n").split("\n\n")
    end = next(n for n, block in enumerate(blocks) if "typedef" not in block)
    return "\n\n".join(blocks[:end]) + "\n\n", "\n\n".join(blocks[end:]) + "\n\n"
