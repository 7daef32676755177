"""Say where each byte of a packed file goes."""

import argparse
import json

from trainer.mistakes import printable
from trainer.recipe.words import path_of
from trainer.storage.files import read_bytes


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_of)
    parser.add_argument("--json", action="store_true", help="for programs: one line")


def run(options: argparse.Namespace) -> None:
    from trainer.packing import network as packed

    data = read_bytes(options.file)
    account, header = packed.account(data, str(options.file))
    if options.json:
        print(json.dumps({"header": header, "account": account}))
        return
    from trainer.reporting.tables import byte_table

    net = header.get("net")
    made = (
        " ".join(f"{k}={v}" if k != "model" else str(v) for k, v in net.items())
        if net
        else "a network on no shelf"
    )
    size = f" for images {'x'.join(map(str, header['shape']))}" if header["shape"] else ""
    classes = f", {len(header['classes'])} classes" if header["classes"] else ""
    print(printable(f"{options.file}: {len(data):,} bytes: {made}{size}{classes}"), end="\n\n")
    print(byte_table([row | {"tensor": printable(row["tensor"], keep="")} for row in account]))
