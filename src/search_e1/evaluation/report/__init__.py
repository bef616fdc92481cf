"""The report: a run as one HTML file, made from its artifacts alone. An unfinished run is shown as far as it is complete."""
