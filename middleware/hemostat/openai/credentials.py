"""Reads what names a client in a header, however it is spelled."""

from __future__ import annotations


def credential(value: bytes) -> bytes:
    """Returns the value of an Authorization field, or of another one that names a client, as servers compare it: the
    scheme in lower case, one space between two words and none around them; b"" where nothing is named.

    A value of one word has no scheme: it stays as it is.

    >>> credential(b" bEARER  \\tKey "), credential(b"Key")
    (b'bearer Key', b'Key')
    """
    words = value.split()
    if len(words) > 1:
        words[0] = words[0].lower()
    return b" ".join(words)
