"""A program whose `main` ends as its argument says; see test_mutations.py."""

import os
import sys
import time


def main(arguments):
    print("this is no answer of the worker")
    match arguments[0]:
        case "right":
            return 0
        case "refused":
            print("error: got this, expected that", file=sys.stderr)
            return 2
        case "traceback":
            raise RuntimeError("a bug")
        case "silent":
            return 2
        case "memory":
            bytearray(256 * 2**20)[::4096] = b"x" * 65536
        case "hang":
            time.sleep(60)
        case "crash":
            os._exit(139)
    return 0
