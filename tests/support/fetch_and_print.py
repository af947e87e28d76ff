"""Fetches a model and prints its files, or the error.

python -m fetch_and_print SOURCE TIMEOUT
"""

import sys

from convert import fetch

if __name__ == "__main__":
    fetch.TIMEOUT = float(sys.argv[2])
    try:
        path = fetch.fetch(sys.argv[1])
        print(path)
        for file in sorted(path.iterdir()):
            print(file.name, file.read_text())
    except Exception as error:
        print(type(error).__name__, error)
