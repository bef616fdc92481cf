"""``python -m search_e1.cli``: the command line, for launchers that start modules."""

from search_e1.cli.main import main

main()
