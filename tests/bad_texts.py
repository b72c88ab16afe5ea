"""Texts that strangers put into names and values: codes that a terminal obeys, characters that hide, secrets, and what
breaks out of Markdown.

The secrets are made up. They are put together when they are used, so that no scanner of secrets takes this file for a
leak.
"""

# What a terminal obeys, what changes the direction of text, and what can't be seen.
UNSEEN = [
    *"\0\x07\b\t\n\v\f\r\x1b\x7f\x85\x90\x9b\x9d\x9f\xad",
    *"\u034f\u061c\u115f\u1160\u17b4\u180b\u180e\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202a\u202c\u202d\u202e",
    *"\u2060\u2063\u2066\u2067\u2069\u206a\u2800\u3164\ufe00\ufe0f\ufeff\uffa0\ufff9\ufffe\ud800\udc80\ue000",
    *"\U000e0001\U000e0041\U000e0100\U0001d173\U000f0000\U0010ffff",
]
ORDINARY = [
    "naïve Zoë, cafe\u0301, „Größe“ – 12\u00a0€",
    "日本語　葛\U000e0100城市",
    "한국어 中文 ไทย ગુજરાતી Ελληνικά Русский",
    "עברית العربية \u06dd١٢ سلام",
    "می\u200cخواهم",
    "क\u094d\u200dष श्री\u200cमान",
    "😀 ❤\ufe0f ❤\ufe0f\u200d🔥 👩🏽\u200d💻 👨\u200d👩\u200d👧 1\ufe0f⃣ 🇩🇪 ☺\ufe0e ✈\ufe0f",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
    "\U0001fae8 \U0001faea",  # newer than Python 3.11
    r"C:\new\table",
]
# A name that rings, clears the screen, changes the title, returns to the line's start, and writes a line of its own.
NAME = "\x07\x1b[2J\x1b]0;PWNED\x07\x9b31m\rPWNED\nerror: PWNED\u202egnp.\u200b"
