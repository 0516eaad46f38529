"""How fast a pair runs here and what it holds, by layers on the GPU: measured in fresh processes
(``worker``, ``sweep``), saved (``report``), compared (``compare``) and drawn (``plot``).
"""
