"""Inner products of per-sample gradients with a direction, formed inside the backward pass that training runs anyway.

`rules` says which layers can be scored and how, `kernels` puts the scores into the backward pass, `capture` attaches
both to a model. No per-sample gradient of the whole model ever exists.
"""
