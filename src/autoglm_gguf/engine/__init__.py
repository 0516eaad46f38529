"""Engines: what evaluates tokens and images. ``base`` is the protocol, ``llama`` the real one,
``fake`` a deterministic one for tests of everything above.
"""
