"""Targets of an export: where a student must run. One file for each.

`to: NAME` is the file NAME.py, which defines `NAME(subject, folder, *, settings) -> Exported`. Keyword-only arguments are its
recipe keys. It writes its files into `folder`, which is empty, and returns how their real runtime answers: see
`exporting.subject`. General code then runs them on all test images, compares, times, and puts the folder in place; a target that
raises, or answers otherwise than the student, leaves nothing behind. The network comes as a `exporting.graph.Graph`.

Beside it the file may define

    OPS = frozenset(...)             the operators of `exporting.graph` that it can write; all by default
    NEEDS_DATA = True                it needs training or test images, so a recipe
    check_graph(settings, graph)     raises Mistake for a graph that it cannot write, before anything is trained
    check_subject(settings, subject) raises Mistake for a student that it cannot write, before this export writes anything
    check(settings)                  raises Mistake for settings that contradict each other

It raises `exporting.subject.NotInstalled` for a package or program that is missing (`needed` imports a package so). A file that
bears the name of a library, such as onnx.py, never imports that library itself: run from its own folder it would find itself.
To add one: write the file. The contract tests find it.
"""
