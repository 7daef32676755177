"""What happens in a run, in the order the recipe lists it.

`stage: NAME` is the file NAME.py, which defines `NAME(run, *, settings) -> None`. Keyword-only arguments are
its recipe keys. It changes `run.student` (or the teacher), trains through `fit`, and records what came of it with
`evaluate.record`. Where settings do not go together, a function `check(settings)` raises Mistake;
where they do not go with the student, `check_student(settings, student)` does, before anything is trained.
To add one: write the file. A stage never imports a stage.
"""
