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

# Names of flags and variables whose values are secret.
SECRET_NAMES = (
    "--pw --pwd --my-pwd --db_pass --my-password --passphrase --auth --authorization --cookie --api-key --wandb_key "
    "--hub_token --client-secret --pat --bearer PASSWORD WANDB_API_KEY MYSQL_PW DB_PASS apiToken"
).split()
# Names that look like those of secrets, and are none.
ORDINARY_NAMES = (
    "--max_new_tokens --max_tokens_per_gpu --tokenizer --author --authors --path --patch_size --passes --upwards "
    "--pattern include_tokens_per_second --bypass"
).split()


def _random(length: int, alphabet: str = "aB3xY9kLm0Qr7TzWc5Vd") -> str:
    return (alphabet * (length // len(alphabet) + 1))[:length]


HEX = _random(40, "0123456789abcdef")
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxIn0" + "." + _random(20)
# Texts that hold a secret, with the part of the text that is secret.
SECRETS = {
    "Google": (f"key {(s := 'AI' + 'za' + _random(35))} refused", s),
    "npm": (f"x={(s := 'npm' + '_' + _random(36))}", s),
    "AWS": (f"({(s := 'AK' + 'IA' + 'ABCDEFGHIJKL2345')})", s),
    "AWS, temporary": (f"id '{(s := 'AS' + 'IA' + 'ABCDEFGHIJKL2345')}'", s),
    "Anthropic": (f"{(s := 'sk-' + 'ant-api03-' + _random(30))}", s),
    "Stripe": (f"{(s := 'sk_' + 'live_' + _random(24))} is old", s),
    "Slack": (f"{(s := 'xo' + 'xb-1234-' + _random(20))}", s),
    "Slack hook": (f"https://hooks.slack.com/services/{(s := 'T012/B034/' + _random(24))}", s),
    "PyPI": (f"password {(s := 'pypi-' + 'AgE' + _random(60))}", s),
    "GitHub": (f"{(s := 'ghp' + '_' + _random(36))}", s),
    "Hugging Face": (f"{(s := 'hf' + '_' + _random(34))}", s),
    "JWT": (f"cookie {JWT}; path=/", JWT),
    "bearer": (f"Authorization: Bearer {_random(30)}", _random(30)),
    "bearer in a header": (f"{{'authorization': 'bearer {_random(30)}'}}", _random(30)),
    "bearer with JWT": (f"-H 'Authorization: Bearer {JWT}'", JWT),
    "basic": ("Basic dXNlcjpwYXNzd29yZDE=", "dXNlcjpwYXNzd29yZDE="),
    "proxy": ("http_proxy=http://me:s3cret@proxy:3128", "s3cret"),
    "proxy with a slash": ("http://me:s3/cret@proxy:3128", "s3/cret"),
    "proxy with an @": ("http://me:s3@cret@proxy:3128", "cret"),
    "proxy without a scheme": ("--proxy me:s3cret@proxy:3128", "s3cret"),
    "database": ("postgresql+psycopg://me:s3cret@db/x?y=1", "s3cret"),
    "token in an address": (f"https://{_random(20)}@host/x.git", _random(20)),
    "Azure": ("AccountName=x;AccountKey=c2VjcmV0c2VjcmV0==;EndpointSuffix=y", "c2VjcmV0c2VjcmV0=="),
    "W&B": (f"wandb login {HEX}", HEX),
    "W&B, a name near": (f"wandb: the api_key is {HEX}", HEX),
    "private key": (
        f"-----BEGIN RSA PRIVATE KEY-----\n{_random(64)}\n-----END RSA PRIVATE KEY-----\n",
        _random(64),
    ),
    "private key, cut off": (f"-----BEGIN OPENSSH PRIVATE KEY-----\n{_random(64)}", _random(64)),
}
NO_SECRETS = (
    f"commit {HEX} of microsoft/Phi-3.5-vision-instruct",
    f"me/model@{HEX}: no such revision",
    "hf_datasets/a.jsonl:7: id is 5, must be a text",
    "Basic settings, and the Bearing of it",
    "https://host:8080/a/b@main#x",
    "git@github.com:me/repository.git",
    "me@example.com",
    "ASIATIC elephants, task-learning-rate, disk-space-left",
    "a, b: c; d=e --name x",
)
# Each takes seconds where the time grows with the square of its length.
LONG = {
    text: text * (80_000 // len(text))
    for text in (
        *(
            "a-",
            "key",
            "-key ",
            "key=",
            "key='",
            'key="',
            "'--key=",
            "token",
            "eyJ",
            "eyJ-",
            "sk-",
            "hf_",
            "://a:b",
            "://",
        ),
        *("a:b", "a@", "a:bcd", "Bearer ", "bearer a", "Basic ", "-----BEGIN PRIVATE KEY-----", "wandb", "0123456789"),
        *("&sig=", "a.", "--pw ", "\\", " ", "\n", "'", '"', "SG.", "\u200d", "--pw=\\", "api key "),
    )
}

# Names that leave their place in Markdown, YAML or HTML if they are put there as they are.
MARKDOWN = (
    "a/b\n\n# PWNED\n",
    "a/b\n---\nlicense: PWNED\n---\n",
    "a/b\n```\n# PWNED",
    "a`b``c```d",
    "`",
    "a|b|c",
    "<script>PWNED</script><img src=x onerror=PWNED>",
    "[PWNED](javascript:alert) ![PWNED](https://example.com/x.png) <https://example.com>",
    "a: b\n- c: &x *x !!python/object",
    "'\"; rm -rf / #",
    "\u2028# PWNED\u2029\x85\x0c\x1b[2J\udc80",
    "**bold** ~~gone~~ &lt;b&gt; \\",
)
