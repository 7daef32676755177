"""List what runs keep in the cache folder, or remove it."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remove", nargs="*", metavar="NAME", help="remove these entries, or all of them without a name"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs import kept

    if options.remove is None:
        print(kept.table(kept.kept()))
        return
    removed = kept.remove(options.remove)
    print(f"removed {len(removed)} entries, {sum(entry.num_bytes for entry in removed):,} bytes")
