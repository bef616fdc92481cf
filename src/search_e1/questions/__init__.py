"""Question-answer pairs made from a corpus of passages: written, filtered, split by document, and reviewed."""
