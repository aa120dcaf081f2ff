"""Is a score any good?

`metrics`: against the exact scores, against flipped labels, against classes. `frechet`: generated pictures.
"""
