"""Demonstrations for a cold start: correct, direct trajectories under the policy's own protocol, with real observations.

``passages`` and ``questions`` generate them (through ``hops``); ``endpoint`` and ``file`` convert those of a model or a person.
``writer`` encodes them once, and ``forms`` turns them into training samples.
"""
