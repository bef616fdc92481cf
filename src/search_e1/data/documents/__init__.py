"""Builds a corpus from a folder of documents.

Files are listed (``folder``), read (``readers``) in separate processes (``workers``), cut into passages (``chunks``), and
cached between runs (``store``).
"""
