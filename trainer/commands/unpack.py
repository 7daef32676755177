"""Write the weights of a packed file as safetensors."""

import argparse

from trainer.mistakes import Mistake
from trainer.recipe.words import path_of
from trainer.storage.files import read_bytes


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_of)
    parser.add_argument(
        "output", type=path_of, nargs="?", help="FILE with the ending .safetensors, when not given"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.packing import network as packed
    from trainer.storage.weights_file import save_file

    state, _ = packed.tensors(read_bytes(options.file), str(options.file))
    output = options.output or options.file.with_suffix(".safetensors")
    if output.exists():
        raise Mistake(f"{output}: is there already; name another file")
    save_file(output, state)
    print(f"{output}: {len(state)} tensors, {output.stat().st_size:,} bytes")
