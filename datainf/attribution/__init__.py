"""G, V -> scores: which training examples a query's loss comes from.

`methods`: each method as its equation, Eq. 5 among them, and `kronecker`: those that know of which matrix a layer is.
`damping`: what is added to H. `influence`: they meet layers, queries and a budget of memory. `inputs`: the rows of a
layer, and what can be wrong with them. `estimating`: what a study will cost, before it is begun.
"""
