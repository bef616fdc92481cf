"""Sweeps: variants of one config times seeds, run side by side, compared pair by pair."""
