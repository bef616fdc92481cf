"""A folder of documents becomes a corpus.

What is in it (``folder``), read (``readers``) in processes of their own (``workers``), cut into passages (``chunks``), and
kept between runs (``store``).
"""
