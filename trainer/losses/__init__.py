"""Losses of the student, one file for each.

`loss: NAME` is the file NAME.py, which defines `NAME`: a function whose positional arguments name its inputs, or, if it
has learned parameters, an `nn.Module` class whose constructor gets example sizes under the same names. The names:

    student_logits, teacher_logits        [N, K]
    student_map, teacher_map              [N, C, H, W] of one pair of layers
    projected_map                         [N, Ct, h, w]: the student's map through a learned 1x1 convolution to the
                                          teacher's width; teacher_map then comes at the same size
    student_maps, teacher_maps            lists of the paired maps, shallow first
    student_embedding, teacher_embedding  [N, D], pooled, before the classifier
    projected_embedding                   [N, Dt]: the student's through a learned linear map
    student_weight, teacher_weight        a layer's parameter
    labels [N] or [N, K], index [N] (each sample's position in the training part, below the constructor's num_samples),
    class_weights [K] of the labels' classes, or None where all weigh the same; teacher_head (embedding -> logits), epoch

Keyword-only arguments are recipe keys. To add a loss: write the file; the contract tests find it.
"""
