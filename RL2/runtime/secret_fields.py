"""Secrets that are known by their names: fields of JSON and YAML, flags, cookies, headers.

People and models also write about passwords and tokens. So the less clearly a name and its place
mark a secret, the stricter the pattern for the value. A plain text search finds the names first:
most texts hold none, and then no pattern is tried.
"""

import re

_KEYS = ("api", "access", "secret", "private", "account", "master", "signing", "encryption")
_TOKENS = ("access", "auth", "api", "refresh", "bearer", "session", "security", "oauth", "bot")

_ESCAPES = r"\\{0,8}"  # of JSON in JSON
_END = rf"(?:_?\d{{1,2}})?(?:{_ESCAPES}[\"'])?\s{{0,5}}"
# A quote, and its escapes. A type, a variable or a placeholder is not a secret.
_OPENS = (
    rf"(?::|=>?)\s{{0,5}}b?(?P<escapes>{_ESCAPES})(?P<quote>[\"'])"
    r"(?!(?:string|str|text|password|secret|token|null|none|true|false|required|optional)"
    r"(?P=escapes)(?P=quote)|\$\{|\{\{|<[a-z]|\*\*\*)"
)
# A quote after more backslashes is a part of the value.
_INSIDE = r"(?:(?!(?P=escapes)(?P=quote))(?:\\++[\"']?|[^\\\n]))"
_NO_SPACE = r"(?:(?!(?P=escapes)(?P=quote))(?:\\++[\"']?|[^\\\s]))"
_BARE = r"[^\s\"'`&,;()<>{}\[\]\\|]"
# Characters that end a value in an address or a call may be part of one that is alone on its line.
_WIDE = r"[^\s\"'`<>{}\\]"
_BARES = ((r"(?:=|%3[AaDd](?:%2[027])?)\s{0,3}", _BARE), (r":\s{0,3}", _WIDE))
_NO_EXAMPLE = r"(?![<{*]|\$\{|(?-i:[A-Z_]+)(?![\w-]))"
_FLAG_VALUE = rf"(?:=|[\"'],\s{{0,3}}[\"'])[\"']?){_NO_EXAMPLE}[^\s\"']{{4,2000}}"
_FLAG_WORD = rf"\s{{1,3}}[\"']?)(?!-){_NO_EXAMPLE}(?=[^\s\"']{{0,200}}\d)[^\s\"']{{6,2000}}"


def _after(words: tuple[str, ...], before: str = "") -> str:
    """Where one of the words ends, with a hyphen, an underscore or nothing after it."""
    return "|".join(rf"(?<={before}{word}{sign})" for word in words for sign in ("", "[_-]"))


def _clear(name: str, words: tuple[str, ...] = ()) -> list[str]:
    """Patterns for a name (after one of the words, if any) that only secrets have."""
    field, flag = (f"(?:{_after(words, before)})" if words else before for before in ("", "-"))
    flag = flag if words else "(?<=-)"
    return [
        rf"({field}{name}{_END}{_OPENS}){_INSIDE}{{6,2000}}",
        *(
            rf"({field}{name}{_END}{is_})(?={some}{{0,200}}\d){some}{{5,2000}}{_BARE}"
            for is_, some in _BARES
        ),
        rf"({flag}{name}{_FLAG_VALUE}",
        rf"({flag}{name}{_FLAG_WORD}",
        rf"({field}{name}>)[^<>\s]{{6,2000}}(?=</)",
    ]


def _ambiguous(name: str) -> list[str]:
    """Patterns for a name that other values have as well."""
    return [
        rf"({name}{_END}{_OPENS})(?![/~.]){_NO_SPACE}{{8,2000}}",
        *(
            rf"({name}{_END}{is_})(?![/~.])(?={some}{{0,200}}\d)(?={some}{{0,200}}[a-z])"
            rf"{some}{{7,2000}}{_BARE}"
            for is_, some in _BARES
        ),
    ]


# Tokens of a language model are not secrets.
_TOKEN = "".join(rf"(?<!{word}[_-])" for word in ("pad", "eos", "bos", "unk", "cls", "sep", "mask"))
_TOKEN += r"(?<![A-Za-z])token"

# Patterns by the word that they begin with. The first group is what comes before the secret.
_PATTERNS = {
    "password": _clear("password"),
    "passwd": _clear("passwd"),
    "passphrase": _clear("passphrase"),
    "key": _clear("key", _KEYS),
    "token": [
        *_clear("token", _TOKENS),
        rf"({_TOKEN}{_END}{_OPENS})(?={_NO_SPACE}{{0,200}}\d)(?=[^\s\"']{{0,200}}[a-z])"
        rf"{_NO_SPACE}{{8,2000}}",
        *_ambiguous(_TOKEN)[1:],
        rf"((?<=-){_TOKEN}{_FLAG_VALUE}",
        rf"((?<=-){_TOKEN}{_FLAG_WORD}",
    ],
    "secret": [
        *_clear("secret", ("client",)),
        *_ambiguous("secret"),
        rf"((?<=-)secret{_FLAG_VALUE}",
        rf"((?<=-)secret{_FLAG_WORD}",
    ],
    "pwd": _ambiguous("(?<![A-Za-z])pwd"),
    "credential": _ambiguous("credentials?"),
    "session": _ambiguous("session[_-]?id"),
    "cookie": [
        rf"(cookie{_END}[:=,]\s{{0,3}}b?(?:{_ESCAPES}[\"'])?)"
        r"(?=[\w.-]{1,80}=[^\s;\"'=]{8,})[^\r\n\"'\\]{8,}"
    ],
    "curl": [
        r"(curl\b[^\n]{0,300}?\s(?:-u|--user|--proxy-user)[\s=]{0,3}[\"']?[^\s:\"']{0,100}:)"
        r"[^\s\"']{3,}"
    ],
    "sshpass": [r"(sshpass\s{1,3}-p\s{0,3}[\"']?)[^\s\"']{3,}"],
    "mysql": [r"(mysql(?:dump|admin)?\b[^\n]{0,200}?\s-p[\"']?)[^\s\"'-][^\s\"']{3,}"],
    "redis-cli": [r"(redis-cli\b[^\n]{0,200}?\s-a\s{1,3}[\"']?)[^\s\"']{3,}"],
    "login": [r"(login\s{1,3}\S{1,100}\s{1,3}password\s{1,3})\S{3,}"],
    "basic ": [
        r"(basic\s)(?=\S{0,200}(?:(?-i:[a-z][A-Z])|[=\d]))[A-Za-z0-9+/]{12,}={0,2}",
    ],
}
FIELDS = {
    name: [re.compile(pattern, re.I) for pattern in patterns]
    for name, patterns in _PATTERNS.items()
}


def without_fields(text: str, hidden: str) -> str:
    """`text` with `hidden` in place of every value that has the name of a secret."""
    lower = _lower(text)
    for name, patterns in FIELDS.items():
        if name not in lower:
            continue
        parts, done, at = [], 0, lower.find(name)
        while at >= 0:
            found = next(filter(None, (one.match(text, at) for one in patterns)), None)
            if found:
                parts += (text[done : found.end(1)], hidden)
                done = found.end()
            at = lower.find(name, max(done, at + 1))
        if parts:
            text = "".join(parts) + text[done:]
            lower = _lower(text)
    return text


def _lower(text: str) -> str:
    """`text` in lower case, with the same length (only one letter would become two)."""
    return text.replace("\u0130", "I").lower()
