"""How (n, d_l) numbers are held: in memory or in a folder, whole or in blocks, and never half-written.

`store`: layer name -> per-sample gradients. `shards`: its files. `rows`: a matrix read in blocks. `memory`: how a
budget of bytes is shared out. `files`: files that are whole or absent.
"""
