"""Imports the modules named as arguments; prints the top-level names loaded, as JSON."""

import importlib
import json
import sys

if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
