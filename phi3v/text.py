"""Text that comes from outside, made safe to print."""


def printable(text: str, keep: str = "") -> str:
    """The text with every character that a terminal may obey, and every one that can't be seen, written as an escape
    (\\x1b, \\u202e). File names, ids and column names can hold codes that clear the screen or change what was printed.

    keep: characters that stay as they are, such as the line breaks of a message that has several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
