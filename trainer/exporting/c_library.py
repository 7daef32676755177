"""The functions of C that a student is made of, in templates/student_kernels.c, and the other templates."""

import re
from importlib import resources


def template(name: str) -> str:
    """Returns a file of the templates."""
    return (resources.files("trainer.exporting") / "templates" / name).read_text(encoding="utf-8")


def needed_of(library: str, program: str) -> str:
    """Returns the functions and types of the library that a program needs, in their order."""
    blocks = [block.strip("\n") for block in re.split(r"\n\n(?=static |typedef |//)", library.strip("\n"))]
    names = [
        re.findall(r"^static (?:const )?\w+ \*?(\w+)\(", block, re.M)[0]
        if "typedef" not in block
        else re.findall(r"\} (\w+);", block)[0]
        for block in blocks
    ]
    known = dict(zip(names, blocks, strict=True))
    wanted: set[str] = set()
    due = [program]
    while due:
        named = set(re.findall(r"\w+", re.sub(r"//.*", "", due.pop()))) & known.keys() - wanted
        wanted |= named
        due += [known[name] for name in named]
    return "".join(f"{block}\n\n" for name, block in known.items() if name in wanted)
