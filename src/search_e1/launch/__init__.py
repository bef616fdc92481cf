"""From one process to many: a stage as a group of processes that begin and end together."""
