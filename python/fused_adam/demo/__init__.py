"""The demo, ``python -m fused_adam.demo``: one network, five optimizers, real handwritten digits."""
