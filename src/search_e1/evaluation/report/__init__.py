"""The report: a run as one HTML file. It reads artifacts, never a model, and shows what there is of an unfinished run."""
