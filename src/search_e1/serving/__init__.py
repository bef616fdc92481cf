"""What the servers of this package have in common: limits, guarded connections, bodies, access, start and stop."""
