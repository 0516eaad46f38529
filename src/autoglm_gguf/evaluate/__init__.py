"""How close a converted model is to the original: weights without torch, logits with it."""
