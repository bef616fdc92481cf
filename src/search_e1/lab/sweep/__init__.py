"""Sweeps: variants of one config times seeds, run in parallel and compared in pairs."""
