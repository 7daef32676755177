"""Criteria of the stage prune: which weights are removed first. One file for each.

`method: NAME` is the file NAME.py, which defines `NAME`: a pure function whose positional arguments name facts of one layer.

    weight      the layer's weight as the network uses it: zero where it is pruned
    alive       bool of the weight's shape: True where a weight is not pruned yet
    parts       number of stacked matrices along the first axis (gates of an LSTM; query, key and value)
    input_axis  the axis of the weight that its inputs lie along
    cost        float64 of the weight's shape: bits that a packed file spends on keeping each position, 1 or more
    gradient    of the loss with respect to the weight, at pruned positions too

Its keyword-only arguments are its recipe keys. The result depends on who says how much to prune:

- Without AMOUNT it returns a score of the weight's shape, and the lowest are pruned first. The recipe then has the key
  `sparsity` and optionally `scope`. A criterion with `gradient` is called at every step of the training; its scores add up.
- `AMOUNT = "sensitivity"` names the key that says how much. The criterion then returns (mask, thresholds): a bool of the
  weight's shape, True where a weight stays, and a list of thresholds for the report ([] if there are none). A gradual
  schedule raises that key from 0 to the recipe's value.
- A criterion with `student` (and `images`, [2, C, H, W], normalised, and `exclude`, names of layers) makes the network
  itself smaller, in place, and returns the sizes that `Run.student_spec` then has under "resized".

Beside it the file may define

    SCHEDULES = ("once", "cubic", "iterative")   the schedules it supports; all three by default, `cubic` with `gradient`
    SCOPES = ("layer", "global")                 the scopes of its scores; the first is the default
    check(settings)                              raises Mistake for settings that contradict each other
    check_student(settings, student)             raises Mistake for a student that it cannot prune

To add one: write the file. The recipe's check, the schema and the contract tests find it.
"""
