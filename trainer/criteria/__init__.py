"""Which weights go first: one file for each criterion of the stage prune.

`method: NAME` is the file NAME.py, which defines `NAME`: a pure function of what it asks to know of one layer, by name.

    weight      the layer's weight as the network uses it: zero where it is pruned
    alive       bool of the weight's shape: what is not pruned yet
    parts       number of stacked matrices along the first axis (gates of an LSTM; query, key and value)
    input_axis  the axis of the weight that its inputs lie along
    cost        float64 of the weight's shape: the bits that a packed file spends on keeping each position, 1 or more
    gradient    of the loss with respect to the weight, which also reaches pruned positions

Its keyword-only arguments are its recipe keys. What it returns depends on whether it says how much to prune:

- Without AMOUNT it returns a score of the weight's shape, and the lowest go first. The recipe then gives `sparsity` and,
  if wanted, `scope`. A criterion that asks for `gradient` is asked at every step of the training and its scores add up.
- `AMOUNT = "sensitivity"` names the key that says how much. It then returns (mask, thresholds): a bool of the weight's shape,
  True where a weight stays, and the thresholds for the report ([] where there are none). A gradual schedule
  raises that key from 0 to what the recipe says.
- A criterion that asks for `student` (with `images`, [2, C, H, W] as the student sees them, and `exclude`, names of layers)
  makes the network itself smaller, in place, and returns what `Run.student_spec` then has under "resized".

Beside it the file may define

    SCHEDULES = ("once", "cubic", "iterative")   those that it can serve; all three when it is not there
    SCOPES = ("layer", "global")                 of a criterion that gives scores; the first is the default
    check(settings)                              raises Mistake for settings that do not go together
    check_student(settings, student)             raises Mistake for a student that it cannot prune

To add one: write the file. The recipe's check, the schema and the contract tests find it.
"""
