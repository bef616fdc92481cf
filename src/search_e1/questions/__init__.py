"""Generates question-answer pairs from a corpus: writes, filters, splits by document, and supports human review."""
