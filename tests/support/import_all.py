"""Imports the modules it is given and prints, as JSON, what that loaded."""

import importlib
import json
import sys

if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
