"""How good a model is, measured: how close to its original (``parity``), how well it predicts
(``perplexity``) and how far from its base, what it taps (``actions``); and what its matrices are
multiplied with (``calibration``). Torch is for the original alone.
"""
