"""Demonstrations for a cold start: correct, direct trajectories under the policy's own protocol, with real observations.

``passages`` and ``questions`` write them (through ``hops``), ``endpoint`` and ``file`` take over what others did; ``writer``
makes their ids, once, and ``forms`` the samples that a policy is trained on.
"""
