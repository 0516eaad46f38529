"""The memory promise: what a model will hold (``estimate``), what is chosen so that it stays under
a budget (``plan``), what the process really holds (``measure``), which pages stay (``residency``).
"""
