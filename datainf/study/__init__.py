"""What the notebooks share.

`parameters`: a run's arguments, checked. `results`: records and figures. `provenance`: where a number comes from.
`plotting` and `tables`: what readers see. `readme`: the README's numbers.
"""
