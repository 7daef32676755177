"""Lists of pictures that are not folders of classes: a CSV file, and a file of class names."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainer.data.listing import Listing, composed
from trainer.mistakes import Mistake
from trainer.storage.files import read_bytes

COLUMNS = ("path", "label")


def is_table(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and path.is_file()


def list_table(path: Path) -> Listing:
    """Lists the pictures of a CSV file with the columns path and label, in its order.

    Its first line may name the columns, which may then stand in another order and beside others. Paths are relative to
    the file's folder. A picture without a label is unlabelled.

    Raises:
        Mistake: With the line, for a missing path or column, a path given twice, and a file that is no table.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Mistake(f"{path}: is no CSV file in UTF-8: {error}") from None
    head = [word.strip().lower() for word in rows[0]] if rows else []
    named = set(COLUMNS) <= set(head)
    at_path, at_label = (head.index(name) for name in COLUMNS) if named else (0, 1)
    found = Listing()
    lines: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if (number == 1 and named) or not any(word.strip() for word in row):
            continue
        if len(row) <= max(at_path, at_label) or not row[at_path].strip():
            raise Mistake(f"{path}:{number}: got {','.join(row)!r}; a path and a label are needed")
        name, label = row[at_path].strip(), composed(row[at_label].strip())
        if name in lines:
            raise Mistake(f"{path}:{number}: {name} stands in line {lines[name]} too")
        lines[name] = number
        file = path.parent / name
        if not file.is_file():
            raise Mistake(f"{path}:{number}: there is no file {file}")
        found.files.append(str(file))
        found.inside.append(name)
        found.classes.append(label)
    found.folders = sorted({label for label in found.classes if label})
    return found


def named_classes(file: Path, classes: Sequence[str]) -> list[str]:
    """Returns the names that a file gives to classes: each line has a folder's name, a space or tab, and the class's name.

    Names that two classes share get the folder's name in brackets. Raises Mistake for classes that the file does not name.
    """
    lines = [
        line.split(maxsplit=1)
        for line in read_bytes(file).decode("utf-8", "replace").splitlines()
        if line.strip()
    ]
    known = {composed(words[0]): composed(words[1].strip()) for words in lines if len(words) == 2}
    missing = [name for name in classes if name not in known]
    if missing:
        raise Mistake(f"class_names: {file} has no line for {len(missing)} classes, such as {missing[0]!r}")
    count = Counter(known[name] for name in classes)
    return [known[name] + (f" ({name})" if count[known[name]] > 1 else "") for name in classes]
