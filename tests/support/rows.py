"""Lines of metrics.jsonl, as a run writes them."""

import json


def row(image: int, **changes) -> dict:
    """The row of an image with a defect."""
    usual = {
        "image": image,
        "file": f"photos/{image}.jpg",
        "readable": True,
        "layer": 5,
        "loss": 0.5,
        "alpha": 3.0,
        "num_outliers": 7,
        "finite": True,
        "skipped": 0.25,
    }
    return usual | changes


def line(image: int, **changes) -> bytes:
    """The same as a line of the file."""
    return (json.dumps(row(image, **changes)) + "\n").encode()


# What a line may be after a fault, by name; none of it is the row of an image.
STRANGE = {
    "byte order mark": b"\xef\xbb\xbf" + line(2),
    "cut": line(2)[:40] + b"\n",
    "zeros": b"\0" * 200 + b"\n",
    "zeros inside": line(2).replace(b"photos", b"\0\0\0\0\0\0"),
    "text": b'"text"\n',
    "number": b"3\n",
    "list": b"[1]\n",
    "nested": b"[" * 100_000 + b"\n",
    "half a character": b"\xc3\n",
    "no image": line(2).replace(b'"image"', b'"picture"'),
    "no file": line(2).replace(b'"file"', b'"name"'),
    "image as text": line("2"),
    "image as a float": line(2.0),
    "image as a boolean": line(True),
    "image below 0": line(-2),
    "huge image": line(10**30),
    "endless image": b'{"image": ' + b"9" * 5000 + b"}\n",
    "loss as text": line(2, loss="0.5"),
    "infinite loss": line(2).replace(b"0.5", b"1e999"),
    "no loss": line(2).replace(b"0.5", b"NaN"),
    "a huge layer": line(2, layer=10**9),
    "readable as text": line(2, readable="yes"),
    "finite as a number": line(2, finite=1),
    "skipped as a list": line(2, skipped=[0.25]),
}
