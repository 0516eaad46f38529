"""GGUF files as bytes: their headers, their checks, the key names this package reads and writes."""
