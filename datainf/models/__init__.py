"""A base and data -> a fine-tuned adapter and its loss.

`lora`: attach, fine-tune and load an adapter, for all families. `training`: the recipe and the Trainer. `trajectory`: a
fine-tuning step by step. `classifier`, `causal_lm`, `diffusion`: the three families. `losses`: what is differentiated,
one number per example; `fisher`: the same with labels as the model gives them. `forward`: what a function gives of each
example, without gradients.
"""
