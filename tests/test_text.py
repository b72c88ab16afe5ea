from phi3v.errors import InputError
from phi3v.text import printable


def test_what_a_terminal_obeys_is_escaped():
    assert printable("naïve 文 😀") == "naïve 文 😀"
    assert printable("a\x1b]0;x\x07\u202eb\n\x9bc\udc80") == r"a\x1b]0;x\x07\u202eb\n\x9bc\udc80"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert str(InputError("a\x1b[2J\nb")) == "a\\x1b[2J\nb"
