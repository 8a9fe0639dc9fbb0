"""Keys, tokens and passwords: by the formats of services, by a name before the value, and in URLs and commands."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import AnyStr

from engine.data.clean.pii.key_forms import FORMS, UUID
from engine.data.clean.pii.scan import Scan, keylike, windows, words

_HEX = "[0-9a-f]"

_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(f'{begin}{rest}' for begin, rest in FORMS)})(?![A-Za-z0-9_-])")
_BEGINNING = re.compile("|".join(f"(?:{begin})" for begin, _ in FORMS if begin))

# Webhook URLs (anyone who has one can post), and URL parameters that contain a key.
_HOOK = re.compile(
    r"discord(?:app)?\.com/api/(?:v[0-9]{1,2}/)?webhooks/[0-9]{16,20}/[A-Za-z0-9_-]{50,90}|"
    r"hooks\.slack\.com/(?:services|workflows|triggers)/[A-Z0-9]{8,12}/[A-Z0-9]{8,12}/[A-Za-z0-9]{18,40}|"
    r"[a-z0-9.-]{0,40}webhook\.office\.com/webhookb2/[A-Za-z0-9@/-]{60,250}|"
    rf"open\.(?:feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook/{UUID}|"
    rf"qyapi\.weixin\.qq\.com/cgi-bin/webhook/send\?key={UUID}|"
    rf"oapi\.dingtalk\.com/robot/send\?access_token={_HEX}{{64}}"
)
_PARAMETER = re.compile(
    r"(?:AccountKey|SharedAccessKey|SharedSecret|AccessKey)=(?P<value>[A-Za-z0-9+/]{42,88}={0,2})(?![A-Za-z0-9+/=])|"
    r"(?<=[?&;])sig=(?P<signature>(?:[A-Za-z0-9+/]|%2[BFbf]){40,64}(?:=|%3[Dd]){0,2})|"
    r"://(?P<dsn>[0-9a-f]{32})@|"
    r"\bwandb login (?P<wandb>[0-9a-f]{40})(?![0-9a-f])|"
    r"X-Amz-Signature=(?P<amazon>[0-9a-f]{64})(?![0-9a-f])|"
    r"(?<![A-Za-z0-9+/])(?P<azure>[A-Za-z0-9+/]{86}==)(?![A-Za-z0-9+/=])"
)
# A key id followed by its secret, without a name, as in the CSV files of cloud providers.
_PAIR = re.compile(
    r"(?<![A-Za-z0-9])(?:A[KS]IA[0-9A-Z]{16}[\s,;:|/\"']{1,6}(?P<amazon>[A-Za-z0-9+/]{40})|"
    r"LTAI[0-9A-Za-z]{12,26}[\s,;:|/\"']{1,6}(?P<alibaba>[A-Za-z0-9]{30})|"
    r"AC[0-9a-f]{32}[\s,;:|/\"']{1,6}(?P<twilio>[0-9a-f]{32})|"
    r"AKID[0-9A-Za-z]{32}[\s,;:|/\"']{1,6}(?P<tencent>[A-Za-z0-9]{32}))(?![A-Za-z0-9+/=])"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<name>(?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?)-----(?:[^-]|-(?!----)){40,20000}+"
    r"(?:-----END (?P=name)-----)?"
)
_PUTTY = re.compile(r"(?<=Private-Lines: )[0-9]{1,3}\s{1,2}(?:[A-Za-z0-9+/=]{20,64}\s{1,2}){2,200}")
_JSON_WEB_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,2000}+\.eyJ[A-Za-z0-9_-]{10,4000}+\.[A-Za-z0-9_-]{20,1000}"
)
_LONG_TOKEN = re.compile(r"[A-Za-z0-9_+/-]{16,}+={0,2}")


def secrets(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of keys, tokens and passwords."""
    text = scan.text
    if "-----BEGIN" in text:
        for match in _PRIVATE_KEY.finditer(text):
            if re.search(r"[A-Za-z0-9+/]{32}", match[0][len(match["name"]) + 16 :]):
                yield match.span()
    if "Private-Lines" in text:
        yield from (match.span() for match in _PUTTY.finditer(text))
    if "://" in text:
        yield from _url_passwords(scan)
    if "hook" in text or "oapi.dingtalk" in text:
        yield from (match.span() for match in _HOOK.finditer(text) if _is_random(re.split("[/=]", match[0])[-1]))
    for within in scan.long_words():
        for window in windows(text, _LONG_TOKEN, 32, 60, keylike, within):
            yield from _keys(scan, window[0], min(window[1], within[1] + 1))
    if any(begin in text for begin in ("AKIA", "ASIA", "LTAI", "AKID", "wilio", "TWILIO")):
        pairs = ((match, match.lastgroup or "") for match in _PAIR.finditer(text))
        yield from (match.span(name) for match, name in pairs if _is_random(match[name]))
    if "-u" in text or "sshpass" in text:
        yield from (m.span("password") for m in _COMMAND.finditer(text) if not _is_weak(m["password"]))
    yield from _named(scan)


