"""A model and data -> G, the per-sample gradients (n, d_l) of every layer.

`per_sample`: the two calls, fast and slow. `layers`: which weights are layers, and what a gradient of a matrix is.
`recording`: the hooks. `functional`: weights that are no plain matrix. `checking`: are they right? `batches`: which
examples share a batch. `identity`: of which model, data and loss a store is. `factors`: what EK-FAC
wants besides. README.md: what is exact, slow, refused.
"""
