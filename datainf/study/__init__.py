"""What the notebooks share.

`parameters`: a run's arguments, checked. `results`: records and figures. `provenance`: where a number comes from.
`sweep`: a scale's runs. `verdict`, `publish`, `replay`: what was published, and what comes out now. `plotting` and
`tables`: what readers see. `ground_truth`: the models and the plan of notebook 70. `readme`: the tables
of the README and of docs/. `students`: the lessons without their solutions. `logistic`: the model of the first two.
"""
