"""The stages of a run, one file for each.

`stage: NAME` is the file NAME.py, which defines `NAME(run, *, settings) -> None`. Keyword-only arguments are its recipe keys. It
changes `run.student` (or the teacher), trains through `training.fit.fit`, and adds rows to the report by
`training.rows.record`. `recipe.stages` lists what a stage may define beside its function (check, order, teaches,
changes_student, seals, needs_trained, check_student, becomes).

To add one: write the file. The contract tests find it. A stage never imports a stage.
"""
