"""Says in plain words what PyYAML found wrong with a text, and on which line."""

import re
from collections.abc import Callable

import yaml

Words = Callable[[yaml.MarkedYAMLError, list[str]], tuple[int, str]]


def in_words(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """Returns the line (from 1) on which to look, and what is wrong there.

    error: of PyYAML's scanner, parser or composer. text: what was read.
    """
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text) + [""]  # as PyYAML counts them
    for pattern, words in _WORDS:
        if re.match(pattern, error.problem or ""):
            return words(error, lines)
    context = f"{error.context}: " if error.context else ""
    return _found(error), f"{context}{error.problem}"


def _found(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1


def _begun(error: yaml.MarkedYAMLError) -> int:
    mark = error.context_mark or error.problem_mark
    return mark.line + 1


def _block(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    """Returns the words for 'expected <block end>': an entry is indented otherwise, or something follows a value."""
    line, column = _found(error), error.problem_mark.column
    first, depth = _begun(error), error.context_mark.column
    before = lines[line - 1][:column]
    if before.strip(" -?"):  # not the first thing of its line
        what = _piece(lines[line - 1][column:])
        if what[:1] in "]})":
            return (
                line,
                f"the bracket {what[0]} closes nothing: one too many, or its opening bracket is missing",
            )
        return line, (
            f"{what!r} follows a value that had ended: a comma or a quote is missing, "
            "or quotes belong around the whole value"
        )
    if column == depth:
        entries = ("list entries ('- ...')", "keys ('key: value')")
        here, there = entries if lines[line - 1][column:].startswith("-") else reversed(entries)
        return line, f"{here} and {there} cannot stand in one block, which begins on line {first}"
    open_ones = [str(each) for each in _open_indentations(lines[: line - 1])]
    fits = " or ".join(filter(None, [", ".join(open_ones[:-1]), open_ones[-1]]))
    return (
        line,
        f"wrong indentation: this line begins with {_spaces(column)}; {fits} would fit the lines above",
    )


def _bracket(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line, first = _found(error), _begun(error)
    opening = lines[first - 1][error.context_mark.column : error.context_mark.column + 1]
    got = error.problem.rpartition("got ")[2].strip("'\"")
    if "end" in got:
        return first, f"the bracket {opening} is never closed"
    at = lines[line - 1][error.problem_mark.column :]
    comma = f"before {_piece(at)!r}" if at[:1] != ":" else f"in {_piece(lines[line - 1].strip(), 40)!r}"
    return line, f"a comma is missing {comma}, or the bracket {opening} of line {first} is not closed"


def _no_colon(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _no_key(_begun(error), lines)


def _second_colon(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line = _found(error)
    if re.search(r":\s|[\"'\]}]\s*:", lines[line - 1][: error.problem_mark.column]):
        return line, "a second 'key: value' on one line: begin a new line, or put the value in quotes or { }"
    above = next((n for n in range(line - 1, 0, -1) if lines[n - 1].strip()), line)
    if _indentation(lines[line - 1]) <= _indentation(lines[above - 1]):
        return _no_key(above, lines)
    return line, "wrong indentation: this line is deeper than the one above, which has a value already"


def _list_entry(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _found(error), "a list entry ('- ...') begins on a line of its own; on one line write [a, b]"


def _character(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line = _found(error)
    got = lines[line - 1][error.problem_mark.column : error.problem_mark.column + 1]
    if got == "\t":
        return line, "a tab: YAML is indented by spaces"
    return line, f"a value cannot begin with {got!r}: put it in quotes"


def _unclosed(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line, column = _begun(error), error.context_mark.column
    return line, f"the quote {lines[line - 1][column : column + 1]} is never closed"


def _escape(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _found(error), "in double quotes a backslash begins an escape: double it, or use single quotes"


def _content(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line, got = _found(error), error.problem.rpartition("found ")[2].strip("'\"")
    if "end" in got:
        return line, "a value is missing at the end, or a bracket is never closed"
    return line, f"a value is missing before {got!r}" + (", or quotes around it" if len(got) == 1 else "")


def _anchor_twice(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    name = re.search(r"anchor '(.*?)'", error.context or "")
    return _found(
        error
    ), f"the anchor &{name[1] if name else ''} is given twice, first on line {_begun(error)}"


def _no_anchor(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    name = error.problem.partition("'")[2].rpartition("'")[0]
    return _found(error), f"there is no anchor &{name} above (a value that begins with * goes in quotes)"


def _second_document(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _found(error), "a second document begins here; one is allowed"


def _no_name(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line = _found(error)
    return line, f"{error.context.split()[-1]} without a name: a value that begins with * or & goes in quotes"


def _block_text(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _found(error), "a value that begins with | or > is a text of several lines: put this one in quotes"


def _directive(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    line = next((n for n, each in enumerate(lines, 1) if each.startswith("%")), _found(error))
    return line, "a line that begins with % is a directive of YAML: put the value in quotes"


def _tag(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str]:
    return _found(error), "a value that begins with ! is a tag of YAML: put it in quotes"


_WORDS: list[tuple[str, Words]] = [
    (r"expected <block end>", _block),
    (r"expected ',' or '[\]}]'", _bracket),
    (r"could not find expected ':'", _no_colon),
    (r"mapping (values|keys) are not allowed", _second_colon),
    (r"sequence entries are not allowed", _list_entry),
    (r"found character .* that cannot start", _character),
    (r"found unexpected (end of stream|document separator)", _unclosed),
    (r"found unknown escape|expected escape sequence", _escape),
    (r"expected the node content", _content),
    (r"second occurrence", _anchor_twice),
    (r"found undefined alias", _no_anchor),
    (r"but found another document", _second_document),
    (r"expected alphabetic or numeric character", _no_name),
    (r"expected (chomping or|indentation|a comment)", _block_text),
    (r"expected '<document start>'|expected a digit|found (duplicate|incompatible) YAML", _directive),
    (r"expected '!'|expected URI|expected '>'|(found undefined|duplicate) tag handle|expected ' '", _tag),
]


def _no_key(line: int, lines: list[str]) -> tuple[int, str]:
    written = _piece(lines[line - 1].strip(), 40)
    return line, f"{written!r} is no 'key: value': the colon, or the space after it, is missing"


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _open_indentations(lines: list[str]) -> list[int]:
    """Returns the numbers of spaces with which the next line may begin: those of the blocks that are still open."""
    found: list[int] = []
    for line in lines:
        if not line.strip() or line.lstrip(" ").startswith(("#", "---")):
            continue
        columns = [_indentation(line)]
        while re.match(r"- +(- |[^\"'\[{].*:( |$))", line[columns[-1] :]):  # a block inside a list entry
            columns.append(columns[-1] + 2 + _indentation(line[columns[-1] + 2 :]))
        found = [each for each in found if each < columns[0]] + columns
    return found


def _piece(text: str, most: int = 20) -> str:
    """Returns the beginning of a text, for a message."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _spaces(number: int) -> str:
    return "no space" if number == 0 else f"{number} space{'s' if number > 1 else ''}"