def _keys(scan: Scan, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of values in a known key format in text[begin:end]."""
    for match in _JSON_WEB_TOKEN.finditer(scan.text, begin, end):
        yield match.span()
    for match in _PARAMETER.finditer(scan.text, begin, end):
        name = match.lastgroup or ""
        if _is_random(match[name]) and not (name == "azure" and _is_digest(scan, match.start())):
            yield match.span(name)
    for match in _KEY.finditer(scan.text, begin, end):
        beginning = _BEGINNING.match(match[0])
        body = match[0][beginning.end() if beginning else 0 :]
        if _is_random(body) if match[0].startswith("sk-") or not beginning else _looks_generated(body):
            yield match.span()


def _is_digest(scan: Scan, begin: int) -> bool:
    """Whether the value is a base64 SHA-512 digest, as in lock files."""
    return re.search(r"(?i:sha-?512|integrity|digest|hash)[\"':= -]{0,6}$", scan.before(begin, 20)) is not None


# ---- values that look random ----

_PLACEHOLDER = re.compile(
    r"(?i)x{4}|\*{3}|\.{3}|0{7}|example|your[_-]|_here|placeholder|change[_-]?me|1234567|abcdefg|redacted|dummy|"
    r"insert[_-]|"
    r"Eby8vdM02xNOcqFlqUwJ|C2y6yDjf5/R\+ob0N8A7C|SflKxwRJSMeKKF2QT4fw|"
    r"4eC39HqLyjWD|BQokikJOvBiI2"  # keys of emulators and manuals
)
_WORD = re.compile("[A-Z]?[a-z]{3,}|[A-Z]{4,}")
_CAMEL = re.compile("[A-Z][a-z]{2,}|(?<![A-Za-z])[a-z]{3,}(?![0-9])|(?<![A-Za-z])[A-Z]{3,}(?![a-z0-9])")
_VOWEL = re.compile("[AEIOUaeiou]")
_PARTS = re.compile(r"[-_./: ]")


def _entropy(value: str) -> float:
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _looks_generated(value: str) -> bool:
    """Whether a value after a service's key prefix is no placeholder and has enough entropy."""
    return _PLACEHOLDER.search(value) is None and _entropy(value) >= 2.8


def _is_random(value: str) -> bool:
    """Whether letters and digits are mixed as in a random string: no placeholder, name, path or words."""
    if not _looks_generated(value):
        return False
    parts = [part for part in _PARTS.split(value) if part]
    if len(parts) > 2 and all(re.fullmatch("[A-Za-z]{2,}[0-9]{0,2}|[0-9]{1,4}|[A-Za-z]", part) for part in parts):
        return False
    if len(parts) > 1 and all(re.fullmatch("[A-Za-z_][a-z_]{2,}[0-9]?|[A-Z_]{2,}[0-9]?", part) for part in parts):
        return False
    letters, digits = sum(map(str.isalpha, value)), sum(map(str.isdigit, value))
    if not letters:
        return False
    changes = len(re.findall("[0-9][A-Za-z]|[A-Za-z](?=[0-9])", value))
    in_words = sum(map(len, _WORD.findall(value)))
    mixed = not value.islower() and not value.isupper() and in_words < 0.5 * letters
    if sum(len(word) for word in _CAMEL.findall(value) if _VOWEL.search(word)) >= 0.7 * letters:
        return False  # NamesInCamelCase
    return (digits >= 2 and changes >= max(3, len(value) // 16)) or (mixed and (digits > 0 or len(value) >= 20))


# ---- passwords in URLs and commands ----

_URL_PASSWORD = re.compile(
    r"://(?P<user>[^\s/:@\"'<>`]{0,64}):(?P<password>[^\s/@\"'<>`]{4,128}(?:@[^\s/@\"'<>`.:]{1,32}(?=@))?)@[\w\[]"
)
_COMMAND = re.compile(
    r"(?:\b(?:curl|wget|http|docker login)\b[^\n]{0,120}? (?:-u|--user)[ =]?[\"']?[\w.@-]{1,64}:|\bsshpass -p ?[\"']?|"
    r"\bmysql(?:dump|admin)?\b[^\n]{0,80}? -p[\"']?(?=[^\s\"']{0,64}[0-9]))"
    r"(?P<password>[^\s\"'$]{5,64})"
)
_WEAK = words(
    "password passwd passwort pass pwd passw0rd secret user username login postgres mysql root admin guest test pw "
    "changeme repo example anonymous none null token x-oauth-basic foo bar redacted hidden"
)


def _url_passwords(scan: Scan) -> Iterator[tuple[int, int]]:
    for match in _URL_PASSWORD.finditer(scan.text):
        password = match["password"]
        template = password[0] in "$%{[(*" and not re.fullmatch(r"(?:%[0-9A-Fa-f]{2}|[\w.!~*+=^&#$-])+", password)
        variable = re.fullmatch(r"\$\w+|\$\{.*|%\w+%|\{\w*\}|:\w+", password)
        if not (template or variable or _is_weak(password)):
            yield match.span("password")


def _kinds(value: str) -> int:
    """How many of these classes occur: lower case, upper case, digits, other signs."""
    return sum(re.search(kind, value) is not None for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[^\sA-Za-z0-9_-]"))


def _is_weak(password: str) -> bool:
    """Whether a password is a placeholder, as in manuals."""
    low = password.lower()
    word = re.search("passw|secret|example|your|change.?me|placeholder|token|xxx|[*]{3}|[.]{3}|•••", low) is not None
    return low in _WEAK or (word and _kinds(password) < 3) or len(set(password)) < 3


# ---- values after a name ----

_STEMS = ("key", "token", "secret", "pass", "pwd", "credential", "bearer", "basic ", "kennwort")
_OTHER_STEMS = re.compile("[密口令私пП비パ](?:(?<=密)[码碼钥]|(?<=口)令|(?<=令)牌|(?<=私)钥|ароль|밀번호|スワード)")
_PASSWORDS = words("pass pwd kennwort contraseña 密码 密碼 口令 пароль 비밀번호 パスワード")
_QUALIFIERS = words(
    "api access secret private client account app application consumer encryption signing master service storage "
    "subscription shared auth authn authz bot refresh session personal deploy webhook oauth oauth2 user admin root "
    "db database jwt github gitlab slack discord aws azure gcp google openai anthropic hf hub huggingface wandb "
    "stripe twilio heroku cloudflare npm pypi registry telegram sentry datadog algolia mailgun sendgrid login "
    "security signature hmac license instrumentation production prod live ssh deepseek dashscope zhipu baidu "
    "tencent aliyun cohere mistral together groq"
)
_SK = re.compile(
    r"(?<![A-Za-z0-9_-])(?:sk|SK|Sk)[\"']?[ ]?[:=：][ ]?[\"']?(?P<value>[A-Za-z0-9+/]{24,64}={0,2})(?![A-Za-z0-9+/=_-])"
)
_QUALIFIED = re.compile(rf"(?i:{'|'.join(sorted(_QUALIFIERS))})[_. -]?$")
# Names of public values, and of tokens of a text.
_PUBLIC_NAMES = words(
    "csrf xsrf next page continuation pad eos bos unk mask sep cls sync public cache partition primary foreign "
    "sort cancellation cancelation site anti-forgery antiforgery start end stop max min num n new special "
    "idempotency pub publishable"
)
_PUBLIC = re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{'|'.join(sorted(_PUBLIC_NAMES))})[_. -]?$")
_JOIN = re.compile(
    r"(?:(?i:word|wd)?[\"']?(?:[ ]|[ ]?\n[ ]{1,16})value[:=][ ]?[\"']?(?P<xml>)|"
    r"(?i:word|wd|wort|phrase|code|s|e)?(?:[_. -][A-Za-z0-9]{1,12}|"
    r"[A-Z0-9][A-Za-z0-9]{0,12}){0,2}?[\"'`\])*\\]{0,4}[ \t]{0,6}"
    r"(?:(?P<is>::?=|=>|->|==?|[:：]|\||\bis\b|是|为|(?::[ ]?)[A-Za-z.\[\]|]{1,20}[ ]?=)"
    r"[ \t*`]{0,6}(?:[fbru]?[\"'`\\]{1,4})?|"
    r">|\([\"']|(?<![\])]),(?! )|(?<=[\"']),[ ]?[\"']|(?P<blank>[ \t]{1,2}[\"']?)))"
    r"(?:(?:Bearer|bearer|Basic|Token|token)[ ])?"
)
_VALUE = re.compile(r"[A-Za-z0-9_+/.~=%:-]{16,2000}+(?![A-Za-z0-9_+/.~=%:-])")
# After a name and only a space: mixed as no word is.
_MIXED = re.compile(r"(?=[\w-]{0,60}[A-Z])(?=[\w-]{0,60}[a-z])(?=[\w-]{0,60}[0-9])[A-Za-z0-9_-]{24,200}+(?![\w./=(\[])")
_PASSWORD = re.compile(r"[^\s\"'`<>,;&|，。；、）]{6,64}+")
_OPTION = re.compile(
    r"--[A-Za-z-]{0,24}$|-H [\"'][A-Za-z-]{0,24}$|\blogin \S{1,40} $|(?i:authorization)[\"']?[:=] ?[\"']?$"
)


def _named(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of secrets after a name of a secret: api_key = "...", client_secret: ..., --token ..., Bearer ..."""
    text = scan.text
    low = text.encode("ascii", "replace").lower()  # one byte per character: equal offsets, ten times faster to search
    if any(name in low for name in (b"sk:", b"sk=", b'sk"', b"sk?")):
        yield from (match.span("value") for match in _SK.finditer(text) if _is_random(match["value"]))
    positions = [(stem, at) for stem in _STEMS for at in _positions(low, stem.encode())]
    if not text.isascii():
        positions += [(match[0].lower(), match.start()) for match in _OTHER_STEMS.finditer(text)]
        positions += [(stem.lower(), at) for stem in ("contraseña", "Contraseña") for at in _positions(text, stem)]
    for stem, at in positions:
        if span := _value_of(scan, stem, at, at + len(stem)):
            yield span


def _positions(text: AnyStr, part: AnyStr) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def _value_of(scan: Scan, stem: str, at: int, end: int) -> tuple[int, int] | None:
    """Span of the secret after the name with this stem (at text[at:end]), None if there is none."""
    text, before = scan.text, scan.before(at, 24)
    if stem == "basic ":
        return _basic_login(scan, end) if before[-16:].lower().rstrip(" \"':=").endswith("authorization") else None
    if stem == "bearer":
        begin = end + len(re.match(r"[ \t:=\"']{0,4}", text[end : end + 4])[0])  # type: ignore[index]
        return _secret(scan, begin) if begin > end else None
    join = _JOIN.match(text, end)
    if join is None:
        return None
    bare = join["blank"] and join[0][-1] not in "\"'" and not _OPTION.search(scan.before(at, 48))
    if bare and (stem not in ("key", "token", "secret") or not _MIXED.match(text, join.end())):
        return None
    french = stem == "pass" and before[-7:].lower() == "mot de " and text[end : end + 1].lower() == "e"
    if stem == "pass" and not french and re.match("(?!word|wd|phrase|code|wort)[A-Za-z]", text[end : end + 6].lower()):
        return None  # passed, passage
    if stem in _PASSWORDS:
        inside = before[-1:].isalpha() and before[-1:].islower() and text[at].islower() and text[at].isascii()
        return None if inside else _password(scan, join)
    if stem == "key" and not _QUALIFIED.search(before) and not re.match(r"[_-]?(?i:secret)", text[end : end + 7]):
        return None
    return None if _PUBLIC.search(before) else _secret(scan, join.end())


def _secret(scan: Scan, begin: int) -> tuple[int, int] | None:
    match = _VALUE.match(scan.text, begin)
    if match is None or scan.is_repeated(match.end()):
        return None
    if scan.after(match.end(), 1) in tuple("([{"):  # a call or an expression, not a value
        return None
    value = match[0].rstrip(".:")
    if scan.text[begin - 1] not in "\"'`" and re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", value):
        return None  # the name of a type or a variable
    return (begin, begin + len(value)) if _is_random(value) and "://" not in value else None


def _password(scan: Scan, join: re.Match[str]) -> tuple[int, int] | None:
    match = _PASSWORD.match(scan.text, join.end())
    if match is None:
        return None
    value = match[0].rstrip(").]}:")
    quoted = join[0][-1:] in "\"'`" or "value=" in join[0] or join[0][-1:] == ">"
    code = re.search(r"[(\[{]|^[$%]|^\w+(?:\.[A-Za-z_]\w*)+$|::|->|\\n", value) and not quoted
    letters, digits = re.search("[A-Za-z]", value), re.search("[0-9]", value)
    if (
        join["is"] is None
        and join["xml"] is None
        and not join[0].endswith(">")
        and not (_is_random(value) or _kinds(value) > 2)
    ):
        return None  # an argument
    if code or not (letters and digits) or len(value) < 6 or _is_weak(value) or _PLACEHOLDER.search(value):
        return None
    if not quoted and join["is"] == "=" and join[0].endswith(" ") and value.isidentifier() and not _is_random(value):
        return None  # a variable
    return join.end(), join.end() + len(value)


def _basic_login(scan: Scan, begin: int) -> tuple[int, int] | None:
    """Span of the base64 user:password after `Authorization: Basic`, None if it is none."""
    match = re.compile(r"[A-Za-z0-9+/]{8,200}={0,2}").match(scan.text, begin)
    if match is None:
        return None
    try:
        return match.span() if b":" in base64.b64decode(match[0], validate=True) else None
    except binascii.Error:
        return None
