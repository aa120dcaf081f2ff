"""Is a score any good?

`metrics`: against the exact scores, against flipped labels, against classes. `retraining`: models fine-tuned again
without some examples, and `counterfactual`: do scores predict what becomes of them? `baselines`: what a score has to
beat. `damping`: the scores along a path of damping. `frechet`: generated pictures.
"""
