"""Print the first questions of a file, one per line, for `make try`.

python scripts/first_questions.py 3 questions.jsonl
"""

import sys
from itertools import islice
from pathlib import Path

from search_e1.data.lines import read_lines


def main() -> None:
    number, path = sys.argv[1:]
    for _, row in islice(read_lines(Path(path)), int(number)):
        print(row["question"])


if __name__ == "__main__":
    main()
