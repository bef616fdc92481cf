"""The report: a run as one HTML file, made from its artifacts alone. An unfinished run shows its complete stages."""
