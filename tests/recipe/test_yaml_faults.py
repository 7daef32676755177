"""What a user is told of a text that is not YAML: the line to look at, and what is usually wrong there."""

import pytest

from trainer.recipe.text import RecipeError, value

TOLD = {
    # indentation
    "data:\n    dataset: digits\n  size: 3\n": "3: wrong indentation: this line begins with 2 spaces; 0 or 4 would fit",
    "stages:\n  - stage: a\n   key: b\n": "3: wrong indentation: this line begins with 3 spaces; 0, 2 or 4 would fit",
    "a:\n  - 1\n - 2\n": "3: wrong indentation: this line begins with 1 space; 0 or 2 would fit",
    "a:\n  - [b: 1]\n - 2\n": "3: wrong indentation: this line begins with 1 space; 0 or 2 would fit",
    "a: 1\n\n  b: 2\n": "3: wrong indentation: this line is deeper than the one above, which has a value already",
    "a:\n\tb: 1\n": "2: a tab: YAML is indented by spaces",
    "a: 1\n- b\n": "2: list entries ('- ...') and keys ('key: value') cannot stand in one block, which begins on line 1",
    "- b\na: 1\n": "2: keys ('key: value') and list entries ('- ...') cannot stand in one block, which begins on line 1",
    "a: - b\n": "1: a list entry ('- ...') begins on a line of its own",
    # a colon, or the space after it
    "name: a\nseed 1\nb: 2\n": "2: 'seed 1' is no 'key: value': the colon, or the space after it, is missing",
    "name:x\nseed: 1\n": "1: 'name:x' is no 'key: value': the colon, or the space after it, is missing",
    "a: b: c\n": "1: a second 'key: value' on one line: begin a new line, or put the value in quotes",
    "a: 'b' : c\n": "1: a second 'key: value' on one line",
    # brackets and quotes
    "a: [1, 2\nb: 3\n": "2: a comma is missing in 'b: 3', or the bracket [ of line 1 is not closed",
    "a: {b: 1 c: 2}\n": "1: a comma is missing in 'a: {b: 1 c: 2}', or the bracket { of line 1 is not closed",
    "a:\n- {b: {c: 3}\n- {d: 4}\n": "3: a comma is missing before '- {d: 4}', or the bracket { of line 2 is not closed",
    "a: {b: 1\n": "1: the bracket { is never closed",
    "a: [": "1: a value is missing at the end, or a bracket is never closed",
    "a: {b: 1}}\n": "1: the bracket } closes nothing: one too many, or its opening bracket is missing",
    "a: ]\n": "1: a value is missing before ']'",
    "a: [1, , 2]\n": "1: a value is missing before ','",
    "b: 1\na: 'b\nc: d\n": "2: the quote ' is never closed",
    "a: 'it's'\n": '1: "s\'" follows a value that had ended: a comma or a quote is missing',
    'a: "C:\\data"\n': "1: in double quotes a backslash begins an escape: double it, or use single quotes",
    'a: "\\xgg"\n': "1: in double quotes a backslash begins an escape",
    # signs that mean something to YAML
    "a: @b\n": "1: a value cannot begin with '@': put it in quotes",
    "a: %b\n": "1: a value cannot begin with '%': put it in quotes",
    "a: 1\n%b\n": "2: a line that begins with % is a directive of YAML",
    "%a\n": "1: a line that begins with % is a directive of YAML",
    "a: * b\n": "1: alias without a name: a value that begins with * or & goes in quotes",
    "a: >x\n": "1: a value that begins with | or > is a text of several lines: put this one in quotes",
    "a: !x!y 1\n": "1: a value that begins with ! is a tag of YAML: put it in quotes",
    "a: *b\n": "1: there is no anchor &b above",
    "a: &x 1\n\nb: &x 2\n": "3: the anchor &x is given twice, first on line 1",
    "a: 1\n---\nb: 2\n": "2: a second document begins here; one is allowed",
    # an end of line of each kind
    "a: 1\r\n- b\r\n": "2: list entries",
}


@pytest.mark.parametrize("text", TOLD)
def test_the_line_and_what_is_usually_wrong(text):
    with pytest.raises(RecipeError) as caught:
        value(text)
    told = str(caught.value).removeprefix("value:").replace("is not YAML: ", "", 1)
    assert told.startswith(TOLD[text])


@pytest.mark.parametrize(
    "text", ["!!float ''", "!!int ''", "!!float ' '", "!!int '-'", "!!float .", "!!bool ''"]
)
def test_a_tag_of_a_number_that_is_none(text):
    with pytest.raises(RecipeError, match="cannot be read: .* is no !!"):
        value(f"lr: {text}")
