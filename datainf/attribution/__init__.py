"""G, V -> scores: which training examples a query's loss comes from.

`methods`: each method as its equation, Eq. 5 among them. `influence`: they meet layers, queries and a budget of memory.
`estimating`: what a study will cost, before it is begun.
"""
