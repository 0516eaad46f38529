"""Published weights to a GGUF pair, in one streaming pass, without torch."""
