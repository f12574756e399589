"""Everything that meets a host, one module a host. Nothing here acts on import.

The catalogue: what each patch changes, why, how, and when it can go.
"""
