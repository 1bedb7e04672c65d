"""The joint loss surface: loss over model size, tokens, lr, batch size (and weight decay).

One statistical model, used by the joint fit (`fitting/joint/`), by study planning (`planning/`) and
by the sequential design of a running sweep (`sweeping/search/joint_design.py`):

| module | contents |
|---|---|
| `evaluation` | the fitted surface at one scale: optimum, interval, band; no numpy |
| `basin` | the functional forms of the loss basin, with derivatives |
| `model` | ln loss of many runs and its Jacobian |
| `prior` | prior of the parameters, and random surfaces drawn from it |
| `posterior` | MAP estimate and its covariance (Laplace approximation) |
| `design` | Bayesian experimental design: the value of a run before it is trained |
"""
