"""Every call into llama.cpp, and nothing else: the one seam to the foreign engine.

Failures leave this package as `EngineError` or `NativeLibraryError`, with llama.cpp's own last
error lines attached. If llama.cpp renames something, one line here fails.
"""
