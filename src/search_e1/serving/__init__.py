"""Shared parts of this package's servers: limits, guarded connections, bodies, access, start and stop."""
