"""Commands of the command line. One file for each: `trainer NAME` is the file NAME.py.

It defines

    arguments(parser)    adds the command's options to an argparse parser; trainer/options.py has those that several share
    run(options)         does the work by one call of runs/, packing/ or exports/, and prints
    RESUMES = True       optional: after an interruption the same command goes on where it stopped

The first line of its docstring is its line in `trainer --help`. torch takes seconds to import, so a file imports inside `run`
what it needs. To add one: write the file.
"""
